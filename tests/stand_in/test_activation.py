"""The stand-in is turned on and off for an environment: its commands and child processes, too."""

from __future__ import annotations

import os
import subprocess
import sysconfig
import venv
from collections.abc import Callable
from pathlib import Path

import pytest

import quire

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment of Python that has quire, and what the tests' own has."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=True)
    [site] = folder.glob("lib/python*/site-packages")
    package = Path(quire.__file__).parent.parent
    # Its files of start-up, too: by one of them an editable install is found.
    where = [sysconfig.get_paths()[name] for name in ("purelib", "platlib")]
    lines = [f"import site; site.addsitedir({path!r})" for path in dict.fromkeys(where)]
    (site / "base.pth").write_text("\n".join([str(package), *lines]) + "\n")
    return folder


@pytest.fixture
def run(environment: Path) -> Run:
    def run(*words: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [str(environment / "bin" / words[0]), *words[1:]],
            capture_output=True,
            text=True,
            timeout=120,
            env={**os.environ, "PYTHONSAFEPATH": "1"},
        )
        assert done.returncode == code, done.stderr
        return done

    return run


def test_an_environment_serves_vllm_from_enable_to_disable(environment: Path, run: Run) -> None:
    switch = ("python", "-m", "quire.integrations.vllm")
    ask = ("python", "-c", "import vllm; print(vllm.__version__)")
    assert "No module named 'vllm'" in run(*ask, code=1).stderr
    written = run(*switch, "enable").stdout
    assert "quire_vllm.pth" in written
    assert run(*switch, "enable").stdout == written
    try:
        assert "quire" in run(*ask).stdout
        child = "import subprocess as s, sys; s.run([sys.executable, *sys.argv[1:]], check=True)"
        assert "quire" in run("python", "-c", child, *ask[1:]).stdout
        metadata = "import importlib.metadata as m; print(m.version('vllm'))"
        assert "quire" in run("python", "-c", metadata).stdout
        assert "quire" in run("vllm", "--version").stdout
        assert "vllm serve MODEL" in run("vllm", "serve", "--help").stdout
        server = ("python", "-m", "vllm.entrypoints.openai.api_server")
        assert "vllm serve MODEL" in run(*server, "--help").stdout
        assert "chat, complete" in run("python", "-m", "vllm", "nothing", code=2).stderr
    finally:
        removed = run(*switch, "disable").stdout
    assert "quire_vllm.pth" in removed
    assert not (environment / "bin" / "vllm").exists()
    assert "nothing" in run(*switch, "disable").stdout
    run(*ask, code=1)


def test_an_environment_without_quire_starts_as_ever(tmp_path: Path) -> None:
    """What is left of the stand-in says nothing where quire is gone."""
    from quire.integrations.vllm.activation import _PTH

    venv.create(tmp_path, with_pip=False, symlinks=True)
    [site] = tmp_path.glob("lib/python*/site-packages")
    (site / "quire_vllm.pth").write_text(_PTH)
    done = subprocess.run(
        [str(tmp_path / "bin" / "python"), "-P", "-c", "print(1)"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"]},
        timeout=60,
    )
    assert (done.stdout, done.stderr) == ("1\n", "")


def test_a_real_vllm_and_a_foreign_command_are_left_alone(environment: Path, run: Run) -> None:
    switch = ("python", "-m", "quire.integrations.vllm")
    [site] = environment.glob("lib/python*/site-packages")
    script = environment / "bin" / "vllm"
    script.write_text("#!/bin/sh\n")
    try:
        assert "somebody else's command" in run(*switch, "enable", code=1).stderr
    finally:
        script.unlink()
    real = site / "vllm.py"
    real.write_text("REAL = True\n")
    try:
        assert "real vLLM" in run(*switch, "enable", code=1).stderr
        run(*switch, "enable", "--force")
        assert run("python", "-c", "import vllm; print(vllm.REAL)").stdout == "True\n"
    finally:
        real.unlink()
        run(*switch, "disable")


def test_a_script_runs_with_its_own_arguments(tmp_path: Path, run: Run) -> None:
    script = tmp_path / "script.py"
    (tmp_path / "beside.py").write_text("VALUE = 5\n")
    script.write_text(
        "import sys, beside\n"
        "from vllm import SamplingParams\n"
        "if __name__ == '__main__':\n"
        "    print(sys.argv[1:], beside.VALUE, SamplingParams().max_tokens)\n"
    )
    switch = ("python", "-m", "quire.integrations.vllm")
    assert run(*switch, str(script), "--a", "b").stdout == "['--a', 'b'] 5 16\n"
    assert "there is no script" in run(*switch, str(tmp_path / "none.py"), code=2).stderr
    assert "usage" in run(*switch, "--help").stdout
    assert "takes no" in run(*switch, "enable", "--wrong", code=2).stderr
    assert "needs the name" in run(*switch, "-m", code=2).stderr
    found = run(*switch, "-m", "vllm.entrypoints.openai.api_server", "--help").stdout
    assert "vllm serve MODEL" in found
