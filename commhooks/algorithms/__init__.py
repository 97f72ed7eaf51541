"""One file an algorithm: its hyper-parameters and its update rules on flat vectors."""
