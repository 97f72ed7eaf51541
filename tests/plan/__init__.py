"""The planner: its cost model, its ranking, its command line, and what it measures."""
