"""What GRIT and its ledger cost, as ratios of things measured in turn."""
