"""The pieces of a replicated engine, each by itself."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from quire import LogitsProcessor
from quire.config import EngineConfig
from quire.engine.cache_map import KVBlock, KVCacheMap
from quire.errors import ConfigError, EngineBusyError
from quire.executor.channel import Channel
from quire.executor.messages import pack, unpack
from quire.replicas.arguments import arguments_to_message, config_from_message
from quire.replicas.outbox import Outbox, messages_of
from quire.replicas.replicated_engine import ReplicatedEngine
from quire.replicas.replies import combine_adapters, combine_maps, combine_metrics
from quire.replicas.wire import cache_map_to_message
from quire.utils.threads import StepThreads


def config(**options: Any) -> EngineConfig:
    return EngineConfig.create("quire/demo", data_parallel_size=3, **options)


def test_a_copy_has_the_arguments_of_the_whole():
    """But for those that are this process's part."""
    given = config(
        tensor_parallel_size=2,
        max_num_seqs=7,
        enable_chunked_prefill=False,
        max_model_len=1024,
        hf_overrides={"a": [1, {"b": None}]},
        enable_lora=True,
        lora_modules={"x": "/folder"},
        seed=2**64 - 1,
    )
    found = config_from_message(unpack(pack(arguments_to_message(given))))
    expected = given.to_kwargs() | {"data_parallel_size": 1, "lora_modules": ()}
    assert found.to_kwargs() == expected


def test_processors_travel_by_name_alone(monkeypatch, tmp_path):
    (tmp_path / "importable_processor.py").write_text(
        "from quire import LogitsProcessor\n"
        "class Mine(LogitsProcessor):\n"
        "    def update(self, change): ...\n"
        "    def apply(self, logits): return logits\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    from importable_processor import Mine  # type: ignore[import-not-found]

    message = arguments_to_message(config(logits_processors=[Mine]))
    assert message["logits_processors"] == ["importable_processor:Mine"]
    assert config_from_message(message).logits_processors == (Mine,)

    class Local(LogitsProcessor):
        def update(self, change: Any) -> None: ...

        def apply(self, logits: Any) -> Any:
            return logits

    for bad in (Mine(), Local):
        with pytest.raises(ConfigError, match=r"logits_processors has .* a class at the top"):
            arguments_to_message(config(logits_processors=[bad]))


def test_an_argument_that_no_message_can_say_is_named():
    with pytest.raises(ConfigError, match=r"hf_overrides=.* data_parallel_size=3"):
        arguments_to_message(config(hf_overrides={"x": object()}))


def test_an_outbox_keeps_the_order_and_holds_nobody_up():
    """Though nobody reads for a while."""
    channel, other = Channel.pair()
    outbox, far = Outbox(channel), Channel(other)
    threads = [
        threading.Thread(
            target=lambda n=n: [outbox.put({"n": n, "i": i, "x": "x" * 9999}) for i in range(300)]
        )
        for n in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    found: list[dict[str, Any]] = []
    while len(found) < 900:
        found += messages_of(far.receive(10))
    for n in range(3):
        assert [each["i"] for each in found if each["n"] == n] == list(range(300))
    with pytest.raises(TypeError):
        outbox.put({"x": object()})
    far.close()
    outbox.put({"n": 1})
    outbox.close(5)
    channel.close()


class NothingElse:
    """Stands for an engine, or for what starts others, of which nothing more is asked."""

    tokenizer = limits = processor = adapters = lost_adapters = None
    count = 2
    num_queued = 3


def test_requests_wait_only_where_no_replica_has_room():
    whole = config(max_num_seqs=8)
    engine = ReplicatedEngine(whole, NothingElse(), NothingElse(), StepThreads(None))  # type: ignore[arg-type]
    engine._loads = [11, 7]
    engine.check_queue(1)
    engine._loads = [11, 10]
    engine.check_queue(6)
    with pytest.raises(EngineBusyError, match="5 requests wait"):
        engine.check_queue(5)
    engine._loads = [11, None]
    with pytest.raises(EngineBusyError, match="3 requests wait"):
        engine.check_queue(3)


def test_counters_are_summed_and_gauges_are_of_those_that_live():
    def of(steps: float, used: float, blocks: float) -> dict[str, float]:
        return {"num_steps": steps, "kv_cache_usage": used, "num_kv_blocks": blocks}

    total = combine_metrics([of(1, 0.5, 10), of(2, 0.25, 30)], [of(4, 1.0, 10)])
    assert total == {"num_steps": 7, "kv_cache_usage": 0.3125, "num_kv_blocks": 40}
    assert combine_metrics([of(1, 0.5, 10), {}], [{}]) == of(1, 0.5, 10)


def test_adapters_and_maps_are_put_together():
    assert combine_adapters({"a": (1, 0)}, [{"a": (1, 2), "b": (0, 1)}, None]) == {
        "a": (2, 2),
        "b": (0, 1),
    }
    own = KVCacheMap(16, [KVBlock(("1",))])
    other = KVCacheMap(16, [KVBlock((), True)])
    both = combine_maps(own, [cache_map_to_message(other), None])
    assert both == KVCacheMap(16, [KVBlock(("1",)), KVBlock((), True)])
