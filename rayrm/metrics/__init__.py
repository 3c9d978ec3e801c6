"""What a training step and an evaluation report: pure functions of scores."""
