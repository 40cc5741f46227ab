"""`make gpu-check`, as far as a machine without a GPU can run it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is in the extra 'gpu'")

ON_GPU = torch.accelerator.is_available()


def check(repo_root: Path, *arguments: object, **variables: str) -> tuple[int, str]:
    """Run the script as a user without an install runs it; return its status and what it said."""
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, repo_root / "tests/gpu/check.py", *map(str, arguments)],
        capture_output=True, text=True, check=False, cwd="/", env={**environ, **variables},
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


def test_without_a_gpu_it_says_so(repo_root):
    """Nothing is checked, and nobody may believe that something was."""
    if ON_GPU:
        pytest.skip("there is a GPU")
    status, said = check(repo_root)
    assert status == 2
    assert "torch finds no GPU here: nothing was checked" in said


def test_kernels_are_compared_in_the_interpreter(repo_root):
    """From a folder that is no checkout, without quire on the path; the README stays."""
    before = (repo_root / "kernels/README.md").read_bytes()
    status, said = check(
        repo_root, "--interpret", "--cases", 1, "--only", "quantized_linear,rms_norm,argmax"
    )
    assert status == 0, said
    assert "quantized_linear (triton kernels): right in 2 cases" in said
    assert "0 of 3 wrong" in said
    assert (repo_root / "kernels/README.md").read_bytes() == before


BROKEN = {
    "wrong": ("return 1.001 * got", "WRONG after 0 cases: Mismatch: quantized_linear"),
    "fatal": ("import os; os._exit(9)", "WRONG: its process ended with 9"),
    "failing": ("raise RuntimeError('misaligned address')", "RuntimeError: misaligned address"),
}


@pytest.mark.parametrize("how", ["fatal", "wrong", pytest.param("failing", marks=pytest.mark.slow)])
def test_a_wrong_kernel_is_told_by_its_name_and_the_rest_go_on(repo_root, tmp_path, how):
    """Also where it takes its process along, as a kernel does that reads where it must not."""
    body, told = BROKEN[how]
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util, sys\n"
        "if any('compare.py' in each for each in sys.orig_argv):\n"
        "    class Broken:\n"
        "        def find_spec(self, name, path=None, target=None):\n"
        "            if name != 'kernel_cases':\n"
        "                return None\n"
        "            from quire.kernels.triton.backend import TritonBackend as backend\n"
        "            right = backend.quantized_linear\n"
        "            def wrong(x, weight, bias=None):\n"
        "                got = right(x, weight, bias)\n"
        f"                {body}\n"
        "            backend.quantized_linear = staticmethod(wrong)\n"
        "    sys.meta_path.insert(0, Broken())\n"
    )
    folder = str(tmp_path)
    script = f"import sys, os, runpy; os.environ['PYTHONPATH'] = {folder!r}; " + (
        f"sys.argv = ['check.py', '--interpret', '--cases', '1', '--only', "
        f"'quantized_linear,rms_norm']; "
        f"sys.path.insert(0, {str(repo_root / 'tests/gpu')!r}); "
        f"runpy.run_path({str(repo_root / 'tests/gpu/check.py')!r}, run_name='__main__')"
    )
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd="/",
        env=environ,
    )  # fmt: skip
    said = done.stdout + done.stderr
    assert done.returncode == 1, said
    assert told in said
    assert "rms_norm (plain torch): right in 2 cases" in said or "rms_norm (triton" in said
    assert "1 of 2 wrong" in said


def test_what_is_no_case_is_refused(repo_root):
    """By name, with those that there are."""
    status, said = check(repo_root, "--interpret", "--only", "rms_norn")
    assert status == 2
    assert "rms_norn: these are rms_norm," in said
