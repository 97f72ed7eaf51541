"""DiLoCo with everything it can be given: outer optimizers, fragments, delays and merges."""
