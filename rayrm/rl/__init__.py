"""The trained reward as RL frameworks call it."""
