"""Engine: requests in, one step at a time, outputs out."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from quire.engine.beams import beam_logprobs, start_beam_search
from quire.engine.block_pool import BlockPool, root_key
from quire.engine.constraints import RequestConstraints
from quire.engine.live_request import LiveRequest
from quire.engine.metrics import EngineMetrics
from quire.engine.processor import ModelLimits, Processor
from quire.engine.runner import ModelRunner
from quire.engine.scheduler import Scheduler, StepPlan
from quire.engine.sequence import Sequence, SequenceStatus
from quire.engine.sequence_table import SequenceTable
from quire.engine.token_logprobs import TokenLogprobsMaker
from quire.errors import EngineClosedError, InvalidRequestError, RequestFailedError
from quire.outputs import RequestOutput
from quire.sampling.processors import check_processors
from quire.sampling.random import derive_seed
from quire.sampling.row import num_beam_candidates
from quire.sampling.sampler import LogprobsTensors, Sampler, SamplerOutput

if TYPE_CHECKING:
    from quire.config import EngineConfig
    from quire.engine.completion import Completion
    from quire.engine.request import Request
    from quire.tokenizer.tokenizer import Tokenizer

StepOutput = RequestOutput | RequestFailedError
"""What a step says of a request: both have ``request_id``; a failure is the last word."""


class Engine:
    """A model, its KV cache and the requests in flight.

    Not thread-safe: one :class:`~quire.engine.loop.EngineLoop` owns it.

    Parameters
    ----------
    config : EngineConfig
    runner : ModelRunner
    tokenizer : Tokenizer or None
    limits : ModelLimits
        What prompts and parameters are checked against.
    num_blocks : int
        KV blocks, the null block included.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        runner: ModelRunner,
        tokenizer: Tokenizer | None,
        limits: ModelLimits,
        num_blocks: int,
        sampler: Sampler,
    ) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.limits = limits
        self.processor = Processor(tokenizer, limits, seed=config.seed)
        self.metrics_data = EngineMetrics()
        self._runner: ModelRunner | None = runner
        self._sampler = sampler
        self._eos_token_ids = frozenset(limits.eos_token_ids)
        self._pool = BlockPool(num_blocks, config.cache.block_size)
        self._by_priority = config.scheduler.scheduling_policy == "priority"
        self.scheduler = Scheduler(
            self._pool,
            max_num_seqs=config.scheduler.max_num_seqs,
            max_num_batched_tokens=config.scheduler.token_budget(limits.max_model_len),
            chunked_prefill=config.scheduler.enable_chunked_prefill,
            preempt_by_priority=self._by_priority,
        )
        self._table = SequenceTable(
            config.scheduler.max_num_seqs,
            limits.max_model_len,
            config.cache.block_size,
            runner.device,
        )
        self._constraints = RequestConstraints(
            config, tokenizer, vocab_size=limits.vocab_size, device=runner.device
        )
        self._logprobs = TokenLogprobsMaker(tokenizer)
        self._requests: dict[str, LiveRequest] = {}
        self._num_arrivals = 0

    # -- requests ------------------------------------------------------------------------------

    @property
    def has_unfinished_requests(self) -> bool:
        """Whether any request is in flight."""
        return bool(self._requests)

    def add_request(self, request: Request) -> None:
        """Queue a request made by :class:`~quire.engine.processor.Processor`.

        Raises
        ------
        InvalidRequestError
            If a request of that id is in flight, or a logits processor is no such thing.
        EngineClosedError
            After :meth:`close`.
        """
        if self._runner is None:
            raise EngineClosedError("the engine is closed: make a new one")
        if request.request_id in self._requests:
            raise InvalidRequestError(
                f"request_id={request.request_id!r} is in flight already: ids must be unique"
            )
        params = request.params
        if params.logits_processors:
            check_processors(params.logits_processors)
        self._sampler.check(params)
        eos_token_ids = frozenset() if params.ignore_eos else self._eos_token_ids
        beam = None
        if params.use_beam_search:
            beam = start_beam_search(request, self.tokenizer, eos_token_ids)
        live = LiveRequest(request, self.tokenizer, eos_token_ids, beam)
        count = 1 if beam is not None else params.num_sequences
        priority = request.priority if self._by_priority else 0
        order = (priority, self._num_arrivals)
        self._num_arrivals += 1
        shared = self.config.cache.enable_prefix_caching
        root = root_key(request.cache_salt, None if shared else request.request_id)
        for index in range(count):
            sequence = Sequence(
                request.request_id,
                index,
                request.prompt_token_ids,
                order=(*order, index),
                root_key=root,
                publish=shared or count > 1 or beam is not None,
                skip_cached_prefix=index == 0 and params.prompt_logprobs is not None,
            )
            live.num_sequences += 1
            live.deferred.append(sequence)
            if beam is None:
                live.start_completion(index, sequence.output_token_ids)
        if beam is not None:
            live.beam_order = [0]
        if params.structured_outputs is None:
            self._queue(live)
        else:
            self._constraints.add(live)
        self._requests[request.request_id] = live
        self.metrics_data.num_requests += 1

    def _queue(self, live: LiveRequest) -> None:
        """Let a request's first sequence compute the prompt; the others wait for that."""
        first = live.deferred.pop(0)
        live.sequences[first.index] = first
        self.scheduler.add(first)

    def abort(self, request_ids: Iterable[str]) -> list[StepOutput]:
        """End requests now; ids that are not in flight are passed over.

        Returns
        -------
        list of RequestOutput or RequestFailedError
            Their last outputs, with ``finish_reason="abort"``; or why there can be none.
        """
        outputs: list[StepOutput] = []
        for request_id in request_ids:
            live = self._requests.get(request_id)
            if live is not None:
                live.abort()
                self._drop(live)
                try:
                    output = live.output()
                    assert output is not None
                    outputs.append(output)
                except Exception as error:  # such as a tokenizer's
                    outputs.append(_failure(request_id, error))
        return outputs

    # -- the step ------------------------------------------------------------------------------

    @torch.inference_mode()
    def step(self) -> list[StepOutput]:
        """Compute one step and return the news of the requests it touched.

        A step that raises fails the requests in it, and no others.
        """
        outputs: list[StepOutput] = []
        for live, error in self._constraints.take_ready():
            if error is None:
                self._queue(live)
            else:
                outputs.append(self._fail(live, error))
        if self.scheduler.has_work:
            outputs += self._compute()
        elif not outputs and self._requests:
            self._constraints.wait()
        return outputs

    def _compute(self) -> list[StepOutput]:
        # No local name for the runner: a processor's exception keeps this frame with its locals.
        assert self._runner is not None
        started = time.perf_counter()
        plan = self.scheduler.schedule()
        self._admit(plan)
        if not plan.sequences:
            raise RuntimeError(f"nothing can be scheduled: {self.scheduler.running}")
        masks = None
        try:
            batch, rows, caught_up = self._table.build(plan)
            chosen_rows = rows[caught_up]
            sequences = plan.sequences
            if len(caught_up) < len(sequences):
                sequences = [sequences[i] for i in caught_up]
            masks = self._constraints.start_masks(sequences, self._requests)
            forward_started = time.perf_counter()
            hidden = self._runner.forward(batch)
            logits = likeliest = None
            if self._sampler.needs_logits(chosen_rows):
                logits = self._logits(hidden, batch.logits_indices)
            elif len(chosen_rows):
                likeliest = self._runner.likeliest(hidden, batch.logits_indices)
            self.metrics_data.forward_seconds += time.perf_counter() - forward_started
        except Exception as error:  # whatever a model raises, the engine goes on
            if masks is not None:
                masks.exception()  # until it is done, constraints are in use
            return self._fail_step(plan, error)
        failed = self._collect_prompt_logprobs(plan, hidden)
        self.scheduler.update(plan)
        self._table.advance(rows, plan)
        outputs: list[StepOutput] = []
        if len(chosen_rows):
            try:
                if likeliest is not None:
                    sampled = self._sampler.take_likeliest(*likeliest)
                else:
                    assert logits is not None
                    found = None if masks is None else masks.result()
                    sampled = self._sampler.sample(logits, chosen_rows, found)
                outputs = self._append_all(sequences, chosen_rows, sampled, failed)
            except Exception as error:
                return self._fail_step(plan, error)
        if failed:
            outputs += [self._fail(self._requests[id_], error) for id_, error in failed.items()]
        self.metrics_data.num_steps += 1
        self.metrics_data.num_computed_tokens += plan.num_tokens
        self.metrics_data.step_seconds += time.perf_counter() - started
        return outputs

    def _logits(self, hidden: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        assert self._runner is not None
        return self._runner.logits(hidden, indices)

    def _admit(self, plan: StepPlan) -> None:
        for sequence in plan.preempted:
            if sequence.row >= 0:
                self._sampler.remove(sequence.row)
                self._table.release(sequence)
            self._requests[sequence.request_id].metrics.num_preemptions += 1
            self.metrics_data.num_preemptions += 1
        for sequence in plan.admitted:
            live = self._requests[sequence.request_id]
            self._table.assign(sequence)
            self._add_to_sampler(live, sequence)
            if live.metrics.first_scheduled_time is None:
                live.metrics.first_scheduled_time = time.monotonic()
                live.num_cached_tokens = sequence.num_cached_tokens
                self.metrics_data.num_prompt_tokens += sequence.num_prompt_tokens
                self.metrics_data.num_cached_tokens += sequence.num_cached_tokens

    def _add_to_sampler(self, live: LiveRequest, sequence: Sequence) -> None:
        self._sampler.add(
            sequence.row,
            live.request.params,
            seed=derive_seed(live.request.seed, sequence.index),
            prompt_token_ids=sequence.prompt_token_ids,
            output_token_ids=sequence.output_token_ids,
            eos_token_ids=live.eos_token_ids,
            bad_words_ids=live.request.bad_words_ids,
            masked=sequence.constraint is not None,
        )

    def _append_all(
        self,
        sequences: list[Sequence],
        rows: npt.NDArray[np.int64],
        sampled: SamplerOutput,
        failed: dict[str, BaseException],
    ) -> list[StepOutput]:
        """Give sequences their tokens; return what requests are to be told, add those that fail."""
        requests = self._requests
        failures, logprobs = sampled.failures, sampled.logprobs
        self._table.append(rows, sampled.token_ids)
        touched: dict[str, LiveRequest] = {}
        now = time.monotonic()
        self.metrics_data.num_generation_tokens += len(sequences) - len(failures)
        for i, token_id in enumerate(sampled.token_ids.tolist()):
            sequence = sequences[i]
            live = requests[sequence.request_id]
            if i in failures:
                failed.setdefault(sequence.request_id, failures[i])
                continue
            try:
                completion = live.quiet
                if completion is not None:
                    if not _append_token(sequence, completion, token_id):
                        continue
                    self._finish_sequence(live, sequence)
                elif live.beam is not None:
                    assert logprobs is not None
                    self._table.take_back(sequence)  # the search decides which token it is
                    self._report_candidates(live, sequence, logprobs, i)
                else:
                    self._append(live, sequence, token_id, logprobs, i)
            except Exception as error:  # such as a tokenizer's: it concerns this request alone
                failed.setdefault(sequence.request_id, error)
            touched[sequence.request_id] = live
            if live.metrics.first_token_time is None:
                self._begin(live, now)

        outputs: list[StepOutput] = []
        for live in touched.values():
            if live.request.request_id in failed:
                continue
            try:
                if live.beam is not None and len(live.candidates) == len(live.beam_order):
                    self._advance_beams(live)
                if live.finished:
                    live.metrics.finished_time = now
                output = live.output()
            except Exception as error:
                failed[live.request.request_id] = error
                continue
            if live.finished:
                self._drop(live)
            if output is not None:
                outputs.append(output)
        return outputs

    def _begin(self, live: LiveRequest, now: float) -> None:
        """Take note of a request's first token; let samples that waited for it go."""
        live.metrics.first_token_time = now
        for sample in live.deferred:
            live.sequences[sample.index] = sample
            self.scheduler.add(sample)
        live.deferred.clear()
        live.quiet = live.quiet_completion()

    def _append(
        self,
        live: LiveRequest,
        sequence: Sequence,
        token_id: int,
        logprobs: LogprobsTensors | None,
        i: int,
    ) -> None:
        completion = live.completions[sequence.index]
        params = live.request.params
        if params.logprobs is not None or params.num_sequences > params.n:
            assert logprobs is not None
            completion.cumulative_logprob += float(logprobs.logprobs[i, 0])
            if completion.logprobs is not None:
                k = params.logprobs or 0
                completion.logprobs.append(self._logprobs.entries(logprobs, i, k))
        if _append_token(sequence, completion, token_id):
            self._finish_sequence(live, sequence)

    def _collect_prompt_logprobs(
        self, plan: StepPlan, hidden: torch.Tensor
    ) -> dict[str, BaseException]:
        """Add what this step tells of prompts; return the requests for which that failed."""
        failed: dict[str, BaseException] = {}
        if not plan.reads_prompts:
            return failed
        start = 0
        for sequence, count in zip(plan.sequences, plan.num_new_tokens, strict=True):
            if sequence.skip_cached_prefix:
                live = self._requests[sequence.request_id]
                own = hidden[start : start + count]
                try:
                    self._logprobs.extend_prompt(live, sequence, own, self._logits, self._sampler)
                except Exception as error:  # it concerns this request alone
                    failed[sequence.request_id] = error
            start += count
        return failed

    # -- beam search ---------------------------------------------------------------------------

    def _report_candidates(
        self, live: LiveRequest, sequence: Sequence, logprobs: LogprobsTensors, i: int
    ) -> None:
        width = num_beam_candidates(live.request.params, live.eos_token_ids)
        live.candidates[sequence.index] = (
            logprobs.token_ids[i, 1 : width + 1].tolist(),
            logprobs.logprobs[i, 1 : width + 1].tolist(),
        )
        self.scheduler.park(sequence)

    def _advance_beams(self, live: LiveRequest) -> None:
        """Let every beam take its next token: in place where it can, by a new sequence else.

        A new sequence finds its parent's full blocks in the prefix cache, like any other.
        """
        assert live.beam is not None
        parents = [live.sequences[index] for index in live.beam_order]
        moves = live.beam.advance([live.candidates[index] for index in live.beam_order])
        live.candidates.clear()
        live.beam_order = []
        going_on: dict[int, int] = {}
        forks: list[Sequence] = []
        # Forks first: they copy their parent's tokens as they were.
        for place, token_id in moves:
            parent = parents[place]
            if parent.index in going_on:
                forks.append(parent.fork(live.num_sequences, token_id))
                live.beam_order.append(live.num_sequences)
                live.num_sequences += 1
            else:
                going_on[parent.index] = token_id
                live.beam_order.append(parent.index)
        for index, token_id in going_on.items():
            parent = live.sequences[index]
            parent.output_token_ids.append(token_id)
            if parent.constraint is not None:
                parent.constraint.accept([token_id])
            if parent.row >= 0:
                self._table.append(np.array([parent.row]), np.array([token_id]))
            self.scheduler.unpark(parent)
        for parent in parents:
            if parent.index not in going_on:
                self._finish_sequence(live, parent)
        for child in forks:
            live.sequences[child.index] = child
            self.scheduler.add(child)
        if live.beam.done:
            self._finish_beams(live)

    def _finish_beams(self, live: LiveRequest) -> None:
        assert live.beam is not None
        for sequence in list(live.sequences.values()):
            self._finish_sequence(live, sequence)
        for rank, hypothesis in enumerate(live.beam.results()):
            completion = live.start_completion(rank, [])
            for token_id in hypothesis.token_ids:
                completion.append(token_id)
            completion.cumulative_logprob = hypothesis.cum_logprob
            completion.finish_reason = hypothesis.finish_reason
            completion.stop_reason = hypothesis.stop_reason
            if completion.logprobs is not None:
                completion.logprobs.extend(
                    beam_logprobs(source, live.request.params.logprobs or 0, self._logprobs.text)
                    for source in hypothesis.sources
                )

    # -- endings -------------------------------------------------------------------------------

    def _finish_sequence(self, live: LiveRequest, sequence: Sequence) -> None:
        if sequence.row >= 0:
            self._sampler.remove(sequence.row)
            self._table.release(sequence)
        if sequence.status is not SequenceStatus.FINISHED:
            self.scheduler.finish(sequence)
        live.sequences.pop(sequence.index, None)
        if not self.config.cache.enable_prefix_caching and sequence.publish:
            # Shared within the request only, and nobody is left to find it once that ends.
            live.private_keys.update(sequence.block_keys)

    def _drop(self, live: LiveRequest) -> None:
        live.deferred.clear()
        self._constraints.forget(live)
        for sequence in list(live.sequences.values()):
            self._finish_sequence(live, sequence)
        self._pool.withdraw(live.private_keys)
        del self._requests[live.request.request_id]

    def _fail(self, live: LiveRequest, error: BaseException) -> RequestFailedError:
        self._drop(live)
        self.metrics_data.num_failed_requests += 1
        return _failure(live.request.request_id, error)

    def _fail_step(self, plan: StepPlan, error: Exception) -> list[StepOutput]:
        ids = dict.fromkeys(s.request_id for s in plan.sequences if s.request_id in self._requests)
        return [self._fail(self._requests[id_], error) for id_ in ids]

    def fail_all(self, error: BaseException) -> list[StepOutput]:
        """End every request in flight with an error, for when a step broke down half-way."""
        return [self._fail(live, error) for live in list(self._requests.values())]

    # -- the rest ------------------------------------------------------------------------------

    def reset_prefix_cache(self) -> bool:
        """Forget all cached prefixes; requests in flight keep their blocks."""
        self._pool.reset()
        return True

    def metrics(self) -> dict[str, float]:
        """Return counters since the start, and gauges of this moment."""
        usable = self._pool.num_blocks - 1
        running = [s for s in self.scheduler.running if s.status is SequenceStatus.RUNNING]
        return {
            **dataclasses.asdict(self.metrics_data),
            "num_running_seqs": len(running),
            "num_waiting_seqs": self.scheduler.num_waiting,
            "num_unfinished_requests": len(self._requests),
            "kv_cache_usage": 1 - self._pool.num_free / usable,
            "num_kv_blocks": usable,
        }

    def check_integrity(self) -> None:
        """Raise AssertionError unless the engine's books agree with each other."""
        alive = [s for live in self._requests.values() for s in live.sequences.values()]
        self.scheduler.check_integrity(alive)
        self._table.check_integrity(alive)

    def close(self) -> None:
        """Drop all requests and let weights and KV cache go."""
        self._runner = None
        self.abort(list(self._requests))
        self._constraints.close()
        self._sampler.close()


def _append_token(sequence: Sequence, completion: Completion, token_id: int) -> bool:
    """Give a sequence its token; return whether it is the last."""
    is_last = completion.append(token_id)
    constraint = sequence.constraint
    # A token that ends a text is no part of it.
    if constraint is not None and completion.finish_reason != "stop":
        constraint.accept([token_id])
        if constraint.is_finished():
            # Whole, even where it has the length that was allowed.
            completion.finish_reason, is_last = "stop", True
    return is_last


def _failure(request_id: str, error: BaseException) -> RequestFailedError:
    failure = error
    if not isinstance(failure, RequestFailedError):
        failure = RequestFailedError(request_id, str(error) or type(error).__name__)
        failure.__cause__ = error
    return failure
