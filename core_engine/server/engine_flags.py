"""The engine's arguments as flags, made out of its configuration."""

from __future__ import annotations

import dataclasses
import inspect
import re
from typing import Any

from quire.config import NO_EFFECT, NOT_OFFERED, EngineConfig, argument_names, checks
from quire.config import engine_config as parts
from quire.config.lora_config import LoRAConfig
from quire.config.parallel_config import ParallelConfig
from quire.server.flag import Flag, Kind

_GROUPS = {
    parts.ModelConfig: "The model",
    parts.CacheConfig: "The KV cache",
    parts.SchedulerConfig: "The scheduler",
    parts.StructuredOutputsConfig: "Structured outputs",
    LoRAConfig: "Adapters",
    ParallelConfig: "Several processes",
    EngineConfig: "The engine",
}

_SPELLINGS = {
    "tensor_parallel_size": ("-tp",),
    "pipeline_parallel_size": ("-pp",),
    "data_parallel_size": ("-dp",),
    "quantization": ("-q",),
}

# The server has its own of these names: for a class is no text, nor is an adapter, and the others
# are about answers.
SERVER_NAMES = frozenset(
    {"model", "chat_template", "lora_modules", "served_model_name", "reasoning_parser"}
)


def engine_flags() -> list[Flag]:
    """Return a flag for every argument of the engine but :data:`SERVER_NAMES`.

    What is without effect, or not offered, is no part of the help.
    """
    flags = []
    for kind, group in _GROUPS.items():
        told = described(kind)
        for spec in dataclasses.fields(kind):
            if spec.name in SERVER_NAMES or spec.type in {each.__name__ for each in _GROUPS}:
                continue
            flags.append(
                Flag(
                    name=spec.name,
                    kind=_kind(spec.name, str(spec.type)),
                    group=group,
                    help=told.get(spec.name, ""),
                    default=None if spec.default is dataclasses.MISSING else spec.default,
                    spellings=_SPELLINGS.get(spec.name, ()),
                )
            )
    known = {flag.name for flag in flags} | SERVER_NAMES
    flags += [
        Flag(name=name, kind=_foreign_kind(name), spellings=_SPELLINGS.get(name, ()))
        for name in argument_names()
        if name not in known
    ]
    return flags


def _kind(name: str, annotation: str) -> Kind:
    if name == "logits_processors":
        return "several"
    kinds: dict[str, Kind] = {
        "bool": "switch",
        "int": "integer",
        "float": "number",
        "str": "text",
        "str | bool": "token",
        "dict[str, Any]": "json",
    }
    return kinds[annotation.removesuffix(" | None")]


def _foreign_kind(name: str) -> Kind:
    """Return how an argument is read that has no field: by its check, or by what is off."""
    if name in NO_EFFECT:
        check = NO_EFFECT[name]
        return "switch" if check is checks.boolean else "text" if check is checks.text else "free"
    return "switch" if isinstance(NOT_OFFERED[name][0], bool) else "free"


def described(kind: type[Any]) -> dict[str, str]:
    """Return what the section "Attributes" of a class's docstring says of each.

    Parameters
    ----------
    kind : type

    Returns
    -------
    dict of str to str
        Empty where Python runs without docstrings.
    """
    text = inspect.cleandoc(kind.__doc__ or "")
    _, _, section = text.partition("Attributes\n----------\n")
    told: dict[str, str] = {}
    names: list[str] = []
    for line in section.splitlines():
        if line.startswith(" "):
            for name in names:
                told[name] = f"{told.get(name, '')} {line.strip()}".strip()
        elif ":" in line:
            names = [name.strip() for name in line.partition(":")[0].split(",")]
            annotation = line.partition(":")[2].strip()
            if annotation.startswith("{"):
                told |= {name: annotation.strip("{}").replace('"', "") + "." for name in names}
    return {name: _plain(words) for name, words in told.items()}


def _plain(words: str) -> str:
    """Return a docstring's words without the marks of its markup."""
    words = re.sub(r":\w+:`[~.]?([^`]+)`", r"\1", words)
    return words.replace("``", "")
