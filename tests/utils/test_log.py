"""The `quire` logger speaks once an engine starts, and yields to the application's logging."""

from __future__ import annotations

import subprocess
import sys

import pytest

SAY = "logger = log.get_logger('quire.engine')\nlogger.info('started')\nlogger.debug('detail')\n"


def stderr_of(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", "import logging\nfrom quire.utils import log\n" + code],
        env={"PATH": "", **environment},
        cwd="/",
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout == ""
    return done.stderr


def test_silent_before_an_engine_starts() -> None:
    assert stderr_of(SAY) == ""


def test_info_is_seen_once_configured_and_once_only() -> None:
    assert stderr_of("log.configure()\nlog.configure()\n" + SAY) == "INFO quire.engine: started\n"


@pytest.mark.parametrize(("level", "lines"), [("debug", 2), ("INFO", 1), ("WARNING", 0)])
def test_the_environment_sets_the_level(level: str, lines: int) -> None:
    said = stderr_of("log.configure()\n" + SAY, QUIRE_LOG_LEVEL=level)
    assert len(said.splitlines()) == lines


def test_an_unknown_level_is_named() -> None:
    code = (
        "from quire import ConfigError\n"
        "try: log.configure()\n"
        "except ConfigError as error: logging.warning(error)\n"
    )
    said = stderr_of(code, QUIRE_LOG_LEVEL="LOUD")
    assert "QUIRE_LOG_LEVEL='LOUD'" in said
    assert "WARNING" in said


def test_the_applications_logging_stays_as_it_is() -> None:
    """An application at WARNING does not start to see quire's INFO, nor its format."""
    code = "logging.basicConfig(level='WARNING', format='app %(message)s')\nlog.configure()\n"
    assert stderr_of(code + SAY + "logger.warning('careful')\n") == "app careful\n"


def test_logging_that_is_set_up_later_takes_over() -> None:
    """A record is never written twice."""
    code = "log.configure()\nlogging.basicConfig(level='INFO', format='app %(message)s')\n"
    assert stderr_of(code + SAY) == "app started\n"


def test_a_level_set_by_the_application_stays() -> None:
    code = "logging.getLogger('quire').setLevel('WARNING')\nlog.configure()\n"
    assert stderr_of(code + SAY) == ""


def test_the_environment_wins_over_the_applications_level() -> None:
    code = "logging.basicConfig(level='WARNING', format='app %(message)s')\nlog.configure()\n"
    assert stderr_of(code + SAY, QUIRE_LOG_LEVEL="INFO") == "app started\n"


@pytest.mark.parametrize(
    ("name", "expected"),
    [("quire.engine.loop", "quire.engine.loop"), ("quire", "quire"), ("plugin", "quire.plugin")],
)
def test_every_logger_is_under_quire(name: str, expected: str) -> None:
    from quire.utils.log import get_logger

    assert get_logger(name).name == expected
