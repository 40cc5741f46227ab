"""`quire bench parallel`: what ranks hand over by the formula, steps on paper, and its figures."""

from __future__ import annotations

import json
import os
import random
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ranks import one_thread
from typer.testing import CliRunner

from quire import LLM
from quire.bench import cli, paper, parallel, parallel_model, ray_cost
from quire.bench.checkpoint import DIMENSIONS, random_checkpoint
from quire.bench.contest import Measurement
from quire.bench.parallel_model import WAYS, Load, Machine, Requests, Router, fleet, step_time
from quire.bench.parallel_runs import (
    OVERHEAD_MS,
    RATE,
    STEP_MS,
    Division,
    Done,
    Hardware,
    count_traffic,
    divisions,
)
from quire.bench.parallel_tables import differences, traffic_table
from quire.bench.traffic import Shape, Traffic, rank_traffic
from quire.bench.workload import uniform
from quire.engine.batch import ForwardBatch
from quire.engine.runner import ModelRunner
from quire.executor.connect import ends_by_memory
from quire.executor.rank_runner import RankRunner
from quire.executor.shard import ShardSettings, load_shard
from quire.kernels import available_backends, get_backend
from quire.models.hf_config import read_config
from quire.parallel.group import Exchanged
from quire.parallel.shared_memory import SharedMemory

native = pytest.mark.skipif(
    "cpu" not in available_backends(), reason="the native kernels were not built: no compiler"
)

