"""Launching arms: one process and one run record each, found again when finished."""
