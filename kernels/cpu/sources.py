"""The native library's sources, and the hash that says which of them it was built from."""

from __future__ import annotations

import hashlib
from pathlib import Path


def hash_of(folder: Path) -> str:
    """Return a hash of the names and contents of all C++ files in a folder.

    setup.py compiles it in; the loader compares it where the sources are at hand.
    """
    total = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in (".cpp", ".h"):
            content = path.read_bytes()
            total.update(f"{path.name} {len(content)}\n".encode() + content)
    return total.hexdigest()[:16]
