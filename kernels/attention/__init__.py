"""Attention by other means than a backend's own: chosen by name, everything else as it was."""
