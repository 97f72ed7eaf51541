"""Where steps come from: the model, its optimizers, a GradScaler, Join."""
