"""Tests of commhooks: references in one process, the library in several."""
