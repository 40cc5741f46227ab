"""What ranks do in tests; see rank_processes.py."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import time
from itertools import count

import torch

from quire.parallel.shared_memory import SharedMemory


def numbers_of(rank: int, seed: int, shape: tuple[int, ...]) -> torch.Tensor:
    """What a rank has to offer in one exchange: every process knows everybody's."""
    generator = torch.Generator().manual_seed(seed * 1000 + rank)
    return torch.randn(shape, generator=generator)


def exchange(memory: SharedMemory, *, seed: int, rounds: int, most: int) -> str:
    """Reduce and gather tensors of random sizes; a hash of all that came of it."""
    group, rng, digest = memory.group(), random.Random(seed), hashlib.sha256()
    size, first = group.size, memory.place.rank - group.rank
    for number in range(rounds):
        shape = (rng.randint(1, most), rng.choice([1, 3, 16, 33]))
        dtype = rng.choice([torch.float32, torch.bfloat16, torch.float16])
        parts = [numbers_of(first + r, seed + number, shape).to(dtype) for r in range(size)]
        expected = parts[0].float()
        for part in parts[1:]:
            expected = expected + part.float()
        total = group.reduce(parts[group.rank].clone())
        assert torch.equal(total, expected.to(dtype)), number
        digest.update(total.float().numpy().tobytes())
        if rng.random() < 0.5:
            all_parts = group.gather(parts[group.rank])
            if group.rank == 0:
                assert all_parts is not None
                assert torch.equal(all_parts, torch.stack(parts))
            else:
                assert all_parts is None
    return digest.hexdigest()


def pass_on(memory: SharedMemory, *, seed: int, rounds: int, most: int) -> bool:
    """Send tensors of random sizes from stage to stage, and back from the last to the first."""
    link, rng, place = memory.link(), random.Random(seed), memory.place
    ahead = rng.randint(1, 3)  # on their way at once
    waiting: list[torch.Tensor] = []
    for number in range(rounds):
        x = numbers_of(place.tensor_rank, seed + number, (rng.randint(0, most), 7))
        if place.is_first_stage:
            link.send(x)
            waiting.append(x + memory.num_stages - 1)
            if len(waiting) >= ahead or number == rounds - 1:
                for expected in waiting:
                    back = link.receive(expected.shape, torch.float32)
                    torch.testing.assert_close(back, expected)
                waiting.clear()
        else:
            link.send(link.receive(x.shape, torch.float32) + 1)
    return True


def reduce_for_ever(memory: SharedMemory, *, lost: int, after: int) -> None:
    """Reduce until a rank is lost, which that one is, by signal 9, after a number of rounds."""
    group = memory.group()
    x = torch.ones(100)
    for number in count():
        if memory.place.rank == lost and number == after:
            os.kill(os.getpid(), signal.SIGKILL)
        group.reduce(x.clone())


def reduce_twice(memory: SharedMemory) -> None:
    """Reduce once more than the other does."""
    group = memory.group()
    assert torch.equal(group.reduce(torch.ones(3)), torch.full((3,), 2.0))
    group.reduce(torch.ones(3))


def receive(memory: SharedMemory, *, size: int) -> None:
    """Wait for so many numbers."""
    memory.link().receive((size,), torch.float32)


def receive_for_ever(memory: SharedMemory) -> None:
    """Say that it is ready, and wait for what nobody sends."""
    print("ready", flush=True)
    memory.link().receive((10,), torch.float32)


def sleep(memory: SharedMemory, *, lazy: int, seconds: float) -> None:
    """Reduce, but for one rank, which does nothing for some time."""
    if memory.place.rank == lazy:
        time.sleep(seconds)
    memory.group().reduce(torch.ones(10))
