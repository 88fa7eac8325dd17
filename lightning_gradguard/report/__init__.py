"""Reports on finished runs, without torch and without Lightning."""
