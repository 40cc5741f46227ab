"""read_adapter: a folder in peft's format to an Adapter for one decoder."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from quire.errors import AdapterError
from quire.lora import dora
from quire.lora.config import AdapterConfig
from quire.lora.content import TensorsFile, read_json
from quire.lora.names import Role
from quire.lora.plan import Change, Plan
from quire.lora.targets import Targets
from quire.models.adapter import Adapter, DeltaSlice, EmbeddingDelta, LinearDelta

if TYPE_CHECKING:
    from quire.models.decoder import Decoder
    from quire.models.family import Family

_DIFFERENCE, _CODED_DIFFERENCE = 0.004, 0.3
"""By how much a table may differ from the model's, of its size, and still be taken for the same:
by what float16 and bfloat16 round, or codes of few bits."""


def read_adapter(
    folder: Path, decoder: Decoder, family: Family, *, max_rank: int, dtype: torch.dtype
) -> Adapter:
    """Read an adapter that peft saved.

    Parameters
    ----------
    folder
        With ``adapter_config.json`` and ``adapter_model.safetensors``.
    decoder, family
        The model that it is for; bound.
    max_rank
        The largest rank to accept.
    dtype
        To bring the matrices to.

    Raises
    ------
    AdapterError
        It is missing or damaged, does not fit the model, or asks for what is not supported.
    """
    config = AdapterConfig(read_json(folder), folder)
    targets = Targets(decoder, family)
    with TensorsFile(folder) as file:
        ignored = [name for name in file.entries if family.ignores(name)]
        plan = Plan(file.path, file.entries, config, targets, max_rank, ignored)
        file.load()
    return _Reading(file, config, targets, decoder, dtype).adapter(plan.changes)


class _Reading:
    """One file on its way into one adapter."""

    def __init__(
        self,
        file: TensorsFile,
        config: AdapterConfig,
        targets: Targets,
        decoder: Decoder,
        dtype: torch.dtype,
    ) -> None:
        self._file = file
        self._config = config
        self._targets = targets
        self._decoder = decoder
        self._dtype = dtype
        self._largest = file.largest()

    def adapter(self, changes: Sequence[Change]) -> Adapter:
        fused: defaultdict[str, list[Change]] = defaultdict(list)
        embedding, tables = None, _Tables(self._decoder.spec.tie_word_embeddings)
        for change in changes:
            if change.target.kind == "other":
                self._check_unchanged(change)
                continue
            self._take_tables(change, tables)
            if change.target.kind == "embedding":
                embedding = self._embedding(change) if change.adapted else None
            elif change.adapted or "bias" in change.tensors:
                fused[change.target.name].append(change)
        linears = {name: self._linear(name, parts) for name, parts in fused.items()}
        tables.share()
        if not linears and embedding is None and tables.embed is None and tables.head is None:
            raise AdapterError(f"{self._file.path} changes nothing in the model")
        return Adapter(
            self._file.digest(self._config.canonical),
            linears,
            embedding,
            tables.embed,
            tables.head,
        )

    def _linear(self, name: str, parts: list[Change]) -> LinearDelta:
        parts.sort(key=lambda change: change.target.first_row)
        linear = self._targets.linears[name]
        a, scales, slices, first_rank = [], [], [], 0
        for change in (part for part in parts if part.adapted):
            a.append(self._tensor(change, "A"))
            scales.append(torch.full((change.rank,), change.scale))
            b = self._rows(change, "B").contiguous()
            slices.append(DeltaSlice(change.target.first_row, first_rank, b))
            first_rank += change.rank
        return LinearDelta(
            torch.cat(a) if a else torch.empty(0, linear.in_features, dtype=self._dtype),
            torch.cat(scales) if scales else torch.empty(0),
            tuple(slices),
            self._bias(name, parts),
            self._factor(name, parts),
        )

    def _bias(self, name: str, parts: Sequence[Change]) -> torch.Tensor | None:
        """What is to be added to the model's bias: a new one less the old, and that of ``B``."""
        parts = [part for part in parts if {"bias", "B.bias"} & part.tensors.keys()]
        if not parts:
            return None
        bias = torch.zeros(self._targets.linears[name].out_features)
        for change in parts:
            first, end = _span(change)
            if "bias" in change.tensors:
                old = self._decoder.read_bias(name)
                bias[first:end] = self._rows(change, "bias", torch.float32)
                if old is not None:
                    bias[first:end] -= old[first:end].float()
            if "B.bias" in change.tensors:
                bias[first:end] += change.scale * self._rows(change, "B.bias", torch.float32)
        return bias

    def _factor(self, name: str, parts: Sequence[Change]) -> torch.Tensor | None:
        parts = [part for part in parts if "magnitude" in part.tensors]
        if not parts:
            return None
        factor = torch.ones(self._targets.linears[name].out_features)
        weight = self._decoder.read_weight(name)
        for change in parts:
            first, end = _span(change)
            factor[first:end] = dora.factors(
                weight[first:end],
                self._tensor(change, "A", torch.float32),
                self._rows(change, "B", torch.float32),
                change.scale,
                self._rows(change, "magnitude", torch.float32),
            )
        if not torch.isfinite(factor).all():
            raise AdapterError(
                f"{self._file.path}: the norm of some row of {parts[0].module!r} is zero with the "
                "adapter's product added, and use_dora divides by it"
            )
        return factor

    def _embedding(self, change: Change) -> EmbeddingDelta:
        a = self._tensor(change, "embedding_A").t().contiguous()
        return EmbeddingDelta(a, self._tensor(change, "embedding_B").clone(), change.scale)

    def _take_tables(self, change: Change, tables: _Tables) -> None:
        """Take note of tables that stand in for the model's, where they are not the same."""
        if "base_layer.weight" in change.tensors and not self._is_base(change, "base_layer.weight"):
            raise AdapterError(
                f"{self._file.path}: {change.tensors['base_layer.weight']!r}, the weight that the "
                f"adapter was trained on, is not the model's {change.module!r}: it was made for "
                "another model"
            )
        if "weight" not in change.tensors:
            return
        if change.adapted:
            raise AdapterError(
                f"{self._file.path} has {change.tensors['weight']!r} as well as an adapter for "
                f"{change.module!r}; only one of them can be meant"
            )
        if not self._is_base(change, "weight", exactly=True):
            tables.put(
                change.target.kind,
                self._tensor(change, "weight").clone(),
                alone=self._config.saves(change.module),
            )
        else:
            tables.keep(change.target.kind)

    def _is_base(self, change: Change, role: Role, *, exactly: bool = False) -> bool:
        """Whether a table is the model's own, up to how it is rounded.

        `exactly` asks whether the decoder could tell them apart.
        """
        base = self._decoder.read_weight(change.target.name)
        table = self._tensor(change, role, base.dtype)
        if torch.equal(table, base):
            return True
        if exactly:
            return False
        difference = torch.linalg.vector_norm(table.float() - base.float())
        most = _CODED_DIFFERENCE if self._decoder.is_coded(change.target.name) else _DIFFERENCE
        return bool(difference <= most * torch.linalg.vector_norm(base.float()))

    def _check_unchanged(self, change: Change) -> None:
        """Let the unchanged norms pass that ``bias="all"`` saves, and nothing else."""
        for role in ("weight", "bias"):
            if role not in change.tensors:
                continue
            self._decoder.check_whole(f"{change.target.name}.{role}")
            own = self._decoder.weights.get(f"{change.target.name}.{role}")
            new = self._file.tensor(change.tensors[role])
            if (
                own is None
                or new.shape != own.shape
                or not torch.equal(new.to(own.dtype), own.cpu())
            ):
                raise AdapterError(
                    f"{self._file.path} has {change.tensors[role]!r}, which changes "
                    f"{change.module!r}; projections, the embedding of tokens and the output "
                    "matrix can be changed by an adapter, and no other weights or biases"
                )

    # -- tensors ---------------------------------------------------------------------------------

    def _rows(self, change: Change, role: Role, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return a tensor with one row per output, in the decoder's order, as a copy."""
        tensor, order = self._tensor(change, role, dtype), change.target.order
        return tensor.clone() if order is None else tensor[order]

    def _tensor(self, change: Change, role: Role, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return a tensor of the file, which may be a view of what was read."""
        name = change.tensors[role]
        stored = self._file.tensor(name)
        tensor = stored.to(dtype or self._dtype)
        fits = self._largest <= torch.finfo(tensor.dtype).max
        if not fits and not torch.isfinite(tensor).all():
            what = "NaN or infinity"
            if torch.isfinite(stored).all():
                what = f"values too large for {str(tensor.dtype).removeprefix('torch.')}"
            raise AdapterError(f"{self._file.path}: {name!r} has {what}")
        return tensor


class _Tables:
    """What stands in for embedding and output matrix."""

    def __init__(self, tied: bool) -> None:
        self.embed: torch.Tensor | None = None
        self.head: torch.Tensor | None = None
        self._given: set[str] = set()
        self._tied = tied
        self._shared: torch.Tensor | None = None

    def put(self, kind: str, table: torch.Tensor, *, alone: bool) -> None:
        """Take a table; `alone` says that a tied output matrix (or embedding) stays as it was."""
        self._given.add(kind)
        if kind == "embedding":
            self.embed = table
        else:
            self.head = table
        if self._tied and not alone:
            self._shared = table

    def keep(self, kind: str) -> None:
        """Take note that the file has the model's own table."""
        self._given.add(kind)

    def share(self) -> None:
        """Give a table that stands for both to the one of which nothing was said."""
        if self._shared is not None and "embedding" not in self._given:
            self.embed = self._shared.clone()
        if self._shared is not None and "linear" not in self._given:
            self.head = self._shared.clone()


def _span(change: Change) -> tuple[int, int]:
    first = change.target.first_row
    return first, first + change.target.num_rows
