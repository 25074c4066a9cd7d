"""Base models, data, arms: what is trained, and how."""

import grit_impl.compatibility  # noqa: F401 (refuses versions that do not go together)
