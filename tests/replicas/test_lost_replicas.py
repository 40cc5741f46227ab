"""Whatever becomes of a replica: who waits for it is told, and the others go on."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from quire import LLM, SamplingParams
from quire.errors import EngineClosedError, QuireError, ReplicaError, RequestFailedError

LONG = SamplingParams(temperature=0, max_tokens=1900, ignore_eos=True)
SHORT = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
PROMPTS = [{"prompt_token_ids": [5, 6, 7 + i]} for i in range(4)]


@pytest.fixture
def llm():
    with LLM("quire/demo", data_parallel_size=2, num_gpu_blocks_override=600) as made:
        yield made


def process_of(llm: LLM) -> subprocess.Popen[bytes]:
    [replica] = llm.llm_engine._copies.replicas
    return replica.process


def begun(llm: LLM) -> list[Any]:
    """Return streams that have begun, half of them here."""
    streams = [llm.stream(prompt, LONG) for prompt in PROMPTS]
    for stream in streams:
        next(stream)
    return streams


def ends(streams: list[Any]) -> list[QuireError]:
    """Read streams until half of them have failed, and close the others, which go on."""
    errors: list[QuireError] = []
    left = list(streams)
    while len(errors) < 2:
        for stream in list(left):
            try:
                next(stream)
            except QuireError as error:
                errors.append(error)
                left.remove(stream)
    for stream in left:
        next(stream)
        stream.close()
    return errors


def test_a_killed_replica_is_told_at_once_and_the_other_goes_on(llm, caplog):
    streams = begun(llm)
    counted = llm.get_metrics()["num_requests"]
    assert counted == len(PROMPTS)
    with caplog.at_level(logging.ERROR, "quire"):
        process_of(llm).kill()
        killed = time.monotonic()
        for error in ends(streams):
            assert isinstance(error, RequestFailedError)
            assert isinstance(error.__cause__, ReplicaError)
            assert "replica 1 of the engine was lost: it was ended by SIGKILL" in str(error)
        assert time.monotonic() - killed < 20
    assert "2 requests end with it, and 1 of 2 replicas go on" in caplog.text
    outputs = llm.generate(PROMPTS, SHORT, use_tqdm=False)
    assert all(output.finished for output in outputs)
    metrics = llm.get_metrics()
    assert metrics["num_replicas"] == 1
    assert metrics["num_failed_requests"] == 2
    # What it had counted, as far as it was known, is not lost with it.
    assert metrics["num_requests"] == counted + len(PROMPTS)
    assert metrics["num_unfinished_requests"] == 0
    assert llm.reset_prefix_cache() is True


def test_closing_in_the_middle_ends_everything(llm):
    streams = begun(llm)
    process = process_of(llm)
    began = time.monotonic()
    llm.close()
    assert time.monotonic() - began < 20
    for stream in streams:
        with pytest.raises(EngineClosedError):
            list(stream)
    assert process.poll() == 0


@pytest.mark.slow
def test_a_replica_that_dies_while_nothing_runs_costs_no_request(llm):
    process_of(llm).kill()
    process_of(llm).wait()
    time.sleep(0.2)
    assert len(llm.generate(PROMPTS, SHORT, use_tqdm=False)) == len(PROMPTS)
    assert llm.get_metrics()["num_replicas"] == 1


@pytest.mark.slow
def test_a_replica_that_hangs_is_given_up(llm):
    """And its process goes although it would not."""
    streams = begun(llm)
    process_of(llm).send_signal(signal.SIGSTOP)
    began = time.monotonic()
    metrics = llm.get_metrics()  # of the one that answers
    assert time.monotonic() - began < 20
    assert metrics["num_steps"] > 0
    while llm.get_metrics()["num_replicas"] == 2:
        assert time.monotonic() - began < 30
    assert process_of(llm).wait(5) == -signal.SIGKILL
    told = []
    for stream in streams:
        try:
            for _ in stream:
                pass
        except RequestFailedError as error:
            told.append(str(error))
    assert len(told) == 2
    assert "replica 1 of the engine was lost: it gave no sign of life for 7 s" in told[0]
    assert llm.generate(PROMPTS, SHORT, use_tqdm=False)[0].finished


@pytest.mark.slow
def test_a_replica_that_hangs_does_not_keep_from_closing(llm):
    process_of(llm).send_signal(signal.SIGSTOP)
    process = process_of(llm)
    began = time.monotonic()
    llm.close()
    assert time.monotonic() - began < 20
    assert process.poll() == -signal.SIGKILL


PROGRAM = """
import os, time
from quire import LLM
llm = LLM({model!r}, dtype="float32", data_parallel_size=2, num_gpu_blocks_override=64)
print(llm.generate([[5, 6, 7]] * 4, use_tqdm=False)[0].outputs[0].token_ids, flush=True)
[replica] = llm.llm_engine._copies.replicas
print(replica.process.pid, flush=True)
{then}
"""


def program(model: Path, then: str) -> subprocess.Popen[str]:
    """Run a program given on the command line, without a file that it could be read from."""
    text = PROGRAM.format(model=str(model), then=then)
    return subprocess.Popen(
        [sys.executable, "-c", text], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def is_gone(pid: int, seconds: float = 30) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            os.kill(pid, 0)
            stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
            if stat == "Z":
                return True
        except (ProcessLookupError, FileNotFoundError):
            return True
        time.sleep(0.05)
    return False


@pytest.mark.slow
def test_a_program_without_main_needs_no_guard_and_ends(tiny_llama):
    """At the interpreter's exit nothing hangs, nothing is printed, nothing stays."""
    process = program(tiny_llama, "")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "Traceback" not in err
    assert is_gone(int(out.split()[-1]))


@pytest.mark.slow
def test_a_fork_is_told_that_the_others_are_not_its_own(tiny_llama):
    then = """
pid = os.fork()
if pid == 0:
    try:
        llm.generate([[5, 6]], use_tqdm=False)
    except Exception as error:
        print(type(error).__name__, flush=True)
    llm.close()
    os._exit(0)
os.waitpid(pid, 0)
print(llm.get_metrics()["num_replicas"], len(llm.generate([[5, 6]] * 4, use_tqdm=False)))
"""
    process = program(tiny_llama, then)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert out.splitlines()[2:] == ["EngineClosedError", "2.0 4"], err


@pytest.mark.slow
@pytest.mark.parametrize("tensor_parallel_size", [1, 2])
def test_replicas_end_with_the_process_that_started_them(tiny_llama, tensor_parallel_size):
    """With their own ranks, and where a child of that process lives on."""
    then = """
from pathlib import Path
tasks = Path(f"/proc/{replica.process.pid}/task").iterdir()
print(*" ".join((task / "children").read_text() for task in tasks).split(), flush=True)
child = os.fork()
if child: print(child, flush=True)
time.sleep(1000)
"""
    text = PROGRAM.format(model=str(tiny_llama), then=then).replace(
        "data_parallel_size=2", f"data_parallel_size=2, tensor_parallel_size={tensor_parallel_size}"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", text], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stderr is not None
    lines = [process.stdout.readline() for _ in range(4)]
    ranks, child = [int(pid) for pid in lines[2].split()], int(lines[3])
    assert len(ranks) == tensor_parallel_size - 1
    try:
        process.kill()
        process.wait()
        for pid in [int(lines[1]), *ranks]:
            assert is_gone(pid)
    finally:
        os.kill(child, signal.SIGKILL)
        process.stdout.close()
        process.stderr.close()
