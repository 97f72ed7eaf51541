"""When rounds happen: schedules, what is in flight, and the consensus model."""
