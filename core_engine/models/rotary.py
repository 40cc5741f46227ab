"""Rotary position embedding: a configuration's words to frequencies, and the tables of a run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from quire.errors import ModelLoadError, UnsupportedModelError
from quire.models.spec import RotarySpec

_FIRST_ROWS = 2048


class RotaryTable:
    """Cosines and sines of every position so far asked for, in float32.

    Rows are added when a longer sequence comes: a model that could reach 131,072 positions does
    not pay for them before it does.

    Parameters
    ----------
    spec
        Frequencies and magnitude.
    device
        Where the table lies.
    """

    def __init__(self, spec: RotarySpec, device: torch.device) -> None:
        self._inv_freq = torch.tensor(spec.inv_freq, dtype=torch.float32, device=device)
        self._magnitude = spec.magnitude
        self._cos = self._sin = torch.empty(
            0, len(spec.inv_freq), dtype=torch.float32, device=device
        )
        self._grow(_FIRST_ROWS)

    def lookup(self, positions: torch.Tensor, max_length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cosine and sine, ``[num_tokens, rotated_dims / 2]``, of each position.

        `positions` is ``[num_tokens]``, int64.
        `max_length` is more than every position; it is known on the host, so that no device has
        to be waited for.
        """
        cos, sin = self.reserve(max_length)
        return cos.index_select(0, positions), sin.index_select(0, positions)

    def reserve(self, max_length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the tables, ``[num_positions, rotated_dims / 2]``, with that many rows at least.

        Rows once there stay where they are until more are asked for.
        """
        if max_length > self._cos.shape[0]:
            self._grow(max_length)
        return self._cos, self._sin

    def _grow(self, num_rows: int) -> None:
        have = self._cos.shape[0]
        num_rows = max(num_rows, 2 * have)
        positions = torch.arange(have, num_rows, dtype=torch.float32, device=self._cos.device)
        angles = torch.outer(positions, self._inv_freq)
        self._cos = torch.cat((self._cos, angles.cos() * self._magnitude))
        self._sin = torch.cat((self._sin, angles.sin() * self._magnitude))


def rotary_spec(
    parameters: Mapping[str, Any],
    *,
    head_dim: int,
    max_position: int,
    max_model_len: int | None = None,
) -> RotarySpec:
    """Work out the frequencies that a configuration describes.

    Parameters
    ----------
    parameters
        ``rope_theta``, ``rope_type``, ``partial_rotary_factor`` and what the type needs, as
        `quire.models.hf_config.rope_parameters` returns them.
    head_dim
        Dimensions of a head, of which ``partial_rotary_factor`` is rotated.
    max_position
        The configuration's ``max_position_embeddings``.
    max_model_len
        The longest sequence this engine will serve; None: `max_position`. The types "longrope" and
        "dynamic" choose by the length of a sequence. Here they choose once, by this length: a key
        in the cache must not change its meaning as its sequence grows.

    Raises
    ------
    UnsupportedModelError
        An unknown ``rope_type``.
    ModelLoadError
        A value is missing or makes no sense.
    """
    rope_type = parameters.get("rope_type", "default")
    make = _TYPES.get(rope_type)
    if make is None:
        raise UnsupportedModelError(
            f"the rotary embedding type {rope_type!r} (rope_scaling in config.json) is not "
            f"supported; supported are: {', '.join(_TYPES)}"
        )
    dim = int(head_dim * parameters.get("partial_rotary_factor", 1.0))
    if dim < 2 or dim % 2 or dim > head_dim:
        raise ModelLoadError(
            f"partial_rotary_factor {parameters.get('partial_rotary_factor')!r} of a head of "
            f"{head_dim} dimensions rotates {dim}; it must be an even number of them"
        )
    try:
        inv_freq, magnitude = make(parameters, dim, max_position, max_model_len or max_position)
    except KeyError as error:
        raise ModelLoadError(
            f"the rotary embedding type {rope_type!r} in config.json lacks {error.args[0]!r}"
        ) from None
    if inv_freq.shape != (dim // 2,):
        raise ModelLoadError(
            f"the rotary embedding type {rope_type!r} in config.json has factors for "
            f"{inv_freq.numel()} frequencies; the heads have {dim // 2}"
        )
    return RotarySpec(tuple(inv_freq.tolist()), magnitude)


_Made = tuple[torch.Tensor, float]


def _frequencies(theta: float, dim: int) -> torch.Tensor:
    exponents = torch.arange(0, dim, 2, dtype=torch.int64).float() / dim
    frequencies: torch.Tensor = 1.0 / (theta**exponents)
    return frequencies


def _default(parameters: Mapping[str, Any], dim: int, _position: int, _length: int) -> _Made:
    return _frequencies(parameters["rope_theta"], dim), 1.0


def _linear(parameters: Mapping[str, Any], dim: int, _position: int, _length: int) -> _Made:
    # Position interpolation, Chen et al., arXiv:2306.15595.
    return _frequencies(parameters["rope_theta"], dim) / parameters["factor"], 1.0


def _dynamic(parameters: Mapping[str, Any], dim: int, max_position: int, length: int) -> _Made:
    # "Dynamic NTK": a larger base for sequences past the trained length.
    factor = parameters["factor"]
    stretch = factor * max(length, max_position) / max_position - (factor - 1)
    return _frequencies(parameters["rope_theta"] * stretch ** (dim / (dim - 2)), dim), 1.0


def _llama3(parameters: Mapping[str, Any], dim: int, _position: int, _length: int) -> _Made:
    # Llama 3.1: long waves are slowed by `factor`, short ones kept, those between blended.
    frequencies = _frequencies(parameters["rope_theta"], dim)
    factor, low = parameters["factor"], parameters["low_freq_factor"]
    high, trained = parameters["high_freq_factor"], parameters["original_max_position_embeddings"]
    waves_in_trained = trained * frequencies / (2 * math.pi)
    blend = ((waves_in_trained - low) / (high - low)).clamp(0, 1)
    return (1 - blend) * frequencies / factor + blend * frequencies, 1.0


def _yarn(parameters: Mapping[str, Any], dim: int, max_position: int, _length: int) -> _Made:
    # Peng et al., arXiv:2309.00071.
    theta, trained = parameters["rope_theta"], parameters["original_max_position_embeddings"]
    factor = parameters.get("factor") or max_position / trained
    magnitude = parameters.get("attention_factor")
    if magnitude is None:
        mscale, mscale_all = parameters.get("mscale"), parameters.get("mscale_all_dim")
        if mscale and mscale_all:
            magnitude = _yarn_magnitude(factor, mscale) / _yarn_magnitude(factor, mscale_all)
        else:
            magnitude = _yarn_magnitude(factor, 1.0)

    def dimension_of(num_rotations: float) -> float:
        turns = math.log(trained / (num_rotations * 2 * math.pi))
        return dim * turns / (2 * math.log(theta))

    first = dimension_of(parameters.get("beta_fast") or 32)
    last = dimension_of(parameters.get("beta_slow") or 1)
    if parameters.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    span = last - first or 0.001
    slowed = ((torch.arange(dim // 2, dtype=torch.float32) - first) / span).clamp(0, 1)
    frequencies = _frequencies(theta, dim)
    return frequencies / factor * slowed + frequencies * (1 - slowed), float(magnitude)


def _yarn_magnitude(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _longrope(parameters: Mapping[str, Any], dim: int, max_position: int, length: int) -> _Made:
    # Ding et al., arXiv:2402.13753.
    trained = parameters["original_max_position_embeddings"]
    factor = parameters.get("factor") or max_position / trained
    magnitude = parameters.get("attention_factor")
    if magnitude is None:
        magnitude = math.sqrt(1 + math.log(factor) / math.log(trained)) if factor > 1 else 1.0
    factors = parameters["long_factor" if length > trained else "short_factor"]
    exponents = torch.arange(0, dim, 2, dtype=torch.int64).float() / dim
    scale = torch.tensor(factors, dtype=torch.float32)
    if scale.shape != exponents.shape:
        return scale, 1.0
    return 1.0 / (scale * parameters["rope_theta"] ** exponents), float(magnitude)


_TYPES: dict[str, Callable[[Mapping[str, Any], int, int, int], _Made]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}
