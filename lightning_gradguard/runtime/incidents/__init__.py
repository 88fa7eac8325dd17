"""What happened: published, examined, replayed, written down."""
