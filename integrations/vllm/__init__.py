"""quire under the names of vLLM, for code that imports ``vllm`` and shall run unmodified.

Nothing happens before :func:`install`, or ``python -m quire.integrations.vllm script.py``, or
``python -m quire.integrations.vllm enable``, is called.

Examples
--------
>>> import quire.integrations.vllm
>>> quire.integrations.vllm.install()
>>> from vllm import SamplingParams
>>> SamplingParams().max_tokens
16
>>> quire.integrations.vllm.uninstall()
"""

from __future__ import annotations

import sys
from importlib.util import find_spec

from quire.integrations.vllm.finder import Finder, ServedModule, installed, served_modules
from quire.integrations.vllm.release import VERSION

__all__ = ["VERSION", "StandInError", "install", "is_installed", "uninstall"]


class StandInError(RuntimeError):
    """The stand-in cannot take vLLM's place."""


def install(*, force: bool = False) -> None:
    """Serve ``import vllm`` from quire, in this process, until :func:`uninstall`. Idempotent.

    Parameters
    ----------
    force : bool
        Take the place of a real vLLM that could be imported.

    Raises
    ------
    StandInError
        A real vLLM can be imported, and it is not forced; or one was imported already.
    """
    if installed() is not None:
        return
    loaded = sys.modules.get("vllm")
    if loaded is not None and not isinstance(loaded, ServedModule):
        raise StandInError(
            f"vllm was imported already, from {getattr(loaded, '__file__', 'somewhere')}: call "
            "install() before anything imports it"
        )
    if not force and (found := find_spec("vllm")) is not None:
        raise StandInError(
            f"a real vLLM can be imported here, from {found.origin or 'somewhere'}: uninstall it, "
            "or say install(force=True) to have quire in its place"
        )
    sys.meta_path.insert(0, Finder())


def uninstall() -> None:
    """Serve ``import vllm`` no longer; what was imported from it goes on working. Idempotent."""
    finder = installed()
    if finder is not None:
        sys.meta_path.remove(finder)
    for name in served_modules():
        del sys.modules[name]


def is_installed() -> bool:
    """Return whether ``import vllm`` is served by quire."""
    return installed() is not None
