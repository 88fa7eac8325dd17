"""Rollback of a Trainer: snapshots, decisions, and the incidents of skipped steps."""
