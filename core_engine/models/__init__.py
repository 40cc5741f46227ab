"""Models: a checkpoint folder becomes a Decoder that runs over a paged KV cache."""
