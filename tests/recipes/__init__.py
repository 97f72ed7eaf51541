"""Tests of the recipes: their parts in this process, the recipes through their command line."""
