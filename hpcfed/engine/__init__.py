"""One slot's DeepSpeed engine, and what is asked of it."""
