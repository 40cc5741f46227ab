"""The projections of a checkpoint as codes, one after the other, by the way that is asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from quire.converter.folding import fold_into_norm, home_of
from quire.converter.source import Module, Source
from quire.converter.targets import Target
from quire.errors import ModelLoadError
from quire.kernels.quantized import QuantizedWeight
from quire.kernels.reference.quantized import dequantize
from quire.models.layer_walk import LayerWalk, WalkedLayer
from quire.models.linear import Linear
from quire.models.spec import LayerSpec, NormSpec
from quire.models.weights import Weights
from quire.quantization.activation_aware import Found, search
from quire.quantization.error_compensation import round_compensated
from quire.quantization.rounding import Grid, round_fp8, round_int4, round_int8

_CPU = torch.device("cpu")


class Rounds:
    """Makes codes of all projections, with one layer in memory.

    Parameters
    ----------
    source
        The checkpoint.
    target
        What to make of it.
    group_size
        For four bits.
    prompts
        Token ids, where the target looks at inputs.

    Attributes
    ----------
    changed : dict of Tensor
        Other tensors of the checkpoint, by name, that take what was taken out of projections; in
        float32. Complete when `run` is through.
    """

    def __init__(
        self, source: Source, target: Target, group_size: int, prompts: Sequence[Sequence[int]]
    ) -> None:
        self.changed: dict[str, torch.Tensor] = {}
        self._source = source
        self._target = target
        self._prompts = prompts
        self._grid: Grid = target.grid(group_size, source.dtype())

    def run(self) -> Iterator[tuple[Module, QuantizedWeight]]:
        """Yield every projection with its codes, in the order of the layers or of the files.

        Raises
        ------
        ModelLoadError
            A weight has a value that cannot be rounded; the message names it.
        """
        modules = self._source.modules()
        if not self._target.needs_inputs:
            for module in modules:
                yield module, self._round(module, self._weight(module))
            return
        of_linear: dict[str, list[Module]] = {}
        for module in modules:
            of_linear.setdefault(module.linear.name, []).append(module)
        source = self._source
        walk = LayerWalk(source.files, source.family, source.spec, self._prompts)
        for layer, spec in zip(walk.layers(), source.spec.layers, strict=True):
            inside = {linear.name: of_linear[linear.name] for linear in layer.linears}
            if self._target.name == "gptq":
                yield from self._compensated(layer, inside)
            else:
                yield from self._aware(layer, spec, inside)

    def _weight(self, module: Module) -> torch.Tensor:
        return self._source.files.tensor(f"{module.name}.weight")

    def _round(
        self, module: Module, weight: torch.Tensor, found: Found | None = None
    ) -> QuantizedWeight:
        target, scales = self._target, self._grid.scale_dtype
        try:
            if target.name == "fp8":
                made = round_fp8(weight, scales)
            elif target.has_groups:
                factors, importance = found or (None, None)
                made = round_int4(weight, self._grid, factors, importance)
            else:
                made = round_int8(weight, "int8" if target.name == "w8a8" else "float", scales)
        except ModelLoadError as error:
            raise self._named(module, error) from None
        self._source.files.release(f"{module.name}.weight")
        return made

    def _named(self, module: Module, error: ModelLoadError) -> ModelLoadError:
        name = self._source.files.describe(f"{module.name}.weight")
        return ModelLoadError(f"{name} {error}")

    def _compensated(
        self, layer: WalkedLayer, inside: dict[str, list[Module]]
    ) -> Iterator[tuple[Module, QuantizedWeight]]:
        """GPTQ; later layers are given what the rounded ones make."""
        for linear in layer.linears:
            for module in inside[linear.name]:
                try:
                    made = round_compensated(
                        self._weight(module),
                        layer.inputs[linear.name],
                        self._grid,
                        by_importance=self._target.by_importance,
                    )
                except ModelLoadError as error:
                    raise self._named(module, error) from None
                weight = dequantize(made)
                if module.part:
                    layer.replace(linear, module.part, weight)
                else:
                    ordered = weight[_rows_in_order(module)]
                    rows = ordered.split_with_sizes(list(linear.parts.values()))
                    for part, each in zip(linear.parts, rows, strict=True):
                        layer.replace(linear, part, each)
                self._source.files.release(f"{module.name}.weight")
                yield module, made

    def _aware(
        self, layer: WalkedLayer, spec: LayerSpec, inside: dict[str, list[Module]]
    ) -> Iterator[tuple[Module, QuantizedWeight]]:
        """AWQ: factors of inputs go into what makes the inputs, where something can take them."""
        found: dict[str, Found] = {}
        row_factors: dict[str, torch.Tensor] = {}
        for linear in layer.linears:
            home = home_of(linear.name.removeprefix(f"{layer.name}."), spec)
            weights = list(layer.parts(linear).values())
            # One candidate is no factors at all: what remains is how much each input counts.
            candidates = {} if home is not None else {"num_alphas": 1}
            seen = search(weights, layer.inputs[linear.name], self._grid, **candidates)
            found[linear.name] = seen
            if seen.factors is None:
                continue
            if home == "up":
                # Into the rows of "up", which come after those of "gate".
                row_factors[linear.name.removesuffix("down") + "gate_up"] = seen.factors
            elif home is not None:
                self._fold_into_norm(f"{layer.name}.{home}", getattr(spec, home), seen.factors)
        for linear in layer.linears:
            for module in inside[linear.name]:
                weight = self._weight(module)
                rows = _factors_of_rows(module, linear, row_factors.get(linear.name))
                if rows is not None:
                    weight = weight.float() * rows[:, None]
                    self._fold_into_bias(module, rows)
                made = self._round(module, weight, found[linear.name])
                yield module, _without_factors(made)

    def _fold_into_norm(self, norm: str, spec: NormSpec, factors: torch.Tensor) -> None:
        for name, place in self._source.places.items():
            module, _, kind = place.parameter.rpartition(".")
            if module == norm:
                tensor = self._source.files.tensor(name)
                self.changed[name] = fold_into_norm(kind, tensor, factors, spec)

    def _fold_into_bias(self, module: Module, rows: torch.Tensor) -> None:
        name = f"{module.name}.bias"
        if name in self._source.places:
            self.changed[name] = self._source.files.tensor(name).float() * rows


def _without_factors(weight: QuantizedWeight) -> QuantizedWeight:
    return replace(weight, input_factors=None)


def _factors_of_rows(
    module: Module, linear: Linear, factors: torch.Tensor | None
) -> torch.Tensor | None:
    """Factors of a module's rows, of which those of the part "up" have some."""
    if factors is None or module.part == "gate":
        return None
    if module.part == "up":
        return factors
    return torch.cat((torch.ones(linear.parts["gate"]), factors))


def _rows_in_order(module: Module) -> torch.Tensor:
    """Which of a whole module's rows is each of the decoder's projection."""
    linear = module.linear
    weights = Weights(_CPU, torch.float64)
    rows = (linear.out_features, 1)
    weights.create("rows", rows, parts=linear.parts, groups=linear.groups)
    numbers = torch.arange(linear.out_features, dtype=torch.float64)[:, None]
    weights.fill("rows", "", module.layout, numbers)
    return weights["rows"][:, 0].long()
