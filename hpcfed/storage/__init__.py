"""What outlives a process: the run directory."""
