"""ClassificationHead: what a model that sorts texts has in place of an output matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from quire.errors import ModelLoadError
from quire.models.checkpoint import weight_files
from quire.models.sources import Sources

_NAME = "score.weight"


@dataclass(frozen=True)
class ClassificationHead:
    """The matrix of ``...ForSequenceClassification`` of transformers, which has no bias.

    Attributes
    ----------
    weight : Tensor[num_classes, hidden_size], float32
    independent : bool
        Whether classes do not exclude each other, or there is one: each has its own probability.
    """

    weight: torch.Tensor
    independent: bool

    @classmethod
    def read(cls, folder: Path, config: Mapping[str, Any], hidden_size: int) -> ClassificationHead:
        """Read the head of a checkpoint.

        Raises
        ------
        ModelLoadError
            There is none, or it does not fit.
        """
        with Sources(weight_files(folder)) as sources:
            found = [source for source in sources.all if source.name == _NAME]
            if len(found) != 1:
                raise ModelLoadError(
                    f"the weights in {folder} have {_NAME!r} {len(found)} times; a model that is "
                    "to sort texts into classes has it once"
                )
            weight = sources.tensor(found[0]).float().clone()
        if weight.dim() != 2 or weight.shape[1] != hidden_size:
            raise ModelLoadError(
                f"{_NAME!r} in {folder} has the shape {list(weight.shape)}; it must be "
                f"[num_labels, {hidden_size}]"
            )
        kind = config.get("problem_type")
        independent = len(weight) == 1 or kind == "multi_label_classification"
        return cls(weight, independent)

    @property
    def num_classes(self) -> int:
        """How many classes there are."""
        return len(self.weight)

    def apply(self, state: Sequence[float], *, activates: bool = True) -> list[float]:
        """Return what the head says of a prompt's last state, ``[hidden_size]``.

        Parameters
        ----------
        state : sequence of float
        activates : bool
            As probabilities; else as the head's own numbers.
        """
        numbers = self.weight @ torch.tensor(state, dtype=torch.float32)
        if activates:
            numbers = numbers.sigmoid() if self.independent else numbers.softmax(0)
        found: list[float] = numbers.tolist()
        return found
