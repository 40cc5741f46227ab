"""LayerWalk: a checkpoint's layers run one after the other, with one in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from quire.errors import ConfigError, ModelLoadError
from quire.kernels.reference.backend import ReferenceBackend
from quire.models.family import Family, Place
from quire.models.layers import KVCache, Step, bind_layer, create_layer, layer_linears
from quire.models.linear import Apply, Linear, WeightMethod
from quire.models.rotary import RotaryTable
from quire.models.spec import DecoderSpec
from quire.models.tensor_files import TensorFiles
from quire.models.weights import Weights

if TYPE_CHECKING:
    from quire.kernels import Backend

_BLOCK_SIZE = 16
MOST_PER_PROMPT = 512
"""Tokens that are taken of a prompt, at most."""

_MOST_TOKENS = 4096
"""What activations are kept of at once: a few hundred megabytes in the largest models."""

_CPU = torch.device("cpu")


@dataclass
class WalkedLayer:
    """One layer, and what its projections were given.

    Attributes
    ----------
    name
        The decoder's: ``layers.0``.
    linears
        Its projections.
    weights
        Its parameters in float32.
    inputs : mapping of Tensor[num_tokens, in_features], float32
        By projection's name. Of an expert, the tokens that chose it: perhaps none.
    replaced
        Whether weights are no longer the checkpoint's.
    """

    name: str
    linears: Sequence[Linear]
    weights: Weights
    inputs: Mapping[str, torch.Tensor]
    replaced: bool = False

    def parts(self, linear: Linear) -> dict[str, torch.Tensor]:
        """Return the weights ``[out_features, in_features]`` of a projection's parts, as views."""
        weight = self.weights[f"{linear.name}.weight"]
        rows = weight.split_with_sizes(list(linear.parts.values()))
        return dict(zip(linear.parts, rows, strict=True))

    def replace(self, linear: Linear, part: str, weight: torch.Tensor) -> None:
        """Put another weight into a part of a projection: later layers are run with it."""
        self.parts(linear)[part].copy_(weight)
        self.replaced = True


