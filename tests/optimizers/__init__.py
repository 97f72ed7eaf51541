"""What may step the model: several optimizers, late ones, subclasses; and what is refused."""
