"""The gradient ledger: what happened to each gradient of a training, recorded from outside, and the verdict on it."""
