"""One table per family of models: its configuration's words and its checkpoint's names."""
