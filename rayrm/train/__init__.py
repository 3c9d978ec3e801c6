"""The training loop, its engines, checkpoints, and the trainer that runs it on Ray."""
