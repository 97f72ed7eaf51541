"""One test for each thing that the library says it works with."""
