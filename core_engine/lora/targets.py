"""Targets: what an adapter can change in a model, by the names that a checkpoint has for it."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

if TYPE_CHECKING:
    from quire.models.decoder import Decoder
    from quire.models.family import Family
    from quire.models.linear import Linear

Kind = Literal["linear", "embedding", "other"]


@dataclass(frozen=True, slots=True, eq=False)
class Target:
    """A module of a checkpoint, and where it is in the decoder.

    Attributes
    ----------
    kind
        ``"linear"``: a projection, or the output matrix; ``"embedding"``: that of tokens;
        ``"other"``: what an adapter cannot change.
    name
        The decoder's name of the (fused) module.
    first_row, num_rows
        Which rows of the fused module it is.
    in_features
        Columns of its weight.
    order
        Where its rows are in the checkpoint's; None: they are in the decoder's order.
    """

    kind: Kind
    name: str
    first_row: int
    num_rows: int
    in_features: int
    order: torch.Tensor | None = None

    @property
    def key(self) -> tuple[str, int]:
        """The same for every name of one module."""
        return self.name, self.first_row


class Targets:
    """The modules of one model.

    Parameters
    ----------
    decoder, family
        The model, and how its checkpoints call its parts.

    Attributes
    ----------
    linears : mapping of str to Linear
        The decoder's projections.
    width : int
        Columns of embedding and output matrix.
    tied : bool
        Whether these two are one.
    """

    def __init__(self, decoder: Decoder, family: Family) -> None:
        self._family = family
        self._decoder = decoder
        spec = decoder.spec
        self.tied = spec.tie_word_embeddings
        self.width = spec.embedding_size or spec.hidden_size
        self.linears = decoder.linears()
        self._found: dict[str, Target | None] = {}
        self._sources = Counter(to for to in family.weights.values())

    def find(self, module: str) -> Target | None:
        """Return what the module is; None: the model has no such module."""
        if module not in self._found:
            self._found[module] = self._find(module)
        return self._found[module]

    def _find(self, module: str) -> Target | None:
        place = self._family.place(f"{module}.weight")
        if place is None:
            return None
        name = place.parameter.removesuffix(".weight")
        if (linear := self.linears.get(name)) is not None:
            return self._linear_target(linear, place.part, place.layout == "grouped")
        if name == "embed":
            return Target("embedding", name, 0, self._decoder.spec.vocab_size, self.width)
        weights = self._decoder.weights
        names = (f"{name}.weight", f"{name}.bias")
        if any(each in weights or each in weights.elsewhere for each in names):
            return Target("other", name, 0, 0, 0)
        return None

    def _linear_target(self, linear: Linear, part: str, grouped: bool) -> Target:
        first, num_rows = 0, linear.out_features
        if part:
            for each, rows in linear.parts.items():
                if each == part:
                    num_rows = rows
                    break
                first += rows
        order = None
        if grouped and linear.groups > 1:
            order = linear.ungrouped_rows()
        return Target("linear", linear.name, first, num_rows, linear.in_features, order)

    def modules(self, prefix: str | None = None) -> Iterator[str]:
        """Names of the modules as a checkpoint has them, where it can have but one for each.

        `prefix` stands for the usual one.
        """
        if prefix is None:
            prefix = self._family.prefixes[0] if self._family.prefixes else ""
        for pattern, to in self._family.weights.items():
            if self._sources[to] > 1 or pattern.count("{}") > 1:
                continue
            if "{}" in pattern:
                for index in range(len(self._decoder.spec.layers)):
                    yield prefix + pattern.format(index)
            else:
                yield pattern if to.module == "lm_head" else prefix + pattern

    def prefix_of(self, module: str) -> str:
        """Return what stands before the name that the family has for a module."""
        pattern = re.sub(r"(?<=\.)\d+(?=\.)", "{}", module, count=1)
        for prefix in (*self._family.prefixes, ""):
            if pattern.startswith(prefix) and pattern[len(prefix) :] in self._family.weights:
                return prefix
        return ""

    def nearest(self, module: str) -> str:
        """Return the module of the model whose name is most like the given one."""
        names = [name for name in self.modules() if self.find(name) is not None]
        return difflib.get_close_matches(module[:200], names, n=1, cutoff=0.0)[0]
