"""A fork of the engine's process leaves the other ranks to their engine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")

PROGRAM = """
import gc, os, sys, weakref
from quire import LLM, SamplingParams
from quire.errors import EngineClosedError

PARAMS = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)

def texts(llm):
    outputs = llm.generate(["a", "b"], PARAMS, use_tqdm=False)
    return [output.outputs[0].token_ids for output in outputs]

def use(llm):
    try:
        texts(llm)
    except EngineClosedError as error:
        assert "make the LLM in the child process" in str(error), error
        assert "before the first request" not in str(error), error
    else:
        raise AssertionError("two processes tell the same ranks")

def fork(what):
    global llm
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            if what == "use":
                use(llm)
            elif what == "close":
                llm.close()
            elif what == "exit":
                weakref.finalize._exitfunc()  # as the interpreter does
            else:
                llm = None
                gc.collect()
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(pid, 0)[1] == 0, what

llm = LLM(sys.argv[1], dtype="float32", tensor_parallel_size=2, num_gpu_blocks_override=64)
for what in ("use", "close", "exit", "drop"):
    fork(what)
first = texts(llm)
for what in ("use", "close", "exit", "drop"):
    fork(what)
    assert texts(llm) == first, what
llm.close()
"""


def test_a_fork_neither_tells_nor_ends_the_other_ranks(tiny_llama: Path):
    """Before the first request or after it, whatever becomes of the fork."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tiny_llama)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
