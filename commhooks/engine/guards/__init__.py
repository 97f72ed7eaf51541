"""Guards around process exit, Ctrl-C and refused backwards."""
