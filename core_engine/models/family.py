"""Family: how one family of checkpoints becomes a DecoderSpec and parameters."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from quire.models.spec import DecoderSpec
from quire.models.weights import Layout

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")

SpecBuilder = Callable[[Mapping[str, Any], "int | None"], DecoderSpec]


class To(NamedTuple):
    """Where a module of a checkpoint goes.

    Attributes
    ----------
    module
        The decoder's module, ``{}`` standing for the layer's number, a second one for that of an
        expert.
    part
        The part of a fused projection that it is; ``""``: all of it.
    layout
        How its rows lie, see `quire.models.weights.Weights.fill`.
    """

    module: str
    part: str = ""
    layout: Layout = "plain"


def without_numbers(module: str) -> tuple[str, list[str]]:
    """Return a module's name with ``{}`` in place of the numbers in it, and these."""
    return _NUMBER.sub("{}", module), _NUMBER.findall(module)


class Place(NamedTuple):
    """Where one tensor of a checkpoint goes."""

    parameter: str
    part: str
    layout: Layout


class Found(NamedTuple):
    """A tensor of a checkpoint, by the module that it belongs to.

    Attributes
    ----------
    module
        As the checkpoint has it.
    kind
        What its name has behind that: ``weight``, ``bias``, or more of a quantized module, such as
        ``weight.absmax``.
    to
        Where the module goes, with numbers in their places.
    """

    module: str
    kind: str
    to: To


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
        the layer's number, and for an expert's) -> where it goes.
    prefixes
        What may stand before a module's name.
    ignored
        Regular expressions for tensors that carry nothing: masks, frequencies.
    stacked
        Ends of names of tensors that hold a matrix for each expert, as ``experts.down_proj``: they
        are taken for as many tensors, ``experts.{i}.down_proj.weight``.
    """

    architectures: tuple[str, ...]
    spec: SpecBuilder
    weights: Mapping[str, To]
    prefixes: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    stacked: tuple[str, ...] = ()

    def find(self, name: str) -> Found | None:
        """Cut the name of a tensor at the module that this family knows; None: it knows none."""
        for prefix in (*self.prefixes, ""):
            if not name.startswith(prefix):
                continue
            end = len(name)
            while (end := name.rfind(".", len(prefix), end)) >= 0:
                module = name[len(prefix) : end]
                pattern, numbers = without_numbers(module)
                if (to := self.weights.get(pattern)) is not None:
                    target = to.module.format(*numbers)
                    return Found(name[:end], name[end + 1 :], to._replace(module=target))
        return None

    def name_of(self, module: str, part: str = "") -> str | None:
        """Return what a checkpoint calls a module of the decoder, or the one that has that part."""
        pattern, numbers = without_numbers(module)
        sources = {to.part: source for source, to in self.weights.items() if to.module == pattern}
        source = sources.get(part, sources.get(""))
        if source is None:
            return None
        prefix = self.prefixes[0] if self.prefixes and pattern != "lm_head" else ""
        return prefix + source.format(*numbers)

    def place(self, name: str) -> Place | None:
        """Return where the tensor `name` goes; None if this family knows no such tensor."""
        found = self.find(name)
        if found is None or found.kind not in ("weight", "bias"):
            return None
        return Place(f"{found.to.module}.{found.kind}", found.to.part, found.to.layout)

    def ignores(self, name: str) -> bool:
        """Whether the tensor `name` may be left out."""
        return any(re.search(pattern, name) for pattern in self.ignored)
