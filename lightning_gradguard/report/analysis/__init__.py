"""What a finished run's log says: outcome, symptoms, verdict."""
