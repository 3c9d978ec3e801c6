"""From a saved checkpoint to rewards: publish, open, deploy, call."""
