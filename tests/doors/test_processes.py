"""Ctrl-C, fork and exit, each in a process of its own, with a real engine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")

# One process imports torch, which takes seconds, and forks one child per scenario; a child ends
# as a program does, through the interpreter's own shutdown.
NURSERY = """
import faulthandler, json, os, signal, sys, tempfile, threading, time
from quire import LLM, SamplingParams
from quire.errors import EngineClosedError
import quire.assembly, torch
# A shell that starts the tests in the background has them ignore Ctrl-C, and children inherit it.
signal.signal(signal.SIGINT, signal.default_int_handler)
model, scenarios = sys.argv[1], json.loads(sys.argv[2])
results, code = {}, ""
for name in scenarios:
    out, err = tempfile.TemporaryFile(), tempfile.TemporaryFile()
    pid = os.fork()
    if pid == 0:
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        faulthandler.dump_traceback_later(60, exit=True)
        code = scenarios[name]
        break
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    out.seek(0), err.seek(0)
    results[name] = [status, out.read().decode(), err.read().decode()]
if not code:
    print(json.dumps(results))
    sys.exit()
if name != "fork":
    torch.set_num_threads(1)  # threads that wait for each other are not the matter here
llm = LLM(model, dtype="float32", kv_cache_memory_bytes=1 << 22)
long = SamplingParams(max_tokens=240, ignore_eos=True)
def answer():
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    [output] = llm.generate([[5, 6, 7]], params, use_tqdm=False)
    return list(output.outputs[0].token_ids)
exec(code)
"""

SCENARIOS = {
    "ctrl-c in generate": """
        expected = answer()
        started = []
        def interrupt():
            while llm.get_metrics()["num_unfinished_requests"] < 16:
                time.sleep(0.005)
            started.append(time.monotonic())
            os.kill(os.getpid(), signal.SIGINT)
        threading.Thread(target=interrupt).start()
        try:
            llm.generate([[i] for i in range(16)], long, use_tqdm=False)
        except KeyboardInterrupt:
            assert time.monotonic() - started[0] < 5
        else:
            raise AssertionError("not interrupted")
        assert llm.get_metrics()["num_unfinished_requests"] == 0
        assert answer() == expected
        print("end")
        """,
    "ctrl-c in stream": """
        expected = answer()
        stream = llm.stream([9], long)
        next(stream)
        step = llm.llm_engine.step
        llm.llm_engine.step = lambda: (time.sleep(0.01), step())[1]
        threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()
        try:
            for output in stream:
                pass
        except KeyboardInterrupt:
            stream.close()
        else:
            raise AssertionError("not interrupted")
        assert answer() == expected
        print("end")
        """,
    "fork": """
        def fork(child):
            pid = os.fork()
            if pid == 0:
                status = 1
                try:
                    child()
                    status = 0
                finally:
                    sys.stderr.flush()
                    os._exit(status)
            return os.waitpid(pid, 0)[1]
        def before_first_use():
            print(answer(), file=sys.stderr)
            llm.close()
        def after_it():
            for door in (answer, llm.get_metrics, lambda: llm.stream("a"), lambda: llm.llm_engine):
                try:
                    door()
                except EngineClosedError as error:
                    assert "fork" in str(error), error
                else:
                    raise AssertionError("no error")
            llm.close()
            assert len(LLM(model, dtype="float32").generate([[1]], use_tqdm=False)) == 1
        assert fork(before_first_use) == 0
        expected = answer()
        assert fork(after_it) == 0
        assert answer() == expected
        print("end")
        print(expected, file=sys.stderr)
        """,
    "exit unused": "print('end')",
    "exit used": "answer(); print('end')",
    "exit while it runs": "stream = llm.stream([3], long); next(stream); print('end')",
    "exit closed": "answer(); llm.close(); print('end')",
    "exit from another thread's generate": """
        def work():
            try:
                llm.generate([[3]] * 4, long, use_tqdm=False)
            except EngineClosedError:
                pass
        threading.Thread(target=work, daemon=True).start()
        while not llm.get_metrics()["num_unfinished_requests"]:
            time.sleep(0.001)
        print("end")
        """,
    "sigterm": """
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
        while True:
            answer()
        """,
}


@pytest.fixture(scope="module")
def results(tiny_llama):
    """What each scenario came to: exit status, stdout, stderr."""
    scenarios = {name: textwrap.dedent(code) for name, code in SCENARIOS.items()}
    done = subprocess.run(
        [sys.executable, "-c", NURSERY, str(tiny_llama), json.dumps(scenarios)],
        capture_output=True,
        text=True,
        timeout=300,
        env={
            **os.environ,
            "QUIRE_LOG_LEVEL": "WARNING",
            "PYTHONWARNINGS": "ignore::DeprecationWarning",
        },
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", ["ctrl-c in generate", "ctrl-c in stream"])
def test_ctrl_c_leaves_the_engine_usable(results, name):
    """SIGINT gets through at once, the requests are aborted, and the next call is served."""
    assert results[name] == [0, "end\n", ""]


def test_a_fork_before_first_use_works_and_one_after_it_is_told_so(results):
    """Parent and child answer alike; a fork of a running engine gets an error, not a hang."""
    status, out, err = results["fork"]
    assert (status, out) == (0, "end\n"), err
    child, parent = err.splitlines()
    assert child == parent


@pytest.mark.parametrize("name", [name for name in SCENARIOS if name.startswith("exit")])
def test_a_process_ends_by_itself_whatever_the_engine_does(results, name):
    """No hang and no noise at exit, with requests in flight or without."""
    assert results[name] == [0, "end\n", ""]


def test_sigterm_is_not_held_up_by_the_engine(results):
    assert results["sigterm"] == [-signal.SIGTERM, "", ""]
