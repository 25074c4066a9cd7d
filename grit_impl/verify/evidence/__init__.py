"""Evidence for claims: made now, or as it lies in a reports folder."""
