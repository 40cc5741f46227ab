"""The `quire` logger: silent at import, heard from once an engine starts.

Importing adds no handler and sets no level. :func:`configure`, which an engine calls when it
starts, makes messages visible on stderr, but only where the application has set up no logging
of its own. ``QUIRE_LOG_LEVEL`` (DEBUG, INFO, WARNING, ERROR, CRITICAL) sets the level in every
case.
"""

from __future__ import annotations

import logging
import os
import sys
import threading

from quire.errors import ConfigError

ROOT_NAME = "quire"
LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")

_lock = threading.Lock()


class _StderrHandler(logging.Handler):
    """Write to whatever ``sys.stderr`` is now, unless the application handles the record itself.

    An application may call ``logging.basicConfig`` after the engine has started; from then on
    records propagate to its handlers, and writing them here as well would show them twice.
    """

    def emit(self, record: logging.LogRecord) -> None:
        if logging.getLogger().handlers:
            return
        try:
            sys.stderr.write(self.format(record) + "\n")
            sys.stderr.flush()
        except Exception:
            self.handleError(record)


def get_logger(name: str = ROOT_NAME) -> logging.Logger:
    """Return the logger of a module of quire.

    Parameters
    ----------
    name : str
        ``__name__`` of the module; anything outside the ``quire`` namespace is put under it.
    """
    if name != ROOT_NAME and not name.startswith(ROOT_NAME + "."):
        name = f"{ROOT_NAME}.{name}"
    return logging.getLogger(name)


def configure(rank: str = "") -> None:
    """Make quire's messages visible if nobody else does; calling it again changes nothing.

    Parameters
    ----------
    rank
        What a process that is not the engine's own is called. Its messages bear that name, and
        those that the engine's own has as well are left out.

    Raises
    ------
    ConfigError
        ``QUIRE_LOG_LEVEL`` names no level.
    """
    logger = logging.getLogger(ROOT_NAME)
    asked = os.environ.get("QUIRE_LOG_LEVEL", "").strip().upper()
    if asked and asked not in LEVELS:
        raise ConfigError(f"QUIRE_LOG_LEVEL={asked!r} is no level: use one of {', '.join(LEVELS)}")
    with _lock:
        configured = bool(logger.handlers or logging.getLogger().handlers)
        if asked:
            logger.setLevel(asked)
        elif not configured and logger.level == logging.NOTSET:
            logger.setLevel(logging.WARNING if rank else logging.INFO)
        if not configured:
            handler = _StderrHandler()
            whose = f"[{rank}] " if rank else ""
            handler.setFormatter(logging.Formatter(f"%(levelname)s %(name)s: {whose}%(message)s"))
            logger.addHandler(handler)
