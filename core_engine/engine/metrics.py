"""EngineMetrics: what an engine has done since it started."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class EngineMetrics:
    """Counters; times are in seconds.

    Attributes
    ----------
    num_requests, num_failed_requests : int
    num_prompt_tokens : int
        Tokens of the prompts that were scheduled; ``num_cached_tokens`` of them were found in the
        prefix cache.
    num_generation_tokens : int
    num_computed_tokens : int
        Tokens that went through the model, recomputation included.
    num_forced_tokens, num_accepted_forced_tokens : int
        Tokens that a grammar forces and a step computed as drafts; those that were generated.
    num_canonical_tokens : int
        Tokens of forced text that the model was not asked for.
    num_preemptions : int
    num_swapped_out, num_swapped_in : int
        Blocks of preempted sequences that were copied to the host's memory, and back.
    num_adapter_swaps : int
        Times that an adapter was put into one of the model's slots.
    num_restarts : int
        Times that a step broke down, and everything in flight ended with it.
    num_steps : int
    step_seconds, forward_seconds : float
        Time spent in steps, and the model's part of it.
    """

    num_requests: int = 0
    num_failed_requests: int = 0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_generation_tokens: int = 0
    num_computed_tokens: int = 0
    num_forced_tokens: int = 0
    num_accepted_forced_tokens: int = 0
    num_canonical_tokens: int = 0
    num_preemptions: int = 0
    num_swapped_out: int = 0
    num_swapped_in: int = 0
    num_adapter_swaps: int = 0
    num_restarts: int = 0
    num_steps: int = 0
    step_seconds: float = 0.0
    forward_seconds: float = 0.0
