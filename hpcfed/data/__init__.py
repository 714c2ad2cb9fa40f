"""Tasks, where their rows come from, how clients share them, and how batches are formed."""
