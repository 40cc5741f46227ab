"""StepRunner: one step from its plan to what the model says, and on to the sequences' tokens."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from quire.engine.generation import Generation, StepNews
from quire.engine.prompt_reader import read_prompts
from quire.engine.runner import is_device_lost
from quire.engine.step import Step
from quire.errors import DeviceLostError
from quire.sampling.logprobs import LogprobsTensors
from quire.sampling.sampler import SamplerOutput

if TYPE_CHECKING:
    from quire.engine.adapter_slots import AdapterSlots
    from quire.engine.constraints import RequestConstraints
    from quire.engine.host_blocks import HostBlocks
    from quire.engine.live_request import LiveRequest
    from quire.engine.metrics import EngineMetrics
    from quire.engine.runner import Runner
    from quire.engine.running import RunningSequences
    from quire.engine.step_plan import StepPlan
    from quire.engine.token_logprobs import TokenLogprobsMaker
    from quire.sampling.sampler import Sampler


class StepRunner:
    """Runs the parts of an engine's steps, which may overlap.

    :meth:`launch` has the model compute a step, :meth:`go_on` has tokens chosen by what comes of
    it, and :meth:`collect` gives them to the sequences. A step whose tokens can be chosen without
    the host seeing the logits is *in flight* after `go_on`: the next one may be launched, with
    tokens that only the device knows, before it is collected. Any other step, and every one where
    ``overlaps`` is False, is collected by `go_on`.

    Parameters
    ----------
    runner : Runner
    running : RunningSequences
    sampler : Sampler
    generation : Generation
    constraints : RequestConstraints
    logprobs : TokenLogprobsMaker
    slots : AdapterSlots or None
    requests : mapping of str to LiveRequest
        The engine's own, which changes.
    metrics : EngineMetrics
        Counted up.
    overlaps : bool
    """

    def __init__(
        self,
        runner: Runner,
        running: RunningSequences,
        sampler: Sampler,
        generation: Generation,
        constraints: RequestConstraints,
        logprobs: TokenLogprobsMaker,
        slots: AdapterSlots | None,
        requests: Mapping[str, LiveRequest],
        metrics: EngineMetrics,
        *,
        overlaps: bool,
    ) -> None:
        self._runner: Runner | None = runner
        self._running = running
        self._sampler = sampler
        self._generation = generation
        self._constraints = constraints
        self._logprobs = logprobs
        self._slots = slots
        self._requests = requests
        self._metrics = metrics
        self._overlaps = overlaps

    # No local name for the runner: a processor's exception keeps these frames with their locals.

    def close(self) -> None:
        """Let the model go, and what lies on its device."""
        self._runner = None
        self._running.table.close()

    def launch(self, plan: StepPlan) -> Step:
        """Have the model compute a step whose sequences have their rows.

        Raises
        ------
        DeviceLostError
            Any other error is kept, for :meth:`go_on` to raise.
        """
        assert self._runner is not None
        step = Step(plan)
        try:
            # First, lest anybody believe that it was done.
            if plan.swap_out:
                self._host_blocks.copy_out(plan.swap_out)
            cut = self._running.table.build(plan)
            step.take_batch(cut)
            step.masks = self._constraints.start_masks(
                step.sequences, step.num_drafts, self._requests
            )
            if self._slots is not None:
                swaps = self._slots.apply(self._runner.set_adapter)
                self._metrics.num_adapter_swaps += swaps
            if plan.swap_in:
                self._host_blocks.copy_in(plan.swap_in)
            started = time.perf_counter()
            step.hidden = self._runner.forward(cut.batch)
            self._metrics.forward_seconds += time.perf_counter() - started
        except Exception as error:  # whatever a model raises, the engine goes on
            raise_if_lost(error)
            self._running.scheduler.forget_saved(plan)
            step.let_go()
            step.error = error
            return step
        self._metrics.num_steps += 1
        self._metrics.num_computed_tokens += plan.num_tokens
        self._metrics.num_forced_tokens += plan.num_draft_tokens
        self._metrics.num_swapped_out += len(plan.swap_out)
        self._metrics.num_swapped_in += len(plan.swap_in)
        return step

    def go_on(self, step: Step) -> StepNews:
        """Record what a step has computed, and choose tokens by it.

        The step before it was collected, so that all is known of its sequences. This step is in
        flight afterwards where it has ``pending``.
        """
        step.drop_ended()
        if step.error is not None:
            raise step.error
        assert step.hidden is not None
        news = StepNews({})
        if step.plan.reads_prompts:
            news.failed |= read_prompts(
                step.plan, step.hidden, self._requests, self._logprobs, self._sampler, self._logits
            )
        self._running.update(step.plan, step.rows)
        try:
            if step.sequences:
                self._choose(step, news)
        finally:
            step.let_go()
        if step.masks is not None:
            self._generation.propose(step.sequences, news)
        return news

    @property
    def _host_blocks(self) -> HostBlocks:
        host_blocks = self._running.scheduler.host_blocks
        assert host_blocks is not None
        return host_blocks

    def _choose(self, step: Step, news: StepNews) -> None:
        assert self._runner is not None
        assert step.hidden is not None
        assert step.wanted is not None
        sequences, rows = step.sequences, step.chosen_rows
        started = time.perf_counter()
        slots = step.adapter_slots
        if slots is not None:
            slots = slots[torch.from_numpy(step.host_wanted)]
        launches = self._overlaps and step.masks is None and self._sampler.can_launch(rows)
        if not launches and not self._sampler.needs_logits(rows):
            likeliest = self._runner.likeliest(step.hidden, step.wanted, slots)
            self._metrics.forward_seconds += time.perf_counter() - started
            sampled = self._sampler.take_likeliest(*likeliest)
            self._generation.append(sequences, rows, sampled, news)
            return
        logits = self._logits(step.hidden, step.wanted, slots)
        self._metrics.forward_seconds += time.perf_counter() - started
        if launches:
            pending = self._sampler.launch(logits, rows)
            self._running.expect(sequences, rows, pending.token_ids)
            step.pending = pending
            return
        masks = step.wait_for_masks()
        if any(step.num_drafts):
            drafts = step.num_drafts
            self._generation.append_with_drafts(sequences, drafts, rows, logits, masks, news)
        else:
            sampled = self._sampler.sample(logits, rows, masks)
            self._generation.append(sequences, rows, sampled, news)

    def collect(self, step: Step) -> StepNews:
        """Wait for the tokens of a step in flight, and give them to its sequences."""
        assert step.pending is not None
        kept = step.drop_ended()  # whose rows may be others' by now
        sampled = step.pending.collect()
        if kept is not None:
            sampled = _select(sampled, kept)
        news = StepNews({})
        if step.sequences:
            self._running.settle(step.sequences, step.chosen_rows)
            self._generation.append(step.sequences, step.chosen_rows, sampled, news)
        return news

    def _logits(
        self, hidden: torch.Tensor, indices: torch.Tensor, slots: torch.Tensor | None
    ) -> torch.Tensor:
        assert self._runner is not None
        return self._runner.logits(hidden, indices, slots)


def raise_if_lost(error: Exception) -> None:
    """Raise DeviceLostError for an error that leaves no device to go on with."""
    if is_device_lost(error):
        raise DeviceLostError(f"{type(error).__name__}: {error}") from error


def _select(sampled: SamplerOutput, places: list[int]) -> SamplerOutput:
    """Return what some of the rows were given."""
    logprobs = sampled.logprobs
    if logprobs is not None:
        logprobs = LogprobsTensors(
            logprobs.token_ids[places], logprobs.logprobs[places], logprobs.ranks[places]
        )
    failures = {
        new: sampled.failures[old] for new, old in enumerate(places) if old in sampled.failures
    }
    return SamplerOutput(sampled.token_ids[places], logprobs, failures)
