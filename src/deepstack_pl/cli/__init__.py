"""Assemble a run and start it."""
