"""Plan: what an adapter's tensors change in a model, checked by their names, shapes and types.

Nothing here reads a number: whatever a file claims is compared with the model before memory is
taken for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from quire.errors import AdapterError
from quire.lora.config import MERGE, AdapterConfig
from quire.lora.names import Role, by_module
from quire.lora.targets import Target, Targets
from quire.models.mlp import is_expert
from quire.models.safetensors_file import Entry

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_SHOWN = 4
_TABLES: tuple[Role, ...] = ("weight", "base_layer.weight")


@dataclass(frozen=True, slots=True)
class Change:
    """What the tensors of one module change.

    Attributes
    ----------
    module
        As the checkpoint calls it.
    target
        Where it is in the decoder.
    tensors
        Role -> name in the file.
    rank, scale
        Of the product of its matrices, where it has them.
    """

    module: str
    target: Target
    tensors: Mapping[Role, str]
    rank: int = 0
    scale: float = 0.0

    @property
    def adapted(self) -> bool:
        """Whether it has the matrices of an adapter."""
        return self.rank > 0


class Plan:
    """The changes that one file asks for.

    Parameters
    ----------
    path, entries
        The file and its tensors.
    config
        The adapter's configuration.
    targets
        The model.
    max_rank
        The largest rank that there is room for.
    ignored
        Tensors to leave out.

    Attributes
    ----------
    changes : list of Change

    Raises
    ------
    AdapterError
        It does not fit the model, the configuration, or itself.
    """

    def __init__(
        self,
        path: Path,
        entries: Mapping[str, Entry],
        config: AdapterConfig,
        targets: Targets,
        max_rank: int,
        ignored: Iterable[str] = (),
    ) -> None:
        self._path = path
        self._entries = entries
        self._config = config
        self._targets = targets
        left_out = set(ignored)
        modules = by_module((name for name in entries if name not in left_out), path)
        if not modules:
            raise AdapterError(f"{path} has no tensors; the adapter would change nothing")
        self.changes = [self._change(*each) for each in self._placed(modules)]
        self._check_twice()
        self._check_rank(max_rank)
        self._check_complete()

    def _placed(
        self, modules: Mapping[str, Mapping[Role, str]]
    ) -> list[tuple[str, Target, Mapping[Role, str]]]:
        found = [(module, self._targets.find(module), roles) for module, roles in modules.items()]
        unknown = [module for module, target, _ in found if target is None]
        if unknown:
            saved = [module for module in unknown if self._config.saves(module)]
            hint = f" (modules_to_save has {saved[0]!r:.200})" if saved else ""
            raise AdapterError(
                f"{self._path} has tensors for {_listed(unknown)}{hint}; the model has no such "
                f"modules, the nearest to the first is {self._targets.nearest(unknown[0])!r}. Was "
                "the adapter made for another model?"
            )
        return [(module, target, roles) for module, target, roles in found if target is not None]

    def _change(self, module: str, target: Target, roles: Mapping[Role, str]) -> Change:
        for name in roles.values():
            entry = self._entries[name]
            if entry.dtype not in _DTYPES:
                raise AdapterError(
                    f"{self._path}: {name!r} has the dtype {_dtype(entry.dtype)}; an adapter's "
                    "tensors must be float16, bfloat16, float32 or float64"
                )
        if is_expert(target.name):
            name = next(iter(roles.values()))
            raise AdapterError(
                f"{self._path} has {name!r}, which changes {module!r}; single experts of a mixture "
                f"cannot be changed by an adapter, attention and shared experts can. {MERGE}"
            )
        if target.kind == "other":
            self._check_roles(module, roles, ("weight", "bias"))
            return Change(module, target, roles)
        if target.kind == "embedding":
            return self._embedding(module, target, roles)
        return self._linear(module, target, roles)

    def _linear(self, module: str, target: Target, roles: Mapping[Role, str]) -> Change:
        rows, columns = target.num_rows, target.in_features
        allowed: tuple[Role, ...] = ("A", "B", "B.bias", "magnitude", "bias")
        if target.name == "lm_head":
            allowed += _TABLES
        self._check_roles(module, roles, allowed)
        if "bias" in roles:
            if not self._targets.linears[target.name].bias:
                raise AdapterError(
                    f"{self._path} has {roles['bias']!r}; the model has no bias there"
                )
            self._check_shape(roles["bias"], (rows,), module, target)
        for role in _TABLES:
            if role in roles:
                self._check_table(roles[role])
        if not {"A", "B", "B.bias", "magnitude"} & roles.keys():
            return Change(module, target, roles)
        self._check_pair(module, roles, "A", "B")
        self._check_together(module, roles, "B.bias", "lora_bias", self._config.lora_bias)
        self._check_together(module, roles, "magnitude", "use_dora", self._config.use_dora)
        rank = self._rank(module, roles["A"], 0)
        self._check_shape(roles["A"], (rank, columns), module, target)
        self._check_shape(roles["B"], (rows, rank), module, target)
        for role in ("B.bias", "magnitude"):
            if role in roles:
                self._check_shape(roles[role], (rows,), module, target)
        return Change(module, target, roles, rank, self._config.scale(module))

    def _embedding(self, module: str, target: Target, roles: Mapping[Role, str]) -> Change:
        if "magnitude" in roles:
            raise AdapterError(
                f"{self._path} has {roles['magnitude']!r}; use_dora is supported for projections, "
                f"not for the embedding: {MERGE}"
            )
        self._check_roles(module, roles, ("embedding_A", "embedding_B", *_TABLES))
        for role in _TABLES:
            if role in roles:
                self._check_table(roles[role])
        if not {"embedding_A", "embedding_B"} & roles.keys():
            return Change(module, target, roles)
        self._check_pair(module, roles, "embedding_A", "embedding_B")
        if self._config.use_dora or self._config.lora_bias:
            field = "use_dora" if self._config.use_dora else "lora_bias"
            raise AdapterError(
                f"{field} in {self._config.path} is true; it is not supported for the embedding "
                f"{module!r}: {MERGE}"
            )
        rank = self._rank(module, roles["embedding_A"], 0)
        self._check_shape(roles["embedding_A"], (rank, target.num_rows), module, target)
        self._check_shape(roles["embedding_B"], (target.in_features, rank), module, target)
        return Change(module, target, roles, rank, self._config.scale(module))

    # -- the parts of one module -----------------------------------------------------------------

    def _check_roles(
        self, module: str, roles: Mapping[Role, str], allowed: tuple[Role, ...]
    ) -> None:
        for role, name in roles.items():
            if role in allowed:
                continue
            if role == "weight":
                why = "of whole modules (modules_to_save), only embedding and output matrix can be"
            elif role in ("embedding_A", "embedding_B"):
                why = "of embeddings, only that of the tokens can be"
            else:
                why = "projections, the embedding of tokens and the output matrix can be"
            raise AdapterError(
                f"{self._path} has {name!r}, which changes {module!r}; {why} changed by an "
                f"adapter. For others: {MERGE}"
            )

    def _check_pair(self, module: str, roles: Mapping[Role, str], a: Role, b: Role) -> None:
        for role, other in ((a, b), (b, a)):
            if role not in roles:
                have = roles.get(other) or next(iter(roles.values()))
                raise AdapterError(
                    f"{self._path} has {have!r}, but no lora_{role} of {module!r}: the file is "
                    "incomplete"
                )

    def _check_together(
        self, module: str, roles: Mapping[Role, str], role: Role, field: str, asked: bool
    ) -> None:
        if (role in roles) == asked:
            return
        has = f"has {roles[role]!r}" if role in roles else f"lacks what goes with it for {module!r}"
        raise AdapterError(
            f"{field} in {self._config.path} is {str(asked).lower()}, but {self._path} {has}"
        )

    def _rank(self, module: str, name: str, axis: int) -> int:
        shape, expected = self._entries[name].shape, self._config.rank(module)
        if len(shape) == 2 and shape[axis] != expected:
            raise AdapterError(
                f"{self._path}: {name!r} has the shape {list(shape)}, so a rank of {shape[axis]}; "
                f"r (or rank_pattern) in {self._config.path} says {expected}"
            )
        return expected

    def _check_shape(
        self, name: str, expected: tuple[int, ...], module: str, target: Target
    ) -> None:
        shape = self._entries[name].shape
        if shape == expected:
            return
        base = [target.num_rows, target.in_features]
        hint = ""
        if len(shape) != len(expected) or 0 in shape:
            hint = ". Was it saved by one of several processes, without gathering its parts?"
        raise AdapterError(
            f"{self._path}: {name!r} has the shape {list(shape)}; the model's {module!r} has "
            f"{base}, so it must have {list(expected)}{hint}"
        )

    def _check_table(self, name: str) -> None:
        shape = self._entries[name].shape
        rows, columns = self._targets.linears["lm_head"].out_features, self._targets.width
        if shape == (rows, columns):
            return
        if len(shape) == 2 and shape[1] == columns:
            raise AdapterError(
                f"{self._path}: {name!r} has {shape[0]} rows; the model's vocabulary has {rows}. "
                "An adapter cannot resize it: with peft, resize the model's embedding, merge the "
                "adapter into it, save that, and load it as the model"
            )
        raise AdapterError(
            f"{self._path}: {name!r} has the shape {list(shape)}; the model's has {[rows, columns]}"
        )

    # -- all modules -----------------------------------------------------------------------------

    def _check_twice(self) -> None:
        seen: dict[tuple[str, int], str] = {}
        for change in self.changes:
            key = change.target.key
            if key in seen and change.target.kind != "other":
                raise AdapterError(
                    f"{self._path} has tensors for {seen[key]!r} and for {change.module!r}, which "
                    "are the same module"
                )
            seen[key] = change.module

    def _check_rank(self, max_rank: int) -> None:
        largest = max(self.changes, key=lambda change: change.rank)
        if largest.rank > max_rank:
            raise AdapterError(
                f"the adapter's rank is {largest.rank} ({largest.module!r} in {self._path}), and "
                f"max_lora_rank is {max_rank}; max_lora_rank={largest.rank} makes room for it"
            )

    def _check_complete(self) -> None:
        config = self._config
        tied = config.ensure_weight_tying and self._targets.tied
        adapted = {change.target.key for change in self.changes if change.adapted}
        saved = {change.target.key for change in self.changes if "weight" in change.tensors}
        for change in self.changes:
            output = change.target.name == "lm_head"
            if not change.adapted or (output and tied):
                continue
            if config.targets(change.module, output=output) is False:
                raise AdapterError(
                    f"{self._path} has tensors for {change.module!r}, which target_modules, "
                    f"exclude_modules or modules_to_save in {config.path} leave out: file and "
                    "configuration contradict each other"
                )
        tables = {("embed", 0), ("lm_head", 0)}
        if tied and (len(tables & adapted) == 1 or len(tables & saved) == 1):
            raise AdapterError(
                f"ensure_weight_tying in {config.path} is true, and the model's embedding and "
                f"output matrix (lm_head) are one; {self._path} has tensors for one of them alone: "
                "the file is incomplete"
            )
        # The same modules may be called with or without their model's prefix.
        layered = [change.module for change in self.changes if "." in change.module]
        prefix = self._targets.prefix_of(layered[0]) if layered else None
        for module in self._targets.modules(prefix):
            target = self._targets.find(module)
            if target is None:
                continue
            output = target.name == "lm_head"
            targeted = target.kind != "other" and config.targets(module, output=output)
            if targeted and target.key not in adapted:
                raise self._incomplete("target_modules", module)
            if config.saves(module) and target.key not in saved and target.kind != "other":
                raise self._incomplete("modules_to_save", module)

    def _incomplete(self, field: str, module: str) -> AdapterError:
        there = [change.module for change in self.changes]
        return AdapterError(
            f"{field} in {self._config.path} asks for {module!r}, and {self._path} has no tensors "
            f"for it, but for {_listed(there)}: the file is incomplete"
        )


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name)[:200] for name in names[:_SHOWN])
    return f"{shown} and {len(names) - _SHOWN} more" if len(names) > _SHOWN else shown


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
