"""Metrics: what Prometheus is told of a server, under the names that vLLM has for it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.gc_collector import GCCollector
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

from quire.sampling_params import RequestOutputKind
from quire.server.histogram import Histogram, steps_of_1_2_5
from quire.server.http_metrics import HttpMetrics
from quire.server.record import RequestRecord

if TYPE_CHECKING:
    from quire.config import EngineConfig
    from quire.outputs import RequestOutput
    from quire.sampling_params import SamplingParams

# The bounds are vLLM's, so that quantiles in a dashboard come out alike.
_FIRST_TOKEN = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
_PER_TOKEN = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
_LATENCY = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0),
    *(40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
_N = (1.0, 2.0, 5.0, 10.0, 20.0)

_COUNTERS = {
    "prompt_tokens": ("num_prompt_tokens", "Tokens of prompts that were scheduled."),
    "generation_tokens": ("num_generation_tokens", "Tokens that were generated."),
    "prefix_cache_queries": ("num_prompt_tokens", "Tokens looked for in the prefix cache."),
    "prefix_cache_hits": ("num_cached_tokens", "Tokens found there."),
    "num_preemptions": ("num_preemptions", "Sequences that had to give up their blocks."),
    "num_swapped_out": ("num_swapped_out", "Blocks of theirs copied to the host's memory."),
    "num_swapped_in": ("num_swapped_in", "Blocks copied back from there."),
    "engine_restarts": ("num_restarts", "Steps that broke down, with what was in flight."),
}
_GAUGES = {
    "num_requests_running": ("num_running_seqs", "Sequences that are computed."),
    "num_requests_waiting": ("num_waiting_seqs", "Sequences that wait."),
    "kv_cache_usage_perc": ("kv_cache_usage", "Share of the KV cache in use; 1 is all of it."),
    "engine_replicas": ("num_replicas", "Copies of the engine that run."),
    "gpu_cache_usage_perc": ("kv_cache_usage", "The same by its older name, on any device."),
}


class Metrics:
    """What a server's requests were like.

    Written by the event loop's thread alone. The engine counts for itself and is asked when
    somebody reads: its counters by name, and by adapter the requests that run and that wait.

    Parameters
    ----------
    model_name : str
        The label of all of the engine's metrics.
    prefix : str
        Stands before their names.
    config : EngineConfig
    max_model_len : int
        Longest request, for the bounds of histograms.
    """

    def __init__(
        self, model_name: str, prefix: str, config: EngineConfig, max_model_len: int
    ) -> None:
        self.http = HttpMetrics()
        self.engine: Mapping[str, float] | None = None
        self.adapters: Mapping[str, tuple[int, int]] | None = None
        self._prefix = prefix
        self._labels = {"model_name": model_name, "engine": "0"}
        self._config = config
        self._ended = dict.fromkeys(("stop", "length", "abort", "error"), 0)
        lengths = steps_of_1_2_5(max_model_len)
        self.first_token = Histogram(_FIRST_TOKEN)
        self.between_tokens = Histogram(_PER_TOKEN)
        self.per_token = Histogram(_PER_TOKEN)
        self.whole = Histogram(_LATENCY)
        self.queued = Histogram(_LATENCY)
        self.inference = Histogram(_LATENCY)
        self.prefill = Histogram(_LATENCY)
        self.decode = Histogram(_LATENCY)
        self.prompt_lengths = Histogram(lengths)
        self.generated_lengths = Histogram(lengths)
        self.longest_generated = Histogram(lengths)
        self.max_tokens = Histogram(lengths)
        self.n = Histogram(_N)
        self.registry = CollectorRegistry(auto_describe=False)
        self.registry.register(self)
        self.registry.register(self.http)
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        GCCollector(registry=self.registry)

    def watch(self, params: SamplingParams, record: RequestRecord | None) -> RequestWatch:
        """Return what is to be shown the outputs of one request."""
        return RequestWatch(self, params, record)

    def count_end(self, reason: str) -> None:
        """Count a request that ended so."""
        self._ended[reason] = self._ended.get(reason, 0) + 1

    def collect(self) -> Iterator[Metric]:
        """Yield the engine's metrics, as they are now."""
        names, values = list(self._labels), list(self._labels.values())
        engine = self.engine
        if engine is not None:
            for name, (source, told) in _COUNTERS.items():
                counter = CounterMetricFamily(self._prefix + name, told, labels=names)
                counter.add_metric(values, engine[source])
                yield counter
            for name, (source, told) in _GAUGES.items():
                gauge = GaugeMetricFamily(self._prefix + name, told, labels=names)
                gauge.add_metric(values, engine[source])
                yield gauge
            # The engine keeps how many steps there were and what they computed, and no more.
            steps = [("+Inf", engine["num_steps"])]
            yield self._family(
                "iteration_tokens_total", "Tokens per step.", steps, engine["num_computed_tokens"]
            )
            yield self._cache_config(engine)
        if self.adapters is not None:
            yield self._adapters(self.adapters)
        ended = CounterMetricFamily(
            self._prefix + "request_success",
            "Requests that ended, by reason.",
            labels=[*names, "finished_reason"],
        )
        for reason, count in self._ended.items():
            ended.add_metric([*values, reason], count)
        yield ended
        for name, told, histogram in (
            ("time_to_first_token_seconds", "From arrival to the first token.", self.first_token),
            ("inter_token_latency_seconds", "From token to token.", self.between_tokens),
            ("time_per_output_token_seconds", "The same by its older name.", self.between_tokens),
            (
                "request_time_per_output_token_seconds",
                "A request's mean time from token to token.",
                self.per_token,
            ),
            ("e2e_request_latency_seconds", "From arrival to the last token.", self.whole),
            ("request_queue_time_seconds", "From arrival to the first step.", self.queued),
            ("request_inference_time_seconds", "From the first step to the last.", self.inference),
            ("request_prefill_time_seconds", "Until the first token.", self.prefill),
            ("request_decode_time_seconds", "From there to the last.", self.decode),
            ("request_prompt_tokens", "Tokens of prompts.", self.prompt_lengths),
            ("request_generation_tokens", "Tokens of answers.", self.generated_lengths),
            (
                "request_max_num_generation_tokens",
                "Tokens of the longest completion of a request.",
                self.longest_generated,
            ),
            ("request_params_max_tokens", "Most tokens that were asked for.", self.max_tokens),
            ("request_params_n", "Completions that were asked for.", self.n),
        ):
            yield self._family(name, told, histogram.buckets(), histogram.sum)

    def _family(
        self, name: str, told: str, buckets: list[tuple[str, float]], total: float
    ) -> HistogramMetricFamily:
        family = HistogramMetricFamily(self._prefix + name, told, labels=list(self._labels))
        family.add_metric(list(self._labels.values()), buckets, total)
        return family

    def _cache_config(self, engine: Mapping[str, float]) -> GaugeMetricFamily:
        cache = self._config.cache
        facts = {
            "engine": self._labels["engine"],
            "block_size": str(cache.block_size),
            "cache_dtype": cache.kv_cache_dtype,
            "num_gpu_blocks": str(int(engine["num_kv_blocks"])),
            "num_gpu_blocks_override": str(cache.num_gpu_blocks_override),
            "enable_prefix_caching": str(cache.enable_prefix_caching),
            "gpu_memory_utilization": str(cache.gpu_memory_utilization),
            "kv_cache_memory_bytes": str(cache.kv_cache_memory_bytes),
        }
        family = GaugeMetricFamily(
            self._prefix + "cache_config_info", "How the KV cache is cut up.", labels=list(facts)
        )
        family.add_metric(list(facts.values()), 1)
        return family

    def _adapters(self, counts: Mapping[str, tuple[int, int]]) -> GaugeMetricFamily:
        """Return the names of adapters as vLLM has them: in one sample, whose value is the time."""
        running = sorted(name for name, (begun, _) in counts.items() if begun)
        waiting = sorted(name for name, (_, waiting) in counts.items() if waiting)
        labels = {
            "max_lora": str(self._config.lora.max_loras),
            "running_lora_adapters": ",".join(running),
            "waiting_lora_adapters": ",".join(waiting),
        }
        family = GaugeMetricFamily(
            self._prefix + "lora_requests_info",
            "Adapters of the requests that run, and of those that wait.",
            labels=list(labels),
        )
        family.add_metric(list(labels.values()), time.time())
        return family