class LayerWalk:
    """A model run on some prompts in float32, layer by layer, as it is read from its files.

    Parameters
    ----------
    files
        Plain weights, of any floating-point type.
    family, spec
        See `quire.models.registry`.
    prompts
        Token ids. Of each the first 512 are taken, and 4096 of all together.

    Raises
    ------
    ConfigError
        There is no prompt, or one has an id that the model lacks.
    """

    def __init__(
        self,
        files: TensorFiles,
        family: Family,
        spec: DecoderSpec,
        prompts: Sequence[Sequence[int]],
    ) -> None:
        self._files = files
        self._spec = spec
        self._places: dict[str, list[tuple[str, Place]]] = {}
        for name in files.names():
            if (place := family.place(name)) is not None:
                self._places.setdefault(place.parameter, []).append((name, place))
        self._kernels: Backend = ReferenceBackend()
        self._lengths = _lengths(prompts, spec)
        ids = [token for each, n in zip(prompts, self._lengths, strict=False) for token in each[:n]]
        self._ids = torch.tensor(ids, dtype=torch.int64)

    def layers(self) -> Iterator[WalkedLayer]:
        """Run layer after layer.

        A layer whose weights were replaced while it was given out is run once more with these.

        Raises
        ------
        ModelLoadError
            A tensor is missing or does not fit.
        """
        lengths = torch.tensor(self._lengths, dtype=torch.int32)
        positions = torch.cat([torch.arange(n) for n in self._lengths])
        starts = torch.zeros(len(lengths) + 1, dtype=torch.int32)
        torch.cumsum(lengths, 0, out=starts[1:])
        counts = (lengths + _BLOCK_SIZE - 1) // _BLOCK_SIZE
        tables = torch.zeros(len(lengths), int(counts.max()), dtype=torch.int32)
        slots, next_block = [], 1
        for row, (length, count) in enumerate(zip(self._lengths, counts.tolist(), strict=True)):
            tables[row, :count] = torch.arange(next_block, next_block + count)
            slots.append(torch.arange(length) + next_block * _BLOCK_SIZE)
            next_block += count
        plan = self._kernels.plan_attention(starts, lengths, tables, _BLOCK_SIZE)
        step = Step(torch.cat(slots), plan, [])
        x = self._embed(positions)
        residual: torch.Tensor | None = None
        for index, layer in enumerate(self._spec.layers):
            name = f"layers.{index}"
            weights = Weights(_CPU, torch.float32)
            create_layer(name, layer, self._spec.hidden_size, WeightMethod(), weights)
            self._fill(weights)
            step.rotary = []
            rotary = layer.attention.rotary
            if rotary is not None:
                table = RotaryTable(rotary, _CPU)
                step.rotary = [table.lookup(positions, max(self._lengths))]
            recorder = _Recorder()
            run = bind_layer(
                name,
                layer,
                self._spec.hidden_size,
                None if rotary is None else 0,
                recorder,
                weights,
                self._kernels,
            )
            shape = (
                next_block,
                _BLOCK_SIZE,
                layer.attention.num_kv_heads,
                layer.attention.head_dim,
            )
            cache: KVCache = (torch.zeros(shape), torch.zeros(shape))
            # A fused norm may write to what it is given.
            old = x.clone(), None if residual is None else residual.clone()
            x, residual = run(x, residual, step, cache)
            if not x.isfinite().all():
                raise ModelLoadError(
                    f"the model in {self._files.folder} gives values that are not finite in "
                    f"{name}, on the texts that it was run on: its weights may be damaged"
                )
            linears = layer_linears(name, layer, self._spec.hidden_size)
            for linear in linears:  # experts that no token chose were given nothing
                recorder.inputs.setdefault(linear.name, torch.empty(0, linear.in_features))
            walked = WalkedLayer(name, linears, weights, recorder.inputs)
            yield walked
            if walked.replaced:
                x, residual = run(*old, step, cache)

    def _embed(self, positions: torch.Tensor) -> torch.Tensor:
        spec = self._spec
        source = "embed.weight" if "embed.weight" in self._places else "lm_head.weight"
        x = self._read(source)[self._ids].float()
        if spec.embedding_scale is not None:
            x = x * spec.embedding_scale
        if "project_in.weight" in self._places:
            x = x @ self._read("project_in.weight").float().T
        if spec.learned_positions is not None:
            table = self._read("embed_positions.weight")
            x = x + table[positions + spec.learned_positions.offset].float()
        return x

    def _read(self, parameter: str) -> torch.Tensor:
        for name, _ in self._places.get(parameter, []):
            return self._files.tensor(name)
        raise ModelLoadError(f"{self._files.folder} has no tensor for {parameter}")

    def _fill(self, weights: Weights) -> None:
        for parameter in weights.names():
            for name, place in self._places.get(parameter, []):
                try:
                    weights.fill(*place, self._files.tensor(name))
                except ModelLoadError as error:
                    raise ModelLoadError(f"{self._files.describe(name)} {error}") from None
                self._files.release(name)
        if missing := weights.missing():
            raise ModelLoadError(
                f"{self._files.folder} has no tensor for {' '.join(missing[0]).strip()}"
            )


class _Recorder(WeightMethod):
    """Dense projections that keep what they are given."""

    def __init__(self) -> None:
        self.inputs: dict[str, torch.Tensor] = {}

    def bind(self, linear: Linear, weights: Weights, kernels: Backend) -> Apply:
        apply = super().bind(linear, weights, kernels)

        def record(x: torch.Tensor) -> torch.Tensor:
            self.inputs[linear.name] = x.clone()
            return apply(x)

        return record


def _lengths(prompts: Sequence[Sequence[int]], spec: DecoderSpec) -> list[int]:
    """How many tokens of each prompt are taken; of those at the end perhaps none."""
    most = min(MOST_PER_PROMPT, spec.max_position)
    lengths: list[int] = []
    for prompt in prompts:
        for token in prompt:
            if not 0 <= token < spec.vocab_size:
                raise ConfigError(
                    f"calibration has the token id {token}; the model's are from 0 to "
                    f"{spec.vocab_size - 1}"
                )
        if not prompt:
            raise ConfigError("calibration has a prompt without tokens; each must have one")
        length = min(len(prompt), most, _MOST_TOKENS - sum(lengths))
        if length < 1:
            break
        lengths.append(length)
    if not lengths:
        raise ConfigError("calibration has no prompt; at least one is needed")
    return lengths
