"""A YAML file with arguments of ``quire serve``, under the names of the flags."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quire.errors import ConfigError
from quire.server.flag import Flag
from quire.utils.checks import shown
from quire.utils.suggest import nearest


def read_config_file(path: str, flags: Mapping[str, Flag]) -> list[str]:
    """Return what a file says, as a command line would say it.

    Parameters
    ----------
    path : str
        A mapping of names to values; hyphens and underscores are the same in names.
    flags : mapping of str to Flag
        By name, with underscores.

    Raises
    ------
    ConfigError
        The file cannot be read, or it has a name that no flag has, or one twice, or a value of
        another kind.
    """
    return to_words(path, _load(path), flags)


def to_words(path: str, values: Mapping[str, Any], flags: Mapping[str, Flag]) -> list[str]:
    """Return what a mapping of names to values says, as a command line would say it.

    Parameters
    ----------
    path : str
        Where they come from, for errors.
    values, flags
        See `read_config_file`.
    """
    words: list[str] = []
    seen: dict[str, str] = {}
    for key, value in values.items():
        name = key.replace("-", "_")
        if name == "config":
            raise ConfigError(f"{path}: a file cannot name another by {key!r}")
        if name not in flags:
            guess = nearest(name, flags)
            hint = "" if guess is None else f": did you mean {guess!r}?"
            raise ConfigError(f"{path}: quire serve has no argument {key!r}{hint}")
        if name in seen:
            raise ConfigError(f"{path}: {seen[name]!r} and {key!r} are one argument; give one")
        seen[name] = key
        if value is not None:
            words += _words(path, flags[name], value)
    return words


def _words(path: str, flag: Flag, value: Any) -> list[str]:
    if flag.kind == "switch":
        if not isinstance(value, bool):
            raise ConfigError(f"{path}: {flag.name} must be true or false, not {shown(value)}")
        return [flag.option if value else f"--no-{flag.option[2:]}"]
    if flag.kind == "token" and value is True:
        return [flag.option]
    if flag.kind in ("several", "modules"):
        values = value if isinstance(value, list) else [value]
        return [f"{flag.option}={_text(path, flag, each)}" for each in values]
    return [f"{flag.option}={_text(path, flag, value)}"]


def _text(path: str, flag: Flag, value: Any) -> str:
    if flag.kind in ("json", "free") and not isinstance(value, str):
        return json.dumps(value)
    if flag.kind == "modules" and isinstance(value, dict):
        return json.dumps(value)
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise ConfigError(f"{path}: {flag.name} cannot be {shown(value)}")
    return str(value)


def _load(path: str) -> dict[str, Any]:
    try:
        import yaml
    except ImportError:
        raise ConfigError("a file of arguments needs PyYAML: pip install 'quire[server]'") from None

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        """Takes no key twice: the first value would be dropped without a word."""

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            for key in keys:
                if keys.count(key) > 1:
                    raise ConfigError(f"{path}: {key!r} stands there twice")
            mapping: dict[Any, Any] = super().construct_mapping(node, deep=deep)
            return mapping

    try:
        loaded = yaml.load(Path(path).read_text(encoding="utf-8"), Loader)  # as safe as its base
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"config={path!r} cannot be read: {error}") from None
    if loaded is None:
        return {}
    if not isinstance(loaded, dict) or not all(isinstance(key, str) for key in loaded):
        raise ConfigError(f"{path}: must be a mapping of names to values, such as `port: 8000`")
    return loaded
