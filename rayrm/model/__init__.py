"""From packed arrays to scores and their loss."""
