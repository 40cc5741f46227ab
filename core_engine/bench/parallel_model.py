"""A model on paper of a step that several ranks compute: what takes its time, by what they have."""

from __future__ import annotations

import math
import random
import statistics
from dataclasses import dataclass

from quire.bench.traffic import FLOAT, Shape
from quire.executor.pieces import count_pieces
from quire.parallel.place import Place

HALF = 2  # bytes of a bfloat16


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What a rank has.

    Attributes
    ----------
    bandwidth : float
        Bytes per second that it reads of its own memory.
    flops : float
        Operations per second.
    link : float
        Bytes per second that it takes in from the others.
    latency : float
        Seconds of an exchange of next to nothing.
    overhead : float
        Seconds of a step that the engine takes beside the model.
    memory_bytes : float
        Of the rank; infinite: nobody asks.
    """

    bandwidth: float
    flops: float
    link: float = math.inf
    latency: float = 0.0
    overhead: float = 0.0
    memory_bytes: float = math.inf


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What a step computes, and in what form.

    Attributes
    ----------
    num_tokens : int
    num_rows : int
        Tokens after which one is chosen.
    num_seqs : int
        Sequences whose keys and values are read.
    context : float
        Tokens of each, on average over the step.
    weight_bytes, head_bytes, cache_bytes : float
        Of a number in the layers, in the output matrix, and in the KV cache.
    """

    num_tokens: int
    num_rows: int
    num_seqs: int
    context: float
    weight_bytes: float = HALF
    head_bytes: float = HALF
    cache_bytes: float = HALF


@dataclass(frozen=True, slots=True)
class StepTime:
    """Where the seconds of a step go.

    Attributes
    ----------
    layers : float
        Reading or computing, whichever takes longer, on all stages after each other.
    exchange : float
        Handing over.
    overhead : float
    """

    layers: float
    exchange: float
    overhead: float

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.layers + self.exchange + self.overhead


def step_time(
    shape: Shape,
    load: Load,
    machine: Machine,
    tensor_size: int = 1,
    num_stages: int = 1,
    *,
    reduce: str = "gather",
) -> StepTime:
    """Return how long a step takes.

    Parameters
    ----------
    shape, load
    machine
        Of each rank.
    tensor_size, num_stages
    reduce
        How sums are made: ``"gather"``, as `quire.parallel` does: each rank takes in all others'
        parts in float32; ``"ring"``: the ring all-reduce, in two bytes a number.
    """
    pieces = count_pieces(load.num_tokens, num_stages) if num_stages > 1 else 1
    stages = [
        _stage_seconds(
            shape, load, machine, Place.of_rank(s * tensor_size, tensor_size, num_stages), pieces
        )
        for s in range(num_stages)
    ]
    layers = sum(stages) + (pieces - 1) * max(stages)
    per_piece = load.num_tokens / pieces * FLOAT
    exchange = 0.0
    if tensor_size > 1:
        width = per_piece * shape.hidden_size
        one = machine.latency + _taken_in(width, tensor_size, reduce) / machine.link
        # One stage's sums beside another's: those of the longest way through.
        own = math.ceil(shape.num_layers / num_stages)
        sums = 2 * shape.num_layers + 1 + (pieces - 1) * 2 * own
        exchange += sums * one + machine.latency  # and the rows' likeliest
    if num_stages > 1:
        ways = num_stages - 1 + pieces - 1
        exchange += ways * (machine.latency + per_piece * shape.hidden_size / machine.link)
        home = load.num_tokens * shape.hidden_size * FLOAT
        exchange += 2 * machine.latency + home / machine.link  # hidden states, and the rows'
    return StepTime(layers, exchange, machine.overhead)


def _taken_in(num_bytes: float, size: int, reduce: str) -> float:
    if reduce == "gather":
        return (size - 1) * num_bytes
    if reduce == "ring":
        return 2 * (size - 1) / size * num_bytes * HALF / FLOAT
    raise ValueError(f"reduce is {reduce!r}; it must be 'gather' or 'ring'")


def _stage_seconds(shape: Shape, load: Load, machine: Machine, place: Place, pieces: int) -> float:
    """Return the time of one rank of a stage for one of a step's pieces."""
    size, layers = place.tensor_size, len(place.layers(shape.num_layers))
    kv_heads = max(1.0, shape.num_kv_heads / size)
    kv_row = 2 * kv_heads * shape.head_dim * load.cache_bytes * layers
    read = layers * shape.layer_weights * load.weight_bytes / size
    read += load.num_seqs * load.context * kv_row
    tokens = load.num_tokens / pieces
    flops = 2 * tokens * layers * shape.layer_weights / size
    flops += 4 * tokens * load.context * shape.num_heads * shape.head_dim * layers / size
    if place.is_last_stage and load.num_rows:
        read += shape.head_weights * load.head_bytes / size / pieces  # once, after all pieces
        flops += 2 * load.num_rows * shape.head_weights / size / pieces
    return max(read / machine.bandwidth, flops / machine.flops)


