"""An engine whose ranks are on two nodes of a Ray cluster gives what one process gives."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from adapters import write_adapter
from ray_clusters import WHY, actor_pids, two_nodes, wait_until

from quire import LLM, LoRARequest, SamplingParams
from quire.errors import ConfigError, QuireError, RankError
from quire.executor.ray_cluster import Bundles, RayCluster
from quire.utils.threads import apply_thread_count

ray = pytest.importorskip("ray", reason=WHY)
pytestmark = pytest.mark.slow

PROMPTS = [[5, 6, 7], [5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21], [30] * 100]
GREEDY = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
TWO = {"tensor_parallel_size": 2}
STAGES = {"pipeline_parallel_size": 2}


@pytest.fixture(scope="module")
def nodes() -> Iterator[str]:
    """Each has as many CPUs as one rank takes, so that two ranks are on two."""
    with two_nodes(apply_thread_count()) as address:
        yield address


def load(folder: Any, **options: Any) -> LLM:
    options = {"max_model_len": 128, "num_gpu_blocks_override": 64, **options}
    return LLM(folder, dtype="float32", distributed_executor_backend="ray", **options)


def texts(llm: LLM, **options: Any) -> list[list[int]]:
    prompts: list[Any] = [{"prompt_token_ids": ids} for ids in PROMPTS]
    answers = llm.generate(prompts, GREEDY, use_tqdm=False, **options)
    return [answer.outputs[0].token_ids for answer in answers]


def groups() -> list[dict[str, Any]]:
    found = ray.util.placement_group_table().values()
    return [each for each in found if each["state"] == "CREATED"]


@pytest.mark.parametrize("spread", [TWO, STAGES], ids=["tp", "pp"])
def test_two_nodes_give_what_one_process_gives(nodes, tiny_checkpoint, spread):
    folder = tiny_checkpoint("llama")
    with LLM(folder, dtype="float32", max_model_len=128, num_gpu_blocks_override=64) as whole:
        right = texts(whole)
    with load(folder, **spread) as several:
        (group,) = groups()
        assert len(set(group["bundles_to_node_id"].values())) == 2
        assert len(actor_pids("RayRank")) == 1
        assert texts(several) == right
        assert texts(several) == right  # from the prefix cache
    assert ray.is_initialized()  # that was here before
    wait_until(lambda: not actor_pids("RayRank") and not groups(), 10)


def test_adapters_are_on_both_nodes(nodes, tiny_checkpoint, tmp_path):
    folder = tiny_checkpoint("llama")
    path = write_adapter(tmp_path / "adapter", folder, seed=1)
    request = LoRARequest("adapter", 1, str(path))
    options = {"enable_lora": True, "max_model_len": 128, "num_gpu_blocks_override": 64}
    with LLM(folder, dtype="float32", **options) as whole:
        right = texts(whole, lora_request=request)
        plain = texts(whole)
    with load(folder, **TWO, **options) as several:
        assert texts(several, lora_request=request) == right != plain
        assert texts(several) == plain


def test_a_model_is_found_by_its_name_on_each_node(nodes):
    with LLM("quire/demo", dtype="float32", num_gpu_blocks_override=64) as whole:
        right = whole.generate(["The capital of"], GREEDY, use_tqdm=False)[0].outputs[0].text
    with load("quire/demo", **TWO) as several:
        answer = several.generate(["The capital of"], GREEDY, use_tqdm=False)
        assert answer[0].outputs[0].text == right


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
@pytest.mark.parametrize("spread", [TWO, STAGES], ids=["tp", "pp"])
def test_a_lost_rank_is_named_within_seconds(nodes, tiny_checkpoint, spread, how):
    """Also one that hangs, as one does whose machine is gone: it closes no connection."""
    failures: list[BaseException] = []
    llm = load(tiny_checkpoint("llama"), **spread)

    def run() -> None:
        try:
            while True:
                llm.generate([{"prompt_token_ids": [5] * 9}], GREEDY, use_tqdm=False)
        except QuireError as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    time.sleep(1)
    (pid,) = actor_pids("RayRank")
    os.kill(pid, how)
    began = time.monotonic()
    thread.join(30)
    seconds = time.monotonic() - began
    llm.close()
    assert seconds < 10
    (failure,) = failures
    assert "a rank of the model was lost: rank 1 on " in str(failure)
    if how == signal.SIGSTOP:
        assert "no sign of life for 7 s" in str(failure)
        os.kill(pid, signal.SIGKILL)  # which Ray cannot tell to end
    wait_until(lambda: not groups(), 10)


def test_what_the_cluster_has_no_room_for_says_so(nodes, monkeypatch):
    """At once where it could never be, and after a while where others use it."""
    cpus = apply_thread_count()
    cluster = RayCluster()
    with pytest.raises(ConfigError, match=f"no room for 2 ranks with {cpus + 1} CPUs each"):
        Bundles(cluster, 2, {"CPU": cpus + 1})
    with pytest.raises(ConfigError, match=r"for 3 ranks .*: it could take 2 .*Add machines"):
        Bundles(cluster, 3, {"CPU": cpus})
    with pytest.raises(ConfigError, match="no room for 2 ranks with 1 GPU each: it could take 0"):
        Bundles(cluster, 2, {"GPU": 1})
    monkeypatch.setattr("quire.executor.ray_cluster._ROOM_SECONDS", 1)
    first = Bundles(cluster, 2, {"CPU": cpus})
    with pytest.raises(ConfigError, match="others use it: 0 CPUs are free"):
        Bundles(cluster, 2, {"CPU": cpus})
    first.close()
    wait_until(lambda: not groups(), 10)
    Bundles(cluster, 2, {"CPU": cpus}).close()
    cluster.close()


def test_a_rank_that_cannot_begin_says_why(nodes, tiny_checkpoint, monkeypatch):
    """While this process waits for it."""
    monkeypatch.setattr("quire.assembly._where_found", lambda *_: {"model": "/nowhere"})
    with pytest.raises(RankError, match=r"rank 1 on .* ModelNotFoundError: .*'/nowhere'"):
        load(tiny_checkpoint("llama"), **TWO)
    wait_until(lambda: not actor_pids("RayRank") and not groups(), 10)
