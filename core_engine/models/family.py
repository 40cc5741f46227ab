"""Family: how one family of checkpoints becomes a DecoderSpec and parameters."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from quire.models.spec import DecoderSpec
from quire.models.weights import Layout

SpecBuilder = Callable[[Mapping[str, Any], "int | None"], DecoderSpec]


class To(NamedTuple):
    """Where a module of a checkpoint goes.

    Attributes
    ----------
    module
        The decoder's module, ``{}`` standing for the layer's number.
    part
        The part of a fused projection that it is; ``""``: all of it.
    layout
        How its rows lie, see `quire.models.weights.Weights.fill`.
    """

    module: str
    part: str = ""
    layout: Layout = "plain"


class Place(NamedTuple):
    """Where one tensor of a checkpoint goes."""

    parameter: str
    part: str
    layout: Layout


@dataclass(frozen=True)
class Family:
    """A family of models: a table, no code of its own to run.

    Attributes
    ----------
    architectures
        Names in a configuration's ``architectures`` that belong here.
    spec
        ``(config, max_model_len) -> DecoderSpec``. ``max_model_len`` is the longest sequence that
        will be served, None: as long as the configuration allows.
    weights
        A checkpoint's module name (without prefix and without ``.weight``/``.bias``, ``{}`` for
        the layer's number) -> where it goes.
    prefixes
        What may stand before a module's name.
    ignored
        Regular expressions for tensors that carry nothing: masks, frequencies.
    """

    architectures: tuple[str, ...]
    spec: SpecBuilder
    weights: Mapping[str, To]
    prefixes: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()

    def place(self, name: str) -> Place | None:
        """Return where the tensor `name` goes; None if this family knows no such tensor."""
        for prefix in (*self.prefixes, ""):
            if not name.startswith(prefix):
                continue
            module, _, kind = name[len(prefix) :].rpartition(".")
            if kind not in ("weight", "bias"):
                continue
            number = re.search(r"(?<=\.)\d+(?=\.)", module)
            pattern = module
            if number:
                pattern = f"{module[: number.start()]}{{}}{module[number.end() :]}"
            if (to := self.weights.get(pattern)) is not None:
                target = to.module.format(number.group() if number else "")
                return Place(f"{target}.{kind}", to.part, to.layout)
        return None

    def ignores(self, name: str) -> bool:
        """Whether the tensor `name` may be left out."""
        return any(re.search(pattern, name) for pattern in self.ignored)
