"""Rows, conversations, samples, batches."""
