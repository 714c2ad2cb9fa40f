"""The mathematics of importance: knows torch, and nothing else here."""
