"""The fault zoo: planted mistakes and sound runs that the ledger must tell apart."""
