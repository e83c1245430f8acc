"""Adapter layers, and the surgery that puts them into a model."""
