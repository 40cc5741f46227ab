"""The log of a server's process: quire's lines and the web server's alike."""

from __future__ import annotations

import logging
import os
import sys

from quire.utils import log

_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def set_up_logs(level: str | None, uvicorn_level: str) -> None:
    """Write the process's log to standard error.

    Parameters
    ----------
    level : str or None
        Of quire's own lines; None is what QUIRE_LOG_LEVEL says, else INFO.
    uvicorn_level : str
        Of the web server's.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(_FORMAT))
    for name in (log.ROOT_NAME, "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.propagate = False
    logging.getLogger(log.ROOT_NAME).setLevel(logging.INFO)
    log.configure()
    if level is not None:
        logging.getLogger(log.ROOT_NAME).setLevel(level)
        # It goes before the environment, which an engine looks at again as it is made.
        os.environ["QUIRE_LOG_LEVEL"] = level
    logging.getLogger("uvicorn").setLevel(uvicorn_level)
