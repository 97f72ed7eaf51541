"""What is saved, what is refused, and that a run goes on as if it had never stopped."""