class RequestWatch:
    """Is shown the outputs of one request, and tells the metrics.

    Parameters
    ----------
    metrics : Metrics
    params : SamplingParams
    record : RequestRecord or None
        Of the HTTP request that it belongs to.
    """

    __slots__ = ("_begun", "_counts", "_last", "_max_tokens", "_metrics", "_n", "_news", "_record")

    def __init__(
        self, metrics: Metrics, params: SamplingParams, record: RequestRecord | None
    ) -> None:
        self._metrics = metrics
        self._record = record
        self._news = params.output_kind is RequestOutputKind.DELTA
        self._max_tokens = params.max_tokens
        self._n = params.n
        self._counts: dict[int, int] = {}
        self._last: float | None = None
        self._begun = False

    def show(self, output: RequestOutput) -> None:
        """Take in the next output."""
        later = 0  # tokens that came after another one of their completion
        counts = self._counts
        for completion in output.outputs:
            size = len(completion.token_ids)
            before = counts.get(completion.index, 0)
            after = before + size if self._news else size
            counts[completion.index] = after
            later += after - max(before, min(after, 1))
        now = time.monotonic()
        if not self._begun:
            self._begin(output)
        if later > 0 and self._last is not None:
            # Several completions have their tokens at once.
            rounds = max(1.0, later / len(output.outputs))
            self._metrics.between_tokens.observe((now - self._last) / rounds, later)
        if self._begun:
            self._last = now
        if output.finished:
            self._finish(output)

    def _begin(self, output: RequestOutput) -> None:
        """Take in the first output that has a token, or the end that comes before one."""
        times = output.metrics
        first = None if times is None else times.first_token_time
        if first is None and not output.finished:
            return
        self._begun = True
        if self._record is not None:
            self._record.num_prompt_tokens += len(output.prompt_token_ids)
        if times is not None and first is not None:
            self._metrics.first_token.observe(first - times.arrival_time)
            # What else the output has came from then on, one token after the other.
            self._last = first

    def _finish(self, output: RequestOutput) -> None:
        metrics, times = self._metrics, output.metrics
        generated = sum(self._counts.values())
        prompt = len(output.prompt_token_ids)
        reasons = [completion.finish_reason for completion in output.outputs]
        metrics.count_end(next((reason for reason in reasons if reason), "stop"))
        metrics.prompt_lengths.observe(prompt)
        metrics.generated_lengths.observe(generated)
        metrics.longest_generated.observe(max(self._counts.values(), default=0))
        metrics.n.observe(self._n)
        if self._max_tokens is not None:
            metrics.max_tokens.observe(self._max_tokens)
        if self._record is not None:
            self._record.num_generated_tokens += generated
        if times is None or times.finished_time is None:
            return
        end = times.finished_time
        metrics.whole.observe(end - times.arrival_time)
        begun, first = times.first_scheduled_time, times.first_token_time
        if begun is not None:
            metrics.queued.observe(begun - times.arrival_time)
            metrics.inference.observe(end - begun)
            if first is not None:
                metrics.prefill.observe(first - begun)
        if first is not None:
            metrics.decode.observe(end - first)
            if generated > self._n:
                metrics.per_token.observe((end - first) * self._n / (generated - self._n))

    def fail(self, reason: str) -> None:
        """Take in that nothing more comes."""
        self._metrics.count_end(reason)
        if self._record is not None:
            self._record.num_generated_tokens += sum(self._counts.values())
