"""How tensors lie in flat vectors, and what differs between devices."""
