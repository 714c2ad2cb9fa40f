"""The life of a run: set-up, rounds, results."""
