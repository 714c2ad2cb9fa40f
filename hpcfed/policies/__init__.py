"""The choices that make a method; no I/O, no MPI."""
