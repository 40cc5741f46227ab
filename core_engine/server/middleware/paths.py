"""The path of a request as the endpoints know it."""

from __future__ import annotations

from starlette.types import Scope

PROBES = frozenset({"/health", "/ready", "/ping", "/version"})
"""What whoever watches over a server asks for: without a key, and when the server ends, too."""


def route_path(scope: Scope) -> str:
    """Return the path without what a proxy put before it."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    if root and (path == root or path.startswith(root + "/")):
        return path[len(root) :] or "/"
    return path
