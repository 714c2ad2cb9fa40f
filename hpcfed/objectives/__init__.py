"""What turns the network's output into losses and predictions."""
