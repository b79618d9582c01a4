"""One training loop for the dense seed, the experts and the mixture."""
