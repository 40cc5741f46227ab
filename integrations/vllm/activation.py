"""Turning the stand-in on and off for a whole environment of Python."""

from __future__ import annotations

import os
import stat
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

from quire.integrations.vllm import StandInError
from quire.integrations.vllm.finder import ServedModule, installed

_MARK = "quire's stand-in for vLLM"

# Python reads it whenever it starts: quire may be gone by then, and must not be missed.
_PTH = (
    "import importlib.util as _u; _u.find_spec('quire') and "
    "__import__('quire.integrations.vllm.startup')\n"
)

_SCRIPT = f"""#!{{python}}
# {_MARK}
import sys

from quire.integrations.vllm.command import main

if __name__ == "__main__":
    sys.exit(main())
"""


def paths() -> tuple[Path, Path]:
    """Return where the environment's file of start-up and its command ``vllm`` belong."""
    where = sysconfig.get_paths()
    return Path(where["purelib"], "quire_vllm.pth"), Path(where["scripts"], "vllm")


def enable(*, force: bool = False) -> list[Path]:
    """Have every Python of this environment, child processes too, serve ``import vllm``.

    Parameters
    ----------
    force : bool
        Also where a real vLLM can be imported: it goes before the stand-in as a module, and its
        command is replaced.

    Returns
    -------
    list of Path
        The files that were written.

    Raises
    ------
    StandInError
        A real vLLM is here, or a command ``vllm`` of somebody else's, and it is not forced; or the
        environment cannot be written to.
    """
    pth, script = paths()
    if not force:
        real = _real_vllm()
        if real is not None:
            raise StandInError(
                f"a real vLLM can be imported here, from {real}: uninstall it, or give --force to "
                "have the stand-in beside it"
            )
        if script.exists() and not _is_ours(script):
            raise StandInError(
                f"{script} is somebody else's command: remove it, or give --force to replace it"
            )
    try:
        pth.write_text(_PTH, encoding="utf-8")
        script.write_text(_SCRIPT.format(python=sys.executable), encoding="utf-8")
        script.chmod(script.stat().st_mode | stat.S_IXUSR | stat.S_IXGRP | stat.S_IXOTH)
    except OSError as error:
        raise StandInError(
            f"the environment at {sys.prefix} cannot be written to ({error}): make one of your own "
            f"by `{os.path.basename(sys.executable)} -m venv`"
        ) from error
    return [pth, script]


def disable() -> list[Path]:
    """Take back what :func:`enable` wrote; return the files that were removed."""
    pth, script = paths()
    removed = []
    for path in (pth, script):
        if path.exists() and (path == pth or _is_ours(path)):
            path.unlink()
            removed.append(path)
    return removed


def _is_ours(script: Path) -> bool:
    try:
        return _MARK in script.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False


def _real_vllm() -> str | None:
    """Return where a real vLLM is, if one is."""
    finder = installed()
    loaded = sys.modules.get("vllm")
    if isinstance(loaded, ServedModule):
        loaded = None
    if loaded is not None:
        return str(getattr(loaded, "__file__", "somewhere"))
    if finder is not None:
        sys.meta_path.remove(finder)
    own = sys.modules.pop("vllm", None)
    try:
        found = find_spec("vllm")
    finally:
        if own is not None:
            sys.modules["vllm"] = own
        if finder is not None:
            sys.meta_path.insert(0, finder)
    return None if found is None else str(found.origin or "somewhere")
