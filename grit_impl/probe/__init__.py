"""Which callback events and hooks fire with the installed versions, in which order."""
