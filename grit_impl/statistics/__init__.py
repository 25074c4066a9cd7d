"""Small-sample statistics that claims, gates and sweeps share, and the decisions made from them."""
