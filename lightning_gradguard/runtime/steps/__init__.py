"""One optimizer step as a transaction: measured, checked, committed or skipped."""
