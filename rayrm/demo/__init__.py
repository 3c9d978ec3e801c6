"""The demonstration: the project's own preferences, and the whole way on one machine."""
