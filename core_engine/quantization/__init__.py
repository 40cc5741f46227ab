"""Weight formats: each file reads one, or makes one while a model is loaded."""
