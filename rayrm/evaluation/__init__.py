"""From a saved model and rows to measures, scores and a decision: evaluation, bulk scoring, the gate."""
