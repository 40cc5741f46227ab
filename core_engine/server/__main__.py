"""``python -m quire.server``: the same as ``quire serve``."""

from __future__ import annotations

from quire.server.cli import main

if __name__ == "__main__":
    main()