def memory_bytes(shape: Shape, load: Load, tensor_size: int = 1) -> float:
    """Return what weights and KV cache take on each rank of a stage that has all layers."""
    tables = 2 * shape.head_weights * load.head_bytes
    weights = shape.num_layers * shape.layer_weights * load.weight_bytes + tables
    return weights / tensor_size + load.num_seqs * load.context * cache_row(
        shape, load, tensor_size
    )


def cache_row(shape: Shape, load: Load, tensor_size: int = 1) -> float:
    """Return the bytes of a token's keys and values on a rank that has all layers."""
    kv_heads = max(1.0, shape.num_kv_heads / tensor_size)
    return 2 * kv_heads * shape.head_dim * load.cache_bytes * shape.num_layers


# -- replicas ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Requests:
    """What replicas are asked, all of the time.

    Attributes
    ----------
    prompt_len, output_len : int
    prefix_len : int
        Tokens with which the prompts of a group begin.
    groups : int
        Of prompts that begin alike, equally often asked for.
    """

    prompt_len: int
    output_len: int
    prefix_len: int
    groups: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Router:
    """What stands before the replicas.

    Attributes
    ----------
    processes : int
    request_seconds, token_seconds : float
        That one of them is busy with a request, and with a token that it hands on.
    """

    processes: int
    request_seconds: float
    token_seconds: float

    def tokens_per_second(self, requests: Requests) -> float:
        """Return the output tokens that it lets through, at most."""
        own = self.request_seconds / requests.output_len + self.token_seconds
        return self.processes / own


@dataclass(frozen=True, slots=True)
class Fleet:
    """What replicas give together.

    Attributes
    ----------
    hit : float
        Share of the prefixes' tokens that are found in a cache.
    balance : float
        The mean replica's load over that of the one with the most.
    replicas, router : float
        Output tokens per second that the replicas, and the router, are good for.
    """

    hit: float
    balance: float
    replicas: float
    router: float

    @property
    def tokens_per_second(self) -> float:
        """What comes out."""
        return min(self.replicas, self.router)

    @property
    def routers(self) -> int:
        """Return how many such routers the replicas would need."""
        return math.ceil(self.replicas / self.router)


WAYS = ("any replica", "by prefix", "by prefix, bounded")
"""How requests find a replica: the least busy; that of their prefix; the same, as long as it has
no more than `BOUND` times the mean, else the least busy (Mirrokni et al., arXiv:1608.01350)."""

BOUND = 1.25


def fleet(
    count: int,
    requests: Requests,
    router: Router,
    *,
    token_seconds: float,
    prompt_token_seconds: float,
    cache_tokens: float,
    way: str,
) -> Fleet:
    """Return what replicas give together that all have as many requests as they take.

    Parameters
    ----------
    count
        Replicas.
    requests, router
    token_seconds, prompt_token_seconds
        That one replica takes, its requests together, for a token of an output and of a prompt.
    cache_tokens
        That a replica keeps of prefixes.
    way
        One of `WAYS`.
    """
    wanted = requests.groups * requests.prefix_len
    anywhere, at_home = (min(1.0, room / wanted) for room in (cache_tokens, count * cache_tokens))
    if way == "any replica":
        hit, balance = anywhere, 1.0
    else:
        most, spilled = _placed(requests.groups, count, BOUND)
        if way == "by prefix":
            hit, balance = at_home, 1 / most
        elif way == "by prefix, bounded":
            hit, balance = at_home * (1 - spilled) + anywhere * spilled, 1 / min(most, BOUND)
        else:
            raise ValueError(f"way is {way!r}; it must be one of {', '.join(WAYS)}")
    computed = requests.prompt_len - hit * requests.prefix_len
    seconds = requests.output_len * token_seconds + computed * prompt_token_seconds
    rate = count * balance * requests.output_len / seconds
    return Fleet(hit, balance, rate, router.tokens_per_second(requests))


def _placed(groups: int, count: int, bound: float, draws: int = 200) -> tuple[float, float]:
    """Return what groups put by chance make: the most of a replica, over the mean; what is over.

    Medians of some draws from a fixed seed.
    """
    rng = random.Random(0)
    most, over = [], []
    for _ in range(draws):
        loads = [0.0] * count
        for _ in range(groups):
            loads[rng.randrange(count)] += count / groups
        most.append(max(loads))
        over.append(sum(max(0.0, load - bound) for load in loads) / count)
    return statistics.median(most), statistics.median(over)
