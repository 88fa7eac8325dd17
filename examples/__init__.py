"""Small programs that show the suite at work."""
