"""An engine's arguments, from one process to another."""

from __future__ import annotations

import importlib
from typing import Any

from quire.config import EngineConfig
from quire.errors import ConfigError
from quire.executor.messages import Message, pack
from quire.utils.checks import shown


def arguments_to_message(config: EngineConfig) -> Message:
    """Say the configuration of one of the copies of an engine.

    Raises
    ------
    ConfigError
        An argument has a value that only this process has.
    """
    message = config.to_kwargs()
    message["data_parallel_size"] = 1
    message["lora_modules"] = []  # each is read with the first request for it
    message["logits_processors"] = [_name_of(each) for each in config.logits_processors]
    for name, value in message.items():
        try:
            pack({name: value})
        except (TypeError, ValueError, OverflowError) as error:
            raise ConfigError(
                f"{name}={shown(value)} cannot be told to another process, and "
                f"data_parallel_size={config.parallel.data_parallel_size} starts some: {error}"
            ) from None
    return message


def config_from_message(message: Message) -> EngineConfig:
    """Return the configuration that a message says."""
    processors = [_named(name) for name in message["logits_processors"]]
    return EngineConfig.create(**{**message, "logits_processors": processors})


def _name_of(processor: Any) -> str:
    if isinstance(processor, type) and processor.__module__ != "__main__":
        name = f"{processor.__module__}:{processor.__qualname__}"
        try:
            if _named(name) is processor:
                return name
        except (ImportError, AttributeError):  # such as one that a function has made
            pass
    raise ConfigError(
        f"logits_processors has {shown(processor)}, and with data_parallel_size other processes "
        "have to make their own of it: give a class at the top of a module that can be imported"
    )


def _named(name: str) -> Any:
    module, _, path = name.partition(":")
    found: Any = importlib.import_module(module)
    for part in path.split("."):
        found = getattr(found, part)
    return found
