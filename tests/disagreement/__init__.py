"""Two ranks that do different things: an error on all of them, never an abort, never a hang."""
