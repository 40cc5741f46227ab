"""What adapters may be called."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from quire.errors import ConfigError
from quire.server.settings import ServerSettings
from quire.utils.checks import shown

_LONGEST: Final = 256


def name_problem(name: str) -> str | None:
    """Return what an adapter's name would have to be, where it is not; None if it is well."""
    if not name.strip():
        return "not empty"
    if not name.isprintable():
        return "without control characters"
    if name != name.strip():
        return "without spaces around it"
    if len(name) > _LONGEST:
        return f"at most {_LONGEST} characters long"
    return None


def check_adapter_names(names: Sequence[str], settings: ServerSettings) -> None:
    """Check the names of adapters that a server starts with.

    Raises
    ------
    ConfigError
        One is no name, or the model's.
    """
    for name in names:
        problem = name_problem(name)
        if problem is not None:
            raise ConfigError(f"lora_modules: a name must be {problem}, not {shown(name)}")
        if name in settings.served_model_names:
            raise ConfigError(
                f"lora_modules: {name!r} is served already, as the model itself: give the adapter "
                "another name, or the model by served_model_name"
            )
