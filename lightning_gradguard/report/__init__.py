"""What is said of a run that is over, without torch and without Lightning."""
