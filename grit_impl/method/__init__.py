"""GRIT itself: which layers, what their statistics are, and what becomes of a gradient."""
