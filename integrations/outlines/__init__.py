"""Outlines on quire."""
