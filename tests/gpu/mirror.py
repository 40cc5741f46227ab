"""The package `quire` out of a checkout's folders, without an install and without a mark on it."""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def use_checkout() -> None:
    """Have this process, and those that it starts, import `quire` and the tests' helpers."""
    folder = Path(tempfile.mkdtemp(prefix="quire-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    package = folder / "quire"
    package.mkdir()
    for path in (ROOT / "core_engine").iterdir():
        (package / path.name).symlink_to(path)
    for name in ("kernels", "integrations"):
        (package / name).symlink_to(ROOT / name)
    paths = [str(folder), str(ROOT / "tests" / "helpers")]
    sys.path[:0] = paths
    rest = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([*paths, *([rest] if rest else [])])
    sys.dont_write_bytecode = True
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
