"""Held-out loss of every model of a run, and the report."""
