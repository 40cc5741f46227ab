"""Where a model runs: in this process, or in several that compute each step together."""
