"""Ranks that exchange tensors through shared memory, and are told when one of them is lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
import torch
from rank_processes import RankProcess, run_ranks

from quire.errors import DeviceLostError, RankError
from quire.kernels import available_backends
from quire.parallel.shared_memory import SharedMemory

pytestmark = pytest.mark.skipif(
    "cpu" not in available_backends(), reason="the native kernels were not built: no compiler"
)

SOON = 10.0  # seconds: far less than ranks' patience, and enough on a machine that is busy


@pytest.mark.parametrize(
    ("tensor_size", "num_stages", "capacity"), [(2, 2, 1000), (5, 1, 3)], ids=str
)
def test_every_rank_of_a_stage_gets_the_same_sums(
    tensor_size: int, num_stages: int, capacity: int
) -> None:
    """Of any shape and float type, also piece by piece, and of more ranks than there are cores."""
    most = 40 if capacity > 100 else 8
    ranks = range(tensor_size * num_stages)
    with SharedMemory.create(tensor_size, num_stages, capacity=capacity) as memory:
        hashes = run_ranks(memory, "rank_parts:exchange", ranks, seed=1, rounds=40, most=most)
    for stage in range(num_stages):
        assert len(set(hashes[stage * tensor_size : (stage + 1) * tensor_size])) == 1
    assert len(set(hashes)) == num_stages


def test_what_a_stage_sends_the_next_receives() -> None:
    """In order, around the ring, in pieces or of no size; a sender goes on before it is read."""
    with SharedMemory.create(1, 3, link_capacity=2800, link_pieces=9) as memory:
        run_ranks(memory, "rank_parts:pass_on", range(3), seed=7, rounds=60, most=200)


def test_who_waits_for_a_rank_that_was_killed_is_told() -> None:
    """Nobody has to reap the process, or to look after it, for the others to find it missing."""
    with SharedMemory.create(3) as memory:
        ranks = [
            RankProcess(memory, rank, "rank_parts:reduce_for_ever", lost=1, after=1000)
            for rank in range(3)
        ]
        for rank in (0, 2):
            found = ranks[rank].result()
            assert found["lost"] == 1
            assert found["why"] == "ended: its process is gone"
            assert found["seconds"] < SOON
        failure = memory.failure()
        assert isinstance(failure, DeviceLostError)
        assert str(failure) == "a rank of the model was lost: rank 1 ended: its process is gone"
        ranks[1].process.communicate()
        assert ranks[1].process.returncode == -signal.SIGKILL


def test_who_waits_for_a_stage_that_was_killed_is_told() -> None:
    """Also where the loss is not in the next stage."""
    with SharedMemory.create(1, 3) as memory:
        ranks = [RankProcess(memory, rank, "rank_parts:receive_for_ever") for rank in range(3)]
        for each in ranks:
            each.wait_until_ready()
        ranks[0].process.kill()
        for each in ranks[1:]:
            found = each.result()
            assert (found["lost"], found["seconds"] < SOON) == (0, True)
        ranks[0].process.communicate()


def test_an_abort_ends_all_waits() -> None:
    with SharedMemory.create(2, 2) as memory:  # rank 3 is not there
        ranks = [RankProcess(memory, rank, "rank_parts:receive_for_ever") for rank in range(2)]
        for each in ranks:
            each.wait_until_ready()
        memory.abort(3, "said so " + 300 * "and so ")
        memory.abort(1, "was second")
        for each in ranks:
            found = each.result()
            assert (found["lost"], found["seconds"] < SOON) == (3, True)
            assert found["why"].startswith("said so and so")


def test_patience_ends() -> None:
    """With a rank that lives, and with one that never comes."""
    with SharedMemory.create(2) as memory:
        ranks = [
            RankProcess(memory, rank, "rank_parts:sleep", lazy=1, seconds=60, patience=0.5)
            for rank in range(2)
        ]
        found = ranks[0].result()
        ranks[1].process.kill()
        ranks[1].process.communicate()
        assert found["why"] == "did not answer rank 0 within 0.5 seconds"
        assert found["lost"] == 1
    with SharedMemory.create(2) as memory:
        memory.join(0, patience=0.2)
        with pytest.raises(RankError, match=r"rank 1 did not answer rank 0 within 0\.2 seconds"):
            memory.group().reduce(torch.ones(3))
        with pytest.raises(RankError, match="rank 1 did not answer"):  # once lost, always lost
            memory.group().gather(torch.ones(3))


def test_a_rank_that_leaves_is_not_waited_for() -> None:
    with SharedMemory.create(2) as memory:
        memory.join(0)
        [found] = run_ranks(
            memory, "rank_parts:reduce_twice", range(1, 2), beside=_reduce_once(memory)
        )
    assert (found["lost"], found["why"]) == (0, "left while others still computed")
    assert found["seconds"] < SOON


def _reduce_once(memory: SharedMemory) -> threading.Thread:
    def reduce() -> None:
        memory.group().reduce(torch.ones(3))
        memory.close()

    return threading.Thread(target=reduce)


def test_a_message_of_another_size_is_refused() -> None:
    """Ranks that have lost step must not take one thing for another."""
    with SharedMemory.create(1, 2) as memory:
        memory.join(0)
        link = memory.link()
        link.send(torch.ones(5))
        [found] = run_ranks(memory, "rank_parts:receive", range(1, 2), size=6)
    assert found["lost"] == 0
    assert found["why"] == "sent something of another size than was waited for"


def test_nothing_is_left_of_processes_that_were_killed(tmp_path: Path) -> None:
    """The memory has no name."""
    script = (
        "import os, torch\n"
        "from quire.parallel.shared_memory import SharedMemory\n"
        "memory = SharedMemory.create(1, capacity=1 << 20)\n"
        "memory.join(0)\n"
        "memory.group().reduce(torch.ones(1 << 20))\n"
        "os.kill(os.getpid(), 9)\n"
    )
    before = _names_in_memory()
    ended = subprocess.run(
        [sys.executable, "-c", script],
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert ended.returncode == -signal.SIGKILL
    assert _names_in_memory() <= before


def _names_in_memory() -> set[str]:
    folder = Path("/dev/shm")
    return (
        {path.name for path in folder.iterdir() if "quire" in path.name}
        if folder.is_dir()
        else set()
    )


def test_time_and_bytes_are_counted() -> None:
    with SharedMemory.create(1) as memory:
        memory.join(0)
        group = memory.group()
        group.reduce(torch.ones(1000))
        group.gather(torch.ones(10, dtype=torch.float64))
        counted = memory.exchanged()
    assert (counted.operations, counted.num_bytes) == (2, 4080)
    assert 0 <= counted.waited <= counted.seconds < SOON


def test_misuse_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        SharedMemory.create(2, capacity=0)
    with SharedMemory.create(2, 2) as memory:
        with pytest.raises(RuntimeError, match="must join"):
            memory.group()
        with pytest.raises(ValueError, match="rank is 4; there are 4"):
            memory.join(4)
        memory.join(3)
        with pytest.raises(RuntimeError, match="has joined"):
            memory.join(2)
        assert memory.failure() is None
    with tempfile.TemporaryFile() as file:
        file.truncate(4096)
        with pytest.raises(ValueError, match="no memory that ranks"):
            SharedMemory.attach(os.dup(file.fileno()))


def test_waiting_costs_little() -> None:
    """A rank that waits for long leaves the core to others."""
    with SharedMemory.create(1, 2) as memory:
        memory.join(0, patience=1.0)
        used, begin = time.process_time(), time.monotonic()
        with pytest.raises(RankError):
            memory.link().receive((3,), torch.float32)
        assert time.monotonic() - begin >= 1.0
        assert time.process_time() - used < 0.5
