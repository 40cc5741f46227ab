"""Engine: requests in, one step at a time, outputs out."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING

import torch

from quire.engine.adapter_slots import AdapterSlots, LostAdapters
from quire.engine.beams import advance_beams, start_beam_search
from quire.engine.block_pool import BlockPool, root_key
from quire.engine.cache_map import KVCacheMap, map_blocks
from quire.engine.constraints import RequestConstraints
from quire.engine.generation import Generation, StepNews
from quire.engine.host_blocks import HostBlocks
from quire.engine.interface import StepOutput
from quire.engine.live_request import LiveRequest, count_adapters
from quire.engine.metrics import EngineMetrics
from quire.engine.processor import ModelLimits, Processor
from quire.engine.queue_bound import QueueBound
from quire.engine.run_options import bytes_to_swap, overlaps_steps
from quire.engine.runner import ModelRunner, Runner
from quire.engine.running import RunningSequences
from quire.engine.scheduler import Scheduler
from quire.engine.sequence import Sequence, SequenceStatus
from quire.engine.sequence_table import SequenceTable
from quire.engine.step_runner import StepRunner, raise_if_lost
from quire.engine.token_logprobs import TokenLogprobsMaker
from quire.errors import (
    EngineClosedError,
    InvalidRequestError,
    RequestFailedError,
)
from quire.sampling.processors import check_processors
from quire.sampling.sampler import Sampler

if TYPE_CHECKING:
    from quire.config import EngineConfig
    from quire.engine.request import Request
    from quire.engine.step import Step
    from quire.engine.step_plan import StepPlan
    from quire.lora.store import AdapterStore
    from quire.tokenizer.tokenizer import Tokenizer

logger = logging.getLogger("quire")


class Engine:
    """A model, its KV cache and the requests in flight.

    Not thread-safe: one :class:`~quire.engine.loop.EngineLoop` owns it.

    Parameters
    ----------
    config : EngineConfig
    runner : Runner
    tokenizer : Tokenizer or None
    limits : ModelLimits
        What prompts and parameters are checked against.
    num_blocks : int
        KV blocks, the null block included.
    sampler : Sampler
    adapters : AdapterStore
        Where requests have their adapters from; closed with the engine.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        runner: Runner,
        tokenizer: Tokenizer | None,
        limits: ModelLimits,
        num_blocks: int,
        sampler: Sampler,
        adapters: AdapterStore,
    ) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.limits = limits
        self.processor = Processor(tokenizer, limits, seed=config.seed)
        self.adapters = adapters
        self.lost_adapters = LostAdapters()
        self.metrics_data = EngineMetrics()
        self._runner: Runner | None = runner
        self._sampler = sampler
        self._eos_token_ids = frozenset(limits.eos_token_ids)
        # With engines on other ranks, which must all decide the same.
        self._in_lockstep = config.parallel.backend == "external_launcher"
        self._by_priority = config.scheduler.scheduling_policy == "priority"
        self._num_blocks = num_blocks
        self._device = runner.device
        self._overlaps = overlaps_steps(config.scheduler.async_scheduling, runner)
        self._num_swap_bytes = bytes_to_swap(config.cache.swap_space, runner)
        self._constraints = RequestConstraints(
            config, tokenizer, vocab_size=limits.vocab_size, device=runner.device
        )
        self._logprobs = TokenLogprobsMaker(tokenizer)
        self._num_arrivals = 0
        self._is_asleep = False
        self._queue_bound = QueueBound()
        self._begin()

    def _begin(self) -> None:
        """Make the books, in which nothing is in flight and no prefix is cached."""
        config, limits = self.config, self.limits
        self._pool = BlockPool(self._num_blocks, config.cache.block_size)
        self._slots = None
        if config.lora.enable_lora:
            self._slots = AdapterSlots(config.lora.max_loras, self.lost_adapters)
        self.scheduler = Scheduler(
            self._pool,
            max_num_seqs=config.scheduler.max_num_seqs,
            max_num_batched_tokens=config.scheduler.token_budget(limits.max_model_len),
            chunked_prefill=config.scheduler.enable_chunked_prefill,
            preempt_by_priority=self._by_priority,
            adapter_slots=self._slots,
            host_blocks=self._make_host_blocks(),
        )
        self._table = SequenceTable(
            config.scheduler.max_num_seqs,
            limits.max_model_len,
            config.cache.block_size,
            self._device,
        )
        self._running = RunningSequences(
            self.scheduler,
            self._table,
            self._sampler,
            shares_prefixes=config.cache.enable_prefix_caching,
        )
        self._requests: dict[str, LiveRequest] = {}
        self._num_unscheduled = 0
        self._in_flight: Step | None = None
        self._generation = Generation(
            self._sampler,
            self._running,
            self._constraints,
            self._logprobs,
            self._requests,
            self.metrics_data,
        )
        assert self._runner is not None
        self._steps = StepRunner(
            self._runner,
            self._running,
            self._sampler,
            self._generation,
            self._constraints,
            self._logprobs,
            self._slots,
            self._requests,
            self.metrics_data,
            overlaps=self._overlaps,
        )

    def _make_host_blocks(self) -> HostBlocks | None:
        """Return the host's memory for preempted sequences, if there is to be any."""
        assert self._runner is not None
        if not self._num_swap_bytes:
            return None
        make = partial(self._runner.make_host_cache, self._num_swap_bytes)
        return HostBlocks(make, self.config.cache.block_size)

    # -- requests ------------------------------------------------------------------------------

    @property
    def num_blocks(self) -> int:
        """KV blocks that requests can use."""
        return self._num_blocks - 1

    @property
    def has_unfinished_requests(self) -> bool:
        """Whether any request is in flight."""
        return bool(self._requests)

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._requests) or self._in_flight is not None

    @property
    def num_queued(self) -> int:
        """Requests that have to wait for others to end, or to rest, before they begin."""
        free = self.config.scheduler.max_num_seqs - len(self.scheduler.running)
        return max(0, self._num_unscheduled - free)

    def check_queue(self, longest: int) -> None:
        """Refuse one more request where as many as this have to wait.

        Raises
        ------
        EngineBusyError
        """
        self._queue_bound.check(self.num_queued, longest)

    def check_request(self, request: Request) -> None:
        """Refuse what no engine of this configuration can serve, whatever is in flight.

        Raises
        ------
        InvalidRequestError
        """
        params = request.params
        if params.logits_processors:
            check_processors(params.logits_processors)
        self._sampler.check(params)
        self._constraints.check(params, self._ends_of(request))

    def _ends_of(self, request: Request) -> frozenset[int]:
        return frozenset() if request.params.ignore_eos else self._eos_token_ids

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
        if self._is_asleep:
            raise EngineClosedError("the engine sleeps: call wake_up() first")
        if request.request_id in self._requests:
            raise InvalidRequestError(
                f"request_id={request.request_id!r} is in flight already: ids must be unique"
            )
        params = request.params
        self.check_request(request)
        eos_token_ids = self._ends_of(request)
        beam = None
        if params.use_beam_search:
            beam = start_beam_search(request, self.tokenizer, eos_token_ids)
        live = LiveRequest(request, self.tokenizer, eos_token_ids, beam)
        count = 1 if beam is not None else params.num_sequences
        priority = request.priority if self._by_priority else 0
        order = (priority, self._num_arrivals)
        self._num_arrivals += 1
        shared = self.config.cache.enable_prefix_caching
        adapter = request.adapter
        root = root_key(
            request.cache_salt,
            None if shared else request.request_id,
            None if adapter is None else adapter.digest,
        )
        for index in range(count):
            sequence = Sequence(
                request.request_id,
                index,
                request.prompt_token_ids,
                order=(*order, index),
                root_key=root,
                publish=shared or count > 1 or beam is not None,
                reads_prompt=index == 0 and live.reads_prompt,
                skip_cached_prefix=index == 0 and live.reads_whole_prompt,
                adapter=adapter,
                max_tokens=params.max_tokens,
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
        self._num_unscheduled += 1
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
                    outputs.append(request_failed(request_id, error))
        return outputs

    # -- the step ------------------------------------------------------------------------------

    @torch.inference_mode()
    def step(self) -> list[StepOutput]:
        """Compute one step and return the news of the requests it touched.

        Or of those that the step before touched, where steps overlap: then that one's tokens are
        chosen when this one begins, and known to the host when the model computes it already.
        A step that raises fails the requests in it, and no others.
        """
        outputs: list[StepOutput] = []
        for live, error in self._constraints.take_ready(wait_for_all=self._in_lockstep):
            outputs += self._enter(live, error)
        if self.scheduler.has_work or self._in_flight is not None:
            outputs += self._compute()
        elif not outputs and self._requests:
            self._constraints.wait()
        return outputs

    def _enter(self, live: LiveRequest, error: BaseException | None) -> list[StepOutput]:
        """Let a request begin that has waited for its grammar, unless there was an error."""
        if error is not None:
            return [self._fail(live, error)]
        try:
            for sequence in list(live.deferred):
                if self._generation.follow_grammar(live, sequence):
                    live.deferred.remove(sequence)
            if live.deferred:
                self._queue(live)
                return []
            # All of it was forced: there is nothing to compute.
            live.metrics.finished_time = time.monotonic()
            output = live.output()
        except Exception as raised:  # such as a tokenizer's
            return [self._fail(live, raised)]
        self._drop(live)
        return [] if output is None else [output]

    def _compute(self) -> list[StepOutput]:
        """Launch a step, and collect the one in flight: in that order, wherever it is possible."""
        started = time.perf_counter()
        earlier, self._in_flight = self._in_flight, None
        steps, step = self._steps, None
        outputs: list[StepOutput] = []
        if earlier is None or self.scheduler.can_go_ahead():
            step = self._launch()
        if earlier is not None:
            outputs += self._take(earlier, steps.collect)
            if step is None and self.scheduler.has_work:
                step = self._launch()
        elif step is None:
            raise RuntimeError(f"nothing can be scheduled: {self.scheduler.running}")
        if step is not None and steps is self._steps:  # else all has ended, and begun anew
            outputs += self._take(step, steps.go_on)
            if step.pending is not None and steps is self._steps:
                self._in_flight = step
        self.metrics_data.step_seconds += time.perf_counter() - started
        return outputs

    def _launch(self) -> Step | None:
        """Schedule a step and have the model compute it; None where nothing can be scheduled."""
        if self._slots is not None:
            self._slots.collect()
        plan = self.scheduler.schedule()
        self._admit(plan)
        if plan.sequences:
            return self._steps.launch(plan)
        self.scheduler.forget_saved(plan)
        return None

    def _take(self, step: Step, part: Callable[[Step], StepNews]) -> list[StepOutput]:
        """Take the news of a part of a step; where it raises, fail the requests in it."""
        try:
            news = part(step)
        except Exception as error:
            raise_if_lost(error)
            return self._fail_step(step, error)
        return self._tell(news)

    def _admit(self, plan: StepPlan) -> None:
        self._running.admit(plan, self._requests)
        for sequence in plan.preempted:
            self._requests[sequence.request_id].metrics.num_preemptions += 1
            self.metrics_data.num_preemptions += 1
        for sequence in plan.admitted:
            live = self._requests[sequence.request_id]
            if live.metrics.first_scheduled_time is None:
                live.metrics.first_scheduled_time = time.monotonic()
                self._num_unscheduled -= 1
                live.num_cached_tokens = sequence.num_cached_tokens
                self.metrics_data.num_prompt_tokens += sequence.num_prompt_tokens
                self.metrics_data.num_cached_tokens += sequence.num_cached_tokens

    def _tell(self, news: StepNews) -> list[StepOutput]:
        """Let searches go on; return what the step has to say."""
        outputs: list[StepOutput] = []
        now = time.monotonic()
        failed = news.failed
        for live in news.touched.values():
            if live.request.request_id in failed:
                continue
            try:
                if live.beam is not None:
                    advance_beams(live, self._running, self._logprobs.text)
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
        outputs += [self._fail(self._requests[id_], error) for id_, error in failed.items()]
        return outputs

    # -- endings -------------------------------------------------------------------------------

    def _drop(self, live: LiveRequest) -> None:
        live.deferred.clear()
        self._constraints.forget(live)
        for sequence in list(live.sequences.values()):
            self._running.finish(live, sequence)
        self._pool.withdraw(live.private_keys)
        del self._requests[live.request.request_id]
        if live.metrics.first_scheduled_time is None:
            self._num_unscheduled -= 1
        self._queue_bound.note_end()

    def _fail(self, live: LiveRequest, error: BaseException) -> RequestFailedError:
        self._drop(live)
        self.metrics_data.num_failed_requests += 1
        return request_failed(live.request.request_id, error)

    def _fail_step(self, step: Step, error: Exception) -> list[StepOutput]:
        ids = dict.fromkeys(s.request_id for s in step.members if s.request_id in self._requests)
        outputs: list[StepOutput] = [self._fail(self._requests[id_], error) for id_ in ids]
        try:
            self.check_integrity()
        except AssertionError:
            logger.exception("the engine's books are in disorder after a step failed")
            outputs += self.restart(error)
        return outputs

    def restart(self, error: BaseException) -> list[StepOutput]:
        """End every request in flight with an error, and begin with new books.

        For when a step broke down half-way, and nobody knows what of the books is true: blocks,
        rows and cached prefixes are all forgotten, and only the model stays.
        """
        outputs: list[StepOutput] = [request_failed(id_, error) for id_ in self._requests]
        self.metrics_data.num_failed_requests += len(outputs)
        self.metrics_data.num_restarts += 1
        for live in list(self._requests.values()):
            self._constraints.forget(live)
        self._begin_anew()
        return outputs

    def _begin_anew(self) -> None:
        self._steps.close()
        self._sampler.clear()
        self._begin()
        if self._slots is not None and self._runner is not None:
            for slot in range(self.config.lora.max_loras):
                self._runner.set_adapter(slot, None)

    # -- the rest ------------------------------------------------------------------------------

    def release_adapters(self) -> None:
        """Let the memory of adapters go that nobody needs any more."""
        if self._slots is not None and self._runner is not None:
            self._slots.collect()
            self._slots.apply(self._runner.set_adapter)

    def sleep(self) -> None:
        """Let the KV cache's memory go; no request may be in flight, or come before `wake_up`."""
        assert not self._requests
        assert isinstance(self._runner, ModelRunner)
        self._begin_anew()
        self._is_asleep = True
        self._runner.sleep()

    def wake_up(self) -> None:
        """Take the memory again, with nothing in it."""
        assert isinstance(self._runner, ModelRunner)
        self._runner.wake_up()
        self._is_asleep = False

    def reset_prefix_cache(self) -> bool:
        """Forget all cached prefixes; requests in flight keep their blocks."""
        self._pool.reset()
        return True

    def kv_cache_map(self) -> KVCacheMap:
        """Return which block of the KV cache holds what."""
        dtype = self.config.cache.kv_cache_dtype
        return map_blocks(self._pool, self.scheduler.running, dtype)

    def metrics(self) -> dict[str, float]:
        """Return counters since the start, and gauges of this moment.

        Of a model on several ranks, what this one's exchanges with the others took, if it counts.
        """
        running = [s for s in self.scheduler.running if s.status is SequenceStatus.RUNNING]
        slots = self._slots
        return {
            **dataclasses.asdict(self.metrics_data),
            "num_adapter_reads": self.adapters.num_reads,
            "num_adapters_in_memory": self.adapters.num_kept,
            "num_adapters_in_slots": 0 if slots is None else slots.num_filled,
            "num_running_seqs": len(running),
            "num_waiting_seqs": self.scheduler.num_waiting,
            "num_unfinished_requests": len(self._requests),
            "num_queued_requests": self.num_queued,
            "kv_cache_usage": 1 - self._pool.num_free / self.num_blocks,
            "num_kv_blocks": self.num_blocks,
            "num_replicas": 1,
            **self._exchanged(),
        }

    def _exchanged(self) -> dict[str, float]:
        exchanged = None if self._runner is None else self._runner.exchanged()
        if exchanged is None:
            return {}
        return {
            "num_exchanges": exchanged.operations,
            "exchanged_bytes": exchanged.num_bytes,
            "exchange_seconds": exchanged.seconds,
            "exchange_wait_seconds": exchanged.waited,
        }

    def count_adapters(self) -> dict[str, tuple[int, int]]:
        """Return by adapters' names how many requests with them have begun, and how many wait."""
        return count_adapters(self._requests.values())

    def check_integrity(self) -> None:
        """Raise AssertionError unless the engine's books agree with each other."""
        alive = [s for live in self._requests.values() for s in live.sequences.values()]
        self.scheduler.check_integrity(alive)
        self._table.check_integrity(alive)
        waiting = sum(r.metrics.first_scheduled_time is None for r in self._requests.values())
        assert waiting == self._num_unscheduled, f"{waiting} wait, {self._num_unscheduled} counted"

    def close(self) -> None:
        """Drop all requests and let weights and KV cache go."""
        runner, self._runner = self._runner, None
        self._steps.close()
        self._in_flight = None
        if self.scheduler.host_blocks is not None:
            self.scheduler.host_blocks.close()
        self.abort(list(self._requests))
        if runner is not None:
            runner.close()
        self.adapters.close()
        self._constraints.close()
        self._sampler.close()


def request_failed(request_id: str, error: BaseException) -> RequestFailedError:
    """Return what is told of a request that an error ended."""
    failure = error
    if not isinstance(failure, RequestFailedError):
        failure = RequestFailedError(request_id, str(error) or type(error).__name__)
        failure.__cause__ = error
    return failure
