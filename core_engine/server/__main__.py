"""``python -m quire.server``: the same as ``quire serve``."""

from __future__ import annotations

from quire.server.cli import app

if __name__ == "__main__":
    app(prog_name="quire serve")
