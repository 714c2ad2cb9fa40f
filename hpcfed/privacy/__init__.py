"""Differential privacy: what clients may tell of themselves, how much noise hides it, what it adds
up to."""
