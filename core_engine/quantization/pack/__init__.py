"""Codes as the tensors of checkpoint formats that other engines read."""
