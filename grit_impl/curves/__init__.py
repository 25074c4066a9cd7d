"""Training logs of any origin, and what two loss curves can say about each other."""
