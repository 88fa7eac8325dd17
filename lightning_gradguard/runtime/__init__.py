"""What the callbacks share while a Trainer runs."""
