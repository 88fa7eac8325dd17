"""Changes of a module and of its optimizers, made where a Trainer expects them."""
