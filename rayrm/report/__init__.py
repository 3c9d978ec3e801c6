"""What a run left behind, as one page to look at: no script, no network, nothing beside the file."""
