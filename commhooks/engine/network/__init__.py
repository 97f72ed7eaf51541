"""What travels between the ranks. Nothing else in the package starts a collective."""
