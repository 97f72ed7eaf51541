"""What becomes of a model's buffers: averaged, the first rank's, or a rank's own."""
