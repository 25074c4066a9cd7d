"""`grit try`: does GRIT help on my data? A small sweep over somebody's own rows, and one page that answers."""
