"""One step at a time: who computes what, in which blocks, and what came of it."""