CPU = torch.device("cpu")
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 304,
    "max_position_embeddings": 256,
}


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Make a random checkpoint of so many layers."""
    monkeypatch.setenv("QUIRE_BENCH_DIR", str(tmp_path / "cache"))

    def make(num_layers: int) -> Path:
        name = f"small-{num_layers}"
        own = {**DIMENSIONS["llama-small"], **SMALL, "num_hidden_layers": num_layers}
        monkeypatch.setitem(DIMENSIONS, name, own)
        return random_checkpoint(name, "float32")

    return make


# -- traffic --------------------------------------------------------------------------------------


def batch_of(num_tokens: int, num_rows: int) -> ForwardBatch:
    """Return a step of one sequence, from its beginning; so many of its tokens are asked about."""
    tokens = torch.arange(num_tokens)
    return ForwardBatch(
        input_ids=tokens % 300,
        positions=tokens,
        query_start_loc=torch.tensor([0, num_tokens], dtype=torch.int32),
        seq_lens=torch.tensor([num_tokens], dtype=torch.int32),
        block_tables=torch.arange(1, 17, dtype=torch.int32)[None],
        slot_mapping=tokens + 16,
        logits_indices=torch.arange(num_rows),
        adapter_slots=None,
    )


def run_rank(
    memory: SharedMemory, settings: ShardSettings, rank: int, steps: list[tuple[int, int, bool]]
) -> list[Exchanged]:
    """Be a rank; return what is counted after each step."""
    place = settings.place(rank)
    memory.join(rank, patience=60)
    ends = ends_by_memory(memory, place)
    model = load_shard(settings, place, ends.group, CPU)
    own = ModelRunner(
        model,
        get_backend(CPU),
        num_blocks=17,
        block_size=16,
        kv_cache_dtype=torch.float32,
        device=CPU,
    )
    runner, counted = RankRunner(own, place, ends), []
    for num_tokens, num_rows, takes_logits in steps:
        batch = batch_of(num_tokens, num_rows)
        runner.forward(batch)
        if num_rows:
            find = runner.logits if takes_logits else runner.likeliest
            find(None, batch.logits_indices)
        exchanged = runner.exchanged()
        assert exchanged is not None
        counted.append(exchanged)
    return counted


@native
@pytest.mark.parametrize("seed", range(6))
def test_ranks_hand_over_what_the_formula_has(small, seed):
    """Of drawn tokens, rows, layers, ranks and room for an exchange: operations and bytes."""
    rng = random.Random(seed)
    tensor_size = (1, 2, 2, 4)[rng.randrange(4)]
    num_stages = rng.randint(1 if tensor_size > 1 else 2, 3)
    num_layers = rng.randint(num_stages, 4)
    capacity = rng.choice((32, 1024, 1 << 16))
    steps = []
    for _ in range(4):
        tokens = rng.choice((1, rng.randint(2, 63), rng.randint(64, 200)))
        steps.append((tokens, rng.randint(0, tokens), rng.random() < 0.5))
    folder = small(num_layers)
    config = read_config(folder)
    settings = ShardSettings(
        path=str(folder),
        hf_config=dict(config),
        dtype="float32",
        device_type="cpu",
        quantization=None,
        quantization_config=None,
        max_model_len=None,
        max_adapters=0,
        num_threads=1,
        tensor_size=tensor_size,
        num_stages=num_stages,
        expert_parallel=False,
    )
    ranks = range(tensor_size * num_stages)
    with ExitStack() as stack:
        stack.enter_context(one_thread())
        first = SharedMemory.create(tensor_size, num_stages, capacity=capacity)
        memories = [first, *(SharedMemory.attach(os.dup(first.fd)) for _ in ranks[1:])]
        for memory in memories:
            stack.enter_context(memory)
        with ThreadPoolExecutor(len(ranks)) as threads:
            counted = list(
                threads.map(
                    lambda pair: run_rank(pair[0], settings, pair[1], steps),
                    zip(memories, ranks, strict=True),
                )
            )
    shape = Shape.of(config)
    for rank in ranks:
        operations = num_bytes = 0
        for (tokens, rows, takes_logits), found in zip(steps, counted[rank], strict=True):
            one = rank_traffic(
                shape,
                settings.place(rank),
                tokens,
                rows,
                takes_logits=takes_logits,
                capacity=capacity,
            )
            operations += one.operations
            num_bytes += one.num_bytes
            assert (found.operations, found.num_bytes) == (operations, num_bytes)
        assert 0 <= counted[rank][-1].waited <= counted[rank][-1].seconds


def test_the_formula_by_hand():
    """0.5B dimensions on two ranks: 49 sums of a hidden state, and one token with its logit."""
    shape = Shape.of(DIMENSIONS["qwen2.5-0.5b"])
    assert shape.layer_weights == 896 * (896 + 2 * 128) + 896 * 896 + 3 * 896 * 4864
    tensor = Division(label="", threads=1, tensor_size=2).places
    assert rank_traffic(shape, tensor[0], 1, 1) == Traffic(50, 49 * 896 * 4 + 8)
    assert rank_traffic(shape, tensor[1], 16, 16) == Traffic(50, 16 * (49 * 896 * 4 + 8))
    stages = Division(label="", threads=1, num_stages=2).places
    assert rank_traffic(shape, stages[0], 16, 16) == Traffic(3, 16 * 896 * 4)
    assert rank_traffic(shape, stages[1], 16, 16) == Traffic(3, 16 * (896 * 4 + 8))
    assert rank_traffic(shape, stages[1], 1, 1, takes_logits=True).num_bytes == 4 * (896 + 151936)
    with pytest.raises(ValueError, match="experts"):
        Shape.of_spec(_mixture())


def _mixture():
    from quire.models.registry import build_spec

    config = {**DIMENSIONS["llama-small"], "architectures": ["MixtralForCausalLM"]}
    config |= {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
    return build_spec(config)


def test_what_differs_is_told():
    """Side, rank and run are named, with both figures."""
    shape = Shape.of(DIMENSIONS["llama-small"])
    division = Division(label="TP=2", threads=1, tensor_size=2)
    workload = uniform(1, 17, 3, vocab_size=300)
    right = rank_traffic(shape, division.places[0], 1, 1)
    runs = {
        "num_steps": [3.0, 3.0],
        "num_computed_tokens": [3.0, 3.0],
        "num_generation_tokens": [3.0, 3.0],
    }
    for rank, extra in ((0, 0.0), (1, 4.0)):
        runs[f"rank{rank}_operations"] = [3.0 * right.operations] * 2
        runs[f"rank{rank}_num_bytes"] = [3.0 * right.num_bytes, 3.0 * right.num_bytes + extra]
    done = Done(workload, [(division, Measurement("TP=2", runs))])
    counted = {"one": count_traffic(done, shape)}
    assert [each.agrees for each in counted["one"]] == [True, False]
    [line] = differences(counted)
    assert "rank 1, run 2" in line
    assert "DIFFERENT" in traffic_table(counted)


@native
@pytest.mark.parametrize(
    "spread",
    [
        "tensor_parallel_size",
        pytest.param("pipeline_parallel_size", marks=pytest.mark.slow),
    ],
)
def test_an_engine_tells_what_its_ranks_exchange(tiny_llama, spread):
    """Each rank when it is asked, and rank 0 among the metrics; one process tells nothing."""
    options = {"dtype": "float32", "max_model_len": 64, "num_gpu_blocks_override": 16}
    with LLM(tiny_llama, **options) as llm:
        assert "num_exchanges" not in llm.get_metrics()
    with LLM(tiny_llama, **options, **{spread: 2}) as llm:
        llm.generate([[5, 6, 7]], use_tqdm=False)
        first, other = llm.llm_engine._runner.exchanged_of_all()
        metrics = llm.get_metrics()
    assert metrics["num_exchanges"] == first.operations
    assert metrics["exchanged_bytes"] == first.num_bytes > 0
    assert metrics["exchange_seconds"] == first.seconds >= metrics["exchange_wait_seconds"] > 0
    assert other.operations == first.operations


# -- on paper -------------------------------------------------------------------------------------

SHAPE = Shape(
    num_layers=4,
    hidden_size=10,
    vocab_size=1000,
    embedding_size=10,
    layer_weights=500,
    head_weights=10_000,
    num_heads=2,
    num_kv_heads=1,
    head_dim=5,
)
ONE = Load(num_tokens=1, num_rows=1, num_seqs=1, context=0.0)


def test_a_step_takes_what_reading_or_computing_takes():
    """Bytes over bandwidth, or operations over their rate, whichever is longer; and the engine."""
    slow_memory = Machine(bandwidth=1.0, flops=1e9, overhead=7.0)
    assert step_time(SHAPE, ONE, slow_memory).seconds == 2 * (4 * 500 + 10_000) + 7
    context = replace(ONE, context=3.0)
    read = step_time(SHAPE, context, slow_memory).layers - step_time(SHAPE, ONE, slow_memory).layers
    assert read == 4 * 3 * 2 * 5 * 2  # layers, tokens, key and value, width, bytes
    slow_core = Machine(bandwidth=1e9, flops=1.0)
    many = replace(ONE, num_tokens=8, num_rows=2)
    assert step_time(SHAPE, many, slow_core).layers == 2 * (8 * 4 * 500 + 2 * 10_000)


def test_ranks_divide_the_layers_and_exchange_for_it():
    """Sums and their latencies; a stage after the other, or beside it where a step has pieces."""
    machine = Machine(bandwidth=1.0, flops=1e9, link=10.0, latency=3.0)
    whole = step_time(SHAPE, ONE, machine)
    time = step_time(SHAPE, ONE, machine, 2)
    assert time.layers == whole.layers / 2
    assert time.exchange == 9 * (3 + 40 / 10) + 3
    ring = step_time(SHAPE, ONE, machine, 2, reduce="ring")
    assert ring.exchange == 9 * (3 + 20 / 10) + 3
    more = step_time(SHAPE, ONE, machine, 5).exchange
    assert more == 9 * (3 + 4 * 40 / 10) + 3
    staged = step_time(SHAPE, ONE, machine, 1, 2)
    assert staged.layers == whole.layers
    assert staged.exchange == 3 + 4 + 2 * 3 + 4
    slow_core = Machine(bandwidth=1e9, flops=1.0)
    long = replace(ONE, num_tokens=128, num_rows=0)
    assert step_time(SHAPE, long, slow_core, 1, 2).layers == pytest.approx(
        0.75 * step_time(SHAPE, long, slow_core).layers
    )
    with pytest.raises(ValueError, match="'tree'"):
        step_time(SHAPE, ONE, machine, 2, reduce="tree")


def test_70b_on_8_gpus_reads_an_eighth():
    """139 GB of weights over 8 times 3.35 TB/s; fewer bytes and faster memory are faster."""
    made = {(s.gpu, s.weights, s.num_seqs): s for s in paper.sheets(paper.Overhead())}
    one = made["H100", "bf16", 1].gathered
    assert one.layers == pytest.approx(139e9 / 8 / 3.35e12, rel=0.01)
    assert all(each.fits for each in made.values())
    for key, each in made.items():
        assert each.ring.seconds <= each.gathered.seconds
        if key[1] == "fp8":
            assert each.gathered.seconds < made[key[0], "bf16", key[2]].gathered.seconds
    assert paper.Overhead.through({1: 3.0, 16: 18.0}) == paper.Overhead(2.0, 1.0)
    assert paper.Overhead.through({}).seconds(9) == 0


def test_replicas_are_limited_by_hits_by_balance_or_by_the_router():
    """Prefixes that no cache has room for; groups that fall unevenly; tokens that are handed on."""
    requests = Requests(prompt_len=100, output_len=10, prefix_len=80, groups=160)
    fast = Router(processes=1, request_seconds=0.0, token_seconds=1e-9)
    common = {"token_seconds": 0.1, "prompt_token_seconds": 0.01, "cache_tokens": 3200.0}
    made = {way: fleet(4, requests, fast, **common, way=way) for way in WAYS}
    anywhere, home, bounded = (made[way] for way in WAYS)
    assert anywhere.hit == 0.25
    assert anywhere.replicas == pytest.approx(4 * 10 / (1 + 0.01 * (100 - 20)))
    assert home.hit == 1
    assert 0.5 < home.balance <= bounded.balance < 1
    assert 0.25 < bounded.hit <= 1
    few = replace(requests, groups=4)
    assert fleet(4, few, fast, **common, way=WAYS[1]).balance == pytest.approx(0.5)
    slow = Router(processes=2, request_seconds=1.0, token_seconds=0.1)
    limited = fleet(4, requests, slow, **common, way=WAYS[0])
    assert limited.router == limited.tokens_per_second == pytest.approx(2 / 0.2)
    assert limited.routers == 3
    with pytest.raises(ValueError, match="'nowhere'"):
        fleet(4, requests, fast, **common, way="nowhere")
    assert parallel_model.BOUND > 1


# -- the command ----------------------------------------------------------------------------------


def run(*arguments):
    return CliRunner().invoke(cli.app, ["parallel", *map(str, arguments)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--parts", "paper,speed"), "'speed'"),
        (("--batches", "1,few"), "'1,few'"),
        (("--dtype", "int8"), "int8"),
        (("--output-len", 100_000, "--random", "llama-small"), "--output-len"),
    ],
)
def test_what_is_wrong_is_an_error_of_usage(arguments, message, tmp_path, monkeypatch):
    """The value that is wrong is named, and nothing is measured."""
    monkeypatch.setenv("QUIRE_BENCH_DIR", str(tmp_path))
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in result.output.replace("\n", " ")


def test_ray_is_asked_for_and_must_be_there(monkeypatch, tmp_path):
    """Without it costs are assumed; with it they are what was measured."""
    monkeypatch.setattr(ray_cost, "is_there", lambda: False)
    result = run("--parts", "paper", "--ray")
    assert result.exit_code == 2
    assert "Ray is not installed" in result.output
    result = run("--parts", "paper")
    assert result.exit_code == 0
    assert "assumed" in result.output
    monkeypatch.setattr(ray_cost, "is_there", lambda: True)
    monkeypatch.setattr(ray_cost, "measure_ray", lambda: (0.5, 0.25))
    file = tmp_path / "figures.json"
    assert run("--parts", "paper", "--ray", "--json", file).exit_code == 0
    router = json.loads(file.read_text())["paper"]["router"]
    assert (router["request_seconds"], router["token_seconds"]) == (0.5, 0.25)


def test_sides_have_the_same_threads_together():
    """All of them in one process, half of them in one, half in each of two."""
    sides = divisions(8, with_ranks=True)
    assert [(d.threads, d.tensor_size, d.num_stages, d.replicas) for d in sides] == [
        (8, 1, 1, 1),
        (4, 1, 1, 1),
        (8, 2, 1, 1),
        (8, 1, 2, 1),
        (4, 1, 1, 2),
    ]
    assert [d.threads for d in divisions(1, with_ranks=False)] == [1, 1]


def test_where_ranks_are_not_native_they_are_left_out(monkeypatch):
    """And why that is so is said."""
    assert "float16" in (parallel.why_not_native("float16") or "")
    monkeypatch.setattr(parallel, "why_missing", lambda: "no compiler")
    assert parallel.why_not_native("bfloat16") == "no compiler"


def pretend(folder, sides, workloads, options, *, repeats, **_):
    """Stand for `measure_ranks`: ranks hand over one byte more in the last run of all."""
    shape = Shape.of(read_config(Path(folder)))
    done = []
    for workload in workloads:
        each = Done(workload, [(d, Measurement(d.label)) for d in sides])
        for division, measurement in each.measurements:
            steps, tokens = workload.output_lens[0], each.step_tokens(division)
            rows = each.prompts_of(division)
            figures = {"num_steps": float(steps), "num_computed_tokens": float(steps * tokens)}
            figures |= {"num_generation_tokens": float(steps * rows), RATE: 1.0}
            figures |= {STEP_MS: 4.0, OVERHEAD_MS: 1.0}
            for rank, place in enumerate(division.places if len(division.places) > 1 else []):
                one = rank_traffic(shape, place, tokens, rows)
                figures[f"rank{rank}_operations"] = float(steps * one.operations)
                figures[f"rank{rank}_num_bytes"] = float(steps * one.num_bytes)
            for _ in range(repeats):
                measurement.add(figures)
        done.append(each)
    division, measurement = done[-1].measurements[-2]
    if len(division.places) > 1:
        measurement.runs["rank1_num_bytes"][-1] += 1
    machine = {"threads": 2.0, "read_all": 2e9, "read_half": 1e9}
    machine |= {"flops_all": 2e12, "flops_half": 1e12, "latency": 1e-6, "link": 1e9}
    hardware = Hardware()
    hardware.measured.add(machine)
    return done, hardware, {"quire": "0"}


def test_figures_become_tables(small, tmp_path, monkeypatch):
    """What was measured, beside the formulas, and what differs; the same as JSON."""
    monkeypatch.setattr(parallel, "measure_ranks", pretend)
    monkeypatch.setattr(parallel, "why_missing", lambda: None)
    monkeypatch.setattr(parallel, "count_threads", lambda: 2)
    file = tmp_path / "figures.json"
    words = ("--model", small(2), "--dtype", "float32", "--batches", "2,4", "--chunk", 96)
    result = run(*words, "--repeats", 2, "--json", file)
    assert result.exit_code == 0, result.output
    assert "1 x (96 in, 1 out), PP=2, 1 thread each, rank 1, run 2" in result.output
    assert "4.00 (4.00-4.00)" in result.output
    measured = json.loads(file.read_text())["measured"]
    assert measured["options"]["max_num_batched_tokens"] >= 4 * 33
    wrong = {(name, each["label"]) for name, ranks in measured["traffic"].items()
              for each in ranks if not each["agrees"]}  # fmt: skip
    assert wrong == {("1 x (96 in, 1 out)", "PP=2, 1 thread each")}
    assert len(measured["predictions"]) == 3 * 5


def test_without_native_ranks_the_rest_is_measured(small, monkeypatch):
    """Sides of one process, and a line that says why there are no others."""
    monkeypatch.setattr(parallel, "measure_ranks", pretend)
    monkeypatch.setattr(parallel, "why_missing", lambda: "no compiler")
    words = ("--model", small(2), "--dtype", "float32", "--batches", "2", "--chunk", 0)
    result = run(*words, "--parts", "measured")
    assert result.exit_code == 0, result.output
    assert "ranks are left out, for nobody counts what they exchange: no compiler" in result.output
    assert "TP=2" not in result.output
    assert "formula" not in result.output


@native
@pytest.mark.slow
def test_every_part_has_its_figures(small, tmp_path):
    """Runs of all sides, what ranks handed over as the formula has it, and steps on paper."""
    file = tmp_path / "figures.json"
    sizes = ("--batches", "1,2", "--input-len", 20, "--output-len", 3, "--chunk", 130)
    result = run("--model", small(2), "--dtype", "float32", *sizes, "--repeats", 1, "--json", file)
    assert result.exit_code == 0, result.output
    done = json.loads(file.read_text())
    measured = done["measured"]
    assert measured["left_out"] is None
    names = ["1 x (17 in, 3 out)", "2 x (17 in, 3 out)", "1 x (130 in, 1 out)"]
    assert list(measured["workloads"]) == names
    for name, ranks in measured["traffic"].items():
        assert len(ranks) == 4
        assert all(each["agrees"] for each in ranks), (name, ranks)
        assert all(each["measured"] == each["formula"] for each in ranks)
    for name, steps in zip(names, (3, 3, 1), strict=True):
        for side in measured["workloads"][name].values():
            assert side["runs"]["num_steps"] == [steps]
    assert any("2 replicas" in label for label in measured["workloads"][names[1]])
    assert not any("2 replicas" in label for label in measured["workloads"][names[0]])
    assert {each["workload"] for each in measured["predictions"]} == set(names)
    assert len(measured["hardware"]["latency"]) == 1
    assert done["paper"]["overhead"]["step"] >= 0
    for told in ("waiting, % of that", "in all runs", "measured / model", "8 H200", "by prefix"):
        assert told in result.output
    assert "DIFFERENT" not in result.output
