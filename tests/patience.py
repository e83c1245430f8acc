"""How long a test waits for what takes moments on a machine that is not busy."""

PATIENCE = 600.0
"""Seconds: what hangs ends, and what is only slow, or held up by others, is waited for."""
