"""The engine: rounds, futures, buffers, hooks and checkpoints. It knows no algorithm."""
