"""Constraints: which tokens may come next, so that a text matches what a request asks for."""
