"""Checkpoints of runs and of other programs."""
