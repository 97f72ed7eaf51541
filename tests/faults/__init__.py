"""What becomes of a run when processes, networks, numbers or the user's own loop fail."""
