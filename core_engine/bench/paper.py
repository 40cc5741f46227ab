"""The model on paper for machines that nobody measured here: 70B on 8 GPUs, and 16 replicas."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from quire.bench.parallel_model import (
    WAYS,
    Fleet,
    Load,
    Machine,
    Requests,
    Router,
    StepTime,
    cache_row,
    fleet,
    memory_bytes,
    step_time,
)
from quire.bench.report import table
from quire.bench.traffic import Shape

_LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
SIZES = {
    "70B": {
        **_LLAMA,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
    },
    "8B": {
        **_LLAMA,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
}
"""Dimensions of Llama 3."""

LATENCY = 20e-6
"""Of an exchange among 8 GPUs: assumed, not published."""

GPUS = {
    "H100": Machine(
        bandwidth=3.35e12, flops=989e12, link=450e9, latency=LATENCY, memory_bytes=80e9
    ),
    "H200": Machine(
        bandwidth=4.8e12, flops=989e12, link=450e9, latency=LATENCY, memory_bytes=141e9
    ),
}
"""NVIDIA's data sheets of the SXM boards: dense bfloat16, and NVLink's 900 GB/s in both directions
together."""

BATCHES = (1, 64, 256)
FORMATS = {"bf16": 2.0, "fp8": 1.0}
"""Bytes of a weight in the layers; the output matrix and the KV cache stay in bfloat16, and
products are of bfloat16 either way."""

CONTEXT = 2048
USED = 0.9
"""Of a GPU's memory, by weights and KV cache."""

ROUTER = Router(processes=1, request_seconds=1e-3, token_seconds=50e-6)
"""Assumed; `quire.bench.ray_cost` measures it."""

REPLICAS = 16
REQUESTS = Requests(prompt_len=1024, output_len=256, prefix_len=768, groups=64)
GROUPS = (64, 4096)
SEQS = 64
"""Requests at once of a replica."""


@dataclass(frozen=True, slots=True)
class Overhead:
    """What the engine itself takes of a step.

    Attributes
    ----------
    step, row : float
        Seconds of a step, and of each sequence of it.
    """

    step: float = 0.0
    row: float = 0.0

    @classmethod
    def through(cls, points: dict[int, float]) -> Overhead:
        """Draw a line through the seconds of a step by the number of sequences."""
        if not points:
            return cls()
        few, many = min(points), max(points)
        row = max(0.0, (points[many] - points[few]) / (many - few)) if many > few else 0.0
        return cls(max(0.0, points[few] - few * row), row)

    def seconds(self, num_rows: int) -> float:
        """Return what a step takes."""
        return self.step + num_rows * self.row


def decode_load(num_seqs: int, weight_bytes: float) -> Load:
    """Return a step that computes a token of each sequence."""
    return Load(
        num_tokens=num_seqs,
        num_rows=num_seqs,
        num_seqs=num_seqs,
        context=CONTEXT,
        weight_bytes=weight_bytes,
    )


@dataclass(frozen=True, slots=True)
class Sheet:
    """A step of 70B on 8 GPUs.

    Attributes
    ----------
    gpu, weights : str
    num_seqs : int
    fits : bool
    gathered, ring : StepTime
        With sums as they are made, and by a ring.
    """

    gpu: str
    weights: str
    num_seqs: int
    fits: bool
    gathered: StepTime
    ring: StepTime


def sheets(overhead: Overhead) -> list[Sheet]:
    """Return all steps of 70B, divided among 8 GPUs by tensors."""
    shape, made = Shape.of(SIZES["70B"]), []
    for gpu, machine in GPUS.items():
        for name, weight_bytes in FORMATS.items():
            for num_seqs in BATCHES:
                load = decode_load(num_seqs, weight_bytes)
                own = replace(machine, overhead=overhead.seconds(num_seqs))
                made.append(
                    Sheet(
                        gpu,
                        name,
                        num_seqs,
                        memory_bytes(shape, load, 8) <= USED * machine.memory_bytes,
                        step_time(shape, load, own, 8),
                        step_time(shape, load, own, 8, reduce="ring"),
                    )
                )
    return made


def sheet_table(made: list[Sheet]) -> str:
    """Return the table of `sheets`."""
    rows = [
        ["GPUs", "weights", "batch", "layers, ms", "exchanges, ms", "engine, ms", "step, ms",
         "tok/s", "tok/s, ring in bf16"]
    ]  # fmt: skip
    for each in made:
        time = each.gathered
        rows.append(
            [
                f"8 {each.gpu}",
                each.weights,
                str(each.num_seqs),
                f"{1e3 * time.layers:.2f}",
                f"{1e3 * time.exchange:.2f}",
                f"{1e3 * time.overhead:.2f}",
                f"{1e3 * time.seconds:.2f}" + ("" if each.fits else " (does not fit)"),
                f"{each.num_seqs / time.seconds:,.0f}",
                f"{each.num_seqs / each.ring.seconds:,.0f}",
            ]
        )
    return table(rows)


@dataclass(frozen=True, slots=True)
class FleetRow:
    """Replicas of a kind, and what they are asked.

    Attributes
    ----------
    replica : str
    groups : int
    way : str
    fleet : Fleet
    """

    replica: str
    groups: int
    way: str
    fleet: Fleet


def fleets(overhead: Overhead, router: Router) -> list[FleetRow]:
    """Return what 16 replicas give, by what a replica is, what is asked, and how it is balanced."""
    made = []
    for name, size in (("70B", 8), ("8B", 1)):
        shape = Shape.of(SIZES[name])
        machine = replace(GPUS["H100"], overhead=overhead.seconds(SEQS))
        load = decode_load(SEQS, 2.0)
        chunk = Load(num_tokens=512, num_rows=0, num_seqs=1, context=REQUESTS.prompt_len / 2)
        # What sequences at work do not have of the KV cache keeps prefixes.
        row = cache_row(shape, load, size)
        room = USED * machine.memory_bytes - memory_bytes(shape, replace(load, context=0.0), size)
        running = SEQS * (REQUESTS.prompt_len + REQUESTS.output_len)
        for groups in GROUPS:
            for way in WAYS:
                done = fleet(
                    REPLICAS,
                    replace(REQUESTS, groups=groups),
                    router,
                    token_seconds=step_time(shape, load, machine, size).seconds / SEQS,
                    prompt_token_seconds=step_time(shape, chunk, machine, size).seconds / 512,
                    cache_tokens=max(0.0, room / row - running),
                    way=way,
                )
                made.append(FleetRow(f"{name} on {size} H100", groups, way, done))
    return made


def fleet_table(made: list[FleetRow]) -> str:
    """Return the table of `fleets`."""
    rows = [
        ["replica", "prefixes", "goes to", "prefix hits", "balance", "replicas, tok/s",
         "one router, tok/s", "routers needed"]
    ]  # fmt: skip
    for each in made:
        done = each.fleet
        rows.append(
            [
                each.replica,
                str(each.groups),
                each.way,
                f"{done.hit:.0%}",
                f"{done.balance:.2f}",
                f"{done.replicas:,.0f}",
                f"{done.router:,.0f}",
                str(done.routers),
            ]
        )
    return table(rows)
