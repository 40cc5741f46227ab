"""Whatever becomes of a rank: who waits is told which one and why, and nothing is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from quire import LLM, SamplingParams
from quire.errors import EngineClosedError, QuireError

LONG = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)


@pytest.fixture
def llm(tiny_llama: Path):
    with LLM(
        tiny_llama, dtype="float32", tensor_parallel_size=2, num_gpu_blocks_override=64
    ) as made:
        runner = made.llm_engine._runner
        forward = runner.forward

        def slow_forward(batch):
            time.sleep(0.02)
            return forward(batch)

        runner.forward = slow_forward
        yield made


def worker_of(llm: LLM):
    [worker] = llm.llm_engine._runner._ranks.workers
    return worker


class Caller(threading.Thread):
    """Generates, and keeps what came of it."""

    def __init__(self, llm: LLM) -> None:
        super().__init__()
        self.llm = llm
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self.llm.generate(["one", "two"], LONG, use_tqdm=False)
        except QuireError as error:
            self.error = error


def end_of(llm: LLM, caller: Caller, seconds: float) -> str:
    """Return what the caller was told, and check that all is over."""
    worker = worker_of(llm)
    caller.join(seconds)
    assert not caller.is_alive()
    assert caller.error is not None
    with pytest.raises(EngineClosedError, match="rank 1"):
        llm.generate(["again"], LONG, use_tqdm=False)
    began = time.monotonic()
    llm.close()
    assert time.monotonic() - began < 20
    assert worker.process.poll() is not None
    return str(caller.error)


def test_a_killed_rank_is_told_at_once(llm):
    caller = Caller(llm)
    time.sleep(0.3)
    worker_of(llm).process.kill()
    told = end_of(llm, caller, 30)
    assert "a rank of the model was lost: rank 1 was ended by SIGKILL" in told


def test_a_rank_that_raises_says_what(llm):
    caller = Caller(llm)
    time.sleep(0.3)
    llm.llm_engine._runner._ranks.tell({"what": "nonsense"})
    assert "a worker does not know what 'nonsense' is" in end_of(llm, caller, 30)


@pytest.mark.slow
def test_without_shared_memory_a_rank_that_hangs_is_given_up_as_well(tiny_llama, monkeypatch):
    """Its process is killed, by which torch.distributed sees that it will not come."""
    monkeypatch.setattr("quire.executor.connect.why_missing", lambda: "not wanted")
    options = {"dtype": "float32", "tensor_parallel_size": 2, "num_gpu_blocks_override": 64}
    with LLM(tiny_llama, **options) as llm:
        assert llm.generate(["one"], use_tqdm=False)[0].finished
        worker_of(llm).process.send_signal(signal.SIGSTOP)
        caller = Caller(llm)
        assert "rank 1 gave no sign of life for 7 s" in end_of(llm, caller, 30)


@pytest.mark.slow
def test_a_rank_that_hangs_is_given_up(llm):
    """And its process goes although it would not."""
    caller = Caller(llm)
    time.sleep(0.3)
    worker_of(llm).process.send_signal(signal.SIGSTOP)
    assert "rank 1 gave no sign of life for 7 s" in end_of(llm, caller, 30)


def test_a_rank_that_dies_while_nothing_runs_is_told_to_the_next(llm):
    worker_of(llm).process.kill()
    worker_of(llm).process.wait()
    caller = Caller(llm)
    assert "rank 1" in end_of(llm, caller, 30)


def test_closing_in_the_middle_ends_everything(llm):
    caller = Caller(llm)
    time.sleep(0.3)
    worker = worker_of(llm)
    llm.close()
    caller.join(30)
    assert "closed" in str(caller.error)
    assert worker.process.poll() == 0


PROGRAM = """
import os, time
from quire import LLM
llm = LLM({model!r}, dtype="float32", tensor_parallel_size=2, num_gpu_blocks_override=64)
print(llm.generate([[5, 6, 7]], use_tqdm=False)[0].outputs[0].token_ids, flush=True)
[worker] = llm.llm_engine._runner._ranks.workers
print(worker.process.pid, flush=True)
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


def test_a_program_without_main_needs_no_guard_and_ends(tiny_llama):
    """At the interpreter's exit nothing hangs, nothing is printed, nothing stays."""
    process = program(tiny_llama, "")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "Traceback" not in err
    assert "leaked" not in err
    assert is_gone(int(out.split()[-1]))


@pytest.mark.slow
def test_the_ranks_end_with_the_process_that_started_them(tiny_llama):
    """Also where a child of that process lives on, and holds all that it had open."""
    process = program(tiny_llama, "child = os.fork()\nprint(child, flush=True)\ntime.sleep(1000)")
    assert process.stdout is not None
    lines = [process.stdout.readline() for _ in range(2)]
    child = int(process.stdout.readline())
    try:
        process.kill()
        process.wait()
        assert is_gone(int(lines[1]))
    finally:
        os.kill(child, signal.SIGKILL)
        process.stdout.close()
        assert process.stderr is not None
        process.stderr.close()


LAUNCHED = """
import os, sys
from quire import LLM, SamplingParams
from quire.sampling_params import StructuredOutputsParams

llm = LLM(sys.argv[1], dtype="float32", num_gpu_blocks_override=64,
          distributed_executor_backend="external_launcher", **{options!r})
params = [
    SamplingParams(max_tokens=12, temperature=1.0, ignore_eos=True),
    SamplingParams(max_tokens=12, temperature=0, logprobs=3),
    SamplingParams(max_tokens=12, temperature=1.0,
                   structured_outputs=StructuredOutputsParams(regex="[ab]{{8}}")),
]
outputs = llm.generate(["one", "two", "three"], params, use_tqdm=False)
ids = [output.outputs[0].token_ids for output in outputs]
with open(sys.argv[2] + os.environ["RANK"], "w") as file:
    file.write(repr(ids))
llm.close()
"""


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2}])
def test_launched_ranks_all_decide_the_same(tiny_llama, tmp_path, options):
    """By torchrun: every rank has the same texts, and they are those of one process."""
    script = tmp_path / "script.py"
    script.write_text(LAUNCHED.format(options=options))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--master-port", "0", "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
    subprocess.run(
        [*command, str(script), str(tiny_llama), str(tmp_path / "rank")],
        check=True, timeout=120, capture_output=True,
    )  # fmt: skip
    found = [(tmp_path / f"rank{rank}").read_text() for rank in range(2)]
    assert found[0] == found[1]
    one = LAUNCHED.format(options={}).replace('"external_launcher"', "None")
    alone = tmp_path / "alone.py"
    alone.write_text(one)
    subprocess.run(
        [sys.executable, str(alone), str(tiny_llama), str(tmp_path / "alone")],
        check=True, timeout=60, capture_output=True, env={**os.environ, "RANK": "0"},
    )  # fmt: skip
    assert (tmp_path / "alone0").read_text() == found[0]


def test_a_rank_imports_what_the_engines_process_imports(tiny_llama, tmp_path):
    """And not what happens to lie in the current folder."""
    current, folder = tmp_path / "current", tmp_path / "folder"
    for each in (current, folder):
        each.mkdir()
    (current / "socket.py").write_text("raise RuntimeError('this is another one')")
    script = folder / "script.py"
    script.write_text(
        "import sys\n"
        "from quire import LLM\n"
        "llm = LLM(sys.argv[1], tensor_parallel_size=2, num_gpu_blocks_override=64)\n"
        "llm.close()\n"
    )
    paths = [str(Path(each).absolute()) for each in sys.path if each]
    done = subprocess.run(
        [sys.executable, str(script), str(tiny_llama)],
        cwd=current,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
