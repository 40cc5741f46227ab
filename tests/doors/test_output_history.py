"""IPython keeps outputs and the last error; a cell that is run again must not keep two engines."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest

from quire.utils import output_history

pytest.importorskip("IPython")

SESSION = """
import gc, sys, threading
from IPython.core.interactiveshell import InteractiveShell

folder = sys.argv[1]
shell = InteractiveShell.instance()
shell.user_ns["folder"] = folder

from quire import LLM
from quire.engine.runner import ModelRunner


def run(source, success=True):
    result = shell.run_cell(source, store_history=True)
    assert result.success == success, source


def alive():
    gc.collect()
    kinds = [type(thing) for thing in gc.get_objects()]
    threads = [thread for thread in threading.enumerate() if thread.name == "quire-engine"]
    assert kinds.count(LLM) == kinds.count(ModelRunner), "an engine without its LLM, or closed"
    return kinds.count(LLM), len(threads)


def check(expected):
    found = alive()
    assert found == (expected, expected), f"line {sys._getframe(1).f_lineno}: {found}"


run('from quire import *')
gc.freeze()  # what was imported need not be looked through again and again
MAKE = 'llm = LLM(folder); out = llm.generate([5, 6], use_tqdm=False)'

# The cell ends with the engine, or with something that holds it.
for last in ("llm", "[llm]", "llm.generate", "{'a': (llm,)}", "llm.stream([5])"):
    for _ in range(2):
        run(f"{MAKE}; {last}".replace("; llm.s", "\\nllm.s"))
        check(1)
run("llm")
run("_")
run(MAKE)
check(1)

# A cell that fails, with its engine in a frame, in a closure, and in an error's cause.
FAILURES = '''
def fails():
    try:
        llm.generate([], use_tqdm=False)
    except QuireError as error:
        raise ValueError('no') from error
'''
run(FAILURES)
for failing in ("llm.generate([], use_tqdm=False)", "fails()", "(lambda x: 1 / 0)(llm)"):
    run(failing, success=False)
    run(MAKE)
    check(1)
    run(f"{MAKE}; {failing}", success=False)
    run(f"{MAKE}; {failing}", success=False)
    check(1)
run(MAKE)

# What the user has a name for stays, and so does what holds no engine.
run("other = llm; llm")
run("41 + 1")
run(MAKE)
check(2)
assert 42 in shell.user_ns["Out"].values()
run("assert other is not llm and other.generate([5], use_tqdm=False)")
run("del other")
check(1)

# An engine without a name can be had from the history, until another is made.
run("del llm; LLM(folder)")
run("llm = _")
run("llm.generate([5], use_tqdm=False); _ = 7; LLM(folder).close()")
check(1)
assert shell.user_ns["_"] == 7
run("del _")

# A loop, a coroutine, an engine for asyncio.
run("for _i in range(3):\\n    llm = LLM(folder)\\nllm.kv_cache_map()")
check(1)
ASYNC = '''
async def ask(prompt):
    async for output in engine.generate(prompt):
        pass
    return output
engine = AsyncLLM(folder)
'''
run("del llm")
for last in ("await ask([5, 6])", "await ask([])", "await ask([5, 6]); engine"):
    for _ in range(2):
        run(ASYNC + last, success="[])" not in last)
run(ASYNC + "await ask([5, 6])")
check(1)
print("done")
"""


def test_a_cell_run_again_leaves_one_engine(tiny_llama):
    """By its last line, by an error, from a coroutine: the first engine's memory is given back."""
    done = subprocess.run(
        [sys.executable, "-c", SESSION, str(tiny_llama)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert done.stdout.endswith("done\n")


class Engine:
    """Something that can be held weakly."""


@pytest.mark.parametrize(
    "ipython", [None, SimpleNamespace(), SimpleNamespace(get_ipython=lambda: None)]
)
def test_outside_of_ipython_nothing_happens(monkeypatch, ipython):
    """IPython is not imported, or half, or has no shell."""
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setattr(output_history, "_made", [])
    output_history.keep_out_of_history(Engine())
    assert output_history._made == []


INTEGRATIONS = {
    "langchain_core": """
from langchain_core.output_parsers import StrOutputParser
from quire.integrations.langchain import VLLM
llm = VLLM(model=folder, vllm_kwargs={"block_size": size})
chain = llm | StrOutputParser()
chain
""",
    "outlines": """
from quire.integrations.outlines import models
model = models.vllm(folder, block_size=size)
model
""",
}
THREE_TIMES = """
import gc, sys
from IPython.core.interactiveshell import InteractiveShell
from quire import LLM

shell = InteractiveShell.instance()
shell.user_ns["folder"] = sys.argv[1]
for size in (4, 8, 16):
    shell.user_ns["size"] = size
    shell.run_cell(sys.argv[2], store_history=True).raise_error()
    gc.collect()
    assert sum(type(thing) is LLM for thing in gc.get_objects()) == 1
print("done")
"""


@pytest.mark.slow
@pytest.mark.parametrize("library", INTEGRATIONS)
def test_a_model_of_a_library_keeps_no_engine_by_being_shown(tiny_llama, library):
    """It shares an engine with its equals; with other arguments it has another, in place of it."""
    pytest.importorskip(library)
    done = subprocess.run(
        [sys.executable, "-c", THREE_TIMES, str(tiny_llama), INTEGRATIONS[library]],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert done.stdout.endswith("done\n")
