"""Samplers of Outlines' 0.x API: names for settings that the engine samples by itself.

They are made without a model and handed to what :mod:`quire.integrations.outlines.generate` makes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from quire.utils.checks import integer, number, refuse


@dataclass(frozen=True)
class SamplingParameters:
    """What a sampler stands for.

    Attributes
    ----------
    sampler : {"greedy", "multinomial", "beam_search"}
    num_samples : int
        Completions per prompt.
    top_p : float or None
    top_k : int or None
    temperature : float or None
        None leaves it as it is.
    """

    sampler: str
    num_samples: int = 1
    top_p: float | None = None
    top_k: int | None = None
    temperature: float | None = None


class Sampler(Protocol):
    """Anything that says by what settings to sample."""

    @property
    def sampling_params(self) -> SamplingParameters:
        """What it stands for."""
        ...


class GreedySampler:
    """Take the most likely token each time: temperature 0.

    Attributes
    ----------
    samples : int
        Always 1: another would be the same.
    """

    def __init__(self) -> None:
        self.samples = 1

    @property
    def sampling_params(self) -> SamplingParameters:
        """What it stands for."""
        return SamplingParameters("greedy", 1, None, None, 0.0)

    def __repr__(self) -> str:
        return "greedy()"


class MultinomialSampler:
    """Draw each token from the model's distribution.

    Parameters
    ----------
    samples : int, default 1
        Completions per prompt.
    top_k : int, optional
        Draw from this many most likely tokens, at least 1.
    top_p : float, optional
        In (0, 1]. Draw from the fewest most likely tokens whose probabilities reach this sum.
    temperature : float, optional
        Greater than 0; 1.0 if left out. For 0 there is :class:`GreedySampler`.

    Raises
    ------
    InvalidRequestError
        A value out of its range; it is a ValueError.
    """

    def __init__(
        self,
        samples: int = 1,
        *,
        top_k: int | None = None,
        top_p: float | None = None,
        temperature: float | None = None,
    ) -> None:
        self.samples = integer("samples", samples, "an integer >= 1", 1)
        self.top_k = top_k
        if top_k is not None:
            self.top_k = integer("top_k", top_k, "an integer >= 1", 1)
        self.top_p = top_p
        if top_p is not None:
            self.top_p = number("top_p", top_p, "a number in (0, 1]", lambda x: 0.0 < x <= 1.0)
        self.temperature = temperature
        if temperature is not None:
            expected = "a number > 0 (for 0 there is samplers.greedy())"
            self.temperature = number("temperature", temperature, expected, lambda x: x > 0.0)

    @property
    def sampling_params(self) -> SamplingParameters:
        """What it stands for."""
        return SamplingParameters(
            "multinomial", self.samples, self.top_p, self.top_k, self.temperature
        )

    def __repr__(self) -> str:
        given = [f"samples={self.samples}"]
        for name in ("top_k", "top_p", "temperature"):
            if getattr(self, name) is not None:
                given.append(f"{name}={getattr(self, name)}")
        return f"multinomial({', '.join(given)})"


class BeamSearchSampler:
    """Search for the likeliest completions.

    Parameters
    ----------
    beams : int, default 1
        Beams that are followed and completions that are returned, best first. One beam is the
        greedy choice.

    Attributes
    ----------
    samples : int
        The same number.
    """

    def __init__(self, beams: int = 1) -> None:
        self.samples = integer("beams", beams, "an integer >= 1", 1)

    @property
    def sampling_params(self) -> SamplingParameters:
        """What it stands for."""
        return SamplingParameters("beam_search", self.samples, None, None, None)

    def __repr__(self) -> str:
        return f"beam_search({self.samples})"


greedy = GreedySampler
multinomial = MultinomialSampler
beam_search = BeamSearchSampler


def parameters_of(sampler: Any) -> SamplingParameters:
    """Return what a sampler stands for; None is :class:`MultinomialSampler`.

    Raises
    ------
    InvalidRequestError
        For what is no sampler, and for a sampler's class.
    """
    if sampler is None:
        return MultinomialSampler().sampling_params
    found = None if isinstance(sampler, type) else getattr(sampler, "sampling_params", None)
    if not isinstance(found, SamplingParameters):
        raise refuse(
            "sampler", sampler, "samplers.greedy(), multinomial(...) or beam_search(...), or None"
        )
    return found
