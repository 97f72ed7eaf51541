"""A real network on one machine: a namespace for every rank, joined by links of a chosen speed."""
