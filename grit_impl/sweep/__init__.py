"""`grit sweep`: many small trainings with paired seeds, and what they say about the update rules."""
