"""What requests look like: a model per kind of body."""
