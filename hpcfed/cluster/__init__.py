"""Where a run takes place: launchers, MPI worlds, signals."""
