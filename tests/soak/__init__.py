"""Long runs of everything at once, and random sequences of calls."""
