"""Comparing runs: what a grid expands to, how it is run, read back, tabulated and drawn."""
