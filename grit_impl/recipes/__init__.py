"""Base models, data, arms: what is trained, and how."""
