"""Small helpers that every room of the engine shares."""
