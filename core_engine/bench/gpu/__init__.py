"""``quire bench gpu``: what a GPU can do, and how much of that quire makes of it."""
