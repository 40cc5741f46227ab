"""The native kernels by themselves, in C++, against double precision: here, and on arm64."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

BUILD = Path(__file__).parent / "native" / "build.py"
CROSS_COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"


def build(output: Path, *options: str) -> None:
    pytest.importorskip("setuptools", reason="the flags are those of setup.py, which needs it")
    subprocess.run([sys.executable, str(BUILD), *options, str(output)], check=True, timeout=600)


def run(*command: str) -> list[str]:
    """The lines it prints, one per instruction set; what is wrong is in them."""
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=600)
    print(done.stdout)
    assert done.returncode == 0, done.stdout
    lines = done.stdout.splitlines()
    assert all(line.endswith(": ok") for line in lines)
    return [line.partition(":")[0] for line in lines]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_every_instruction_set_is_right_and_the_same_in_any_company(tmp_path: Path) -> None:
    """Products, activations, whole models: inside their bounds, and bit for bit batch-invariant."""
    build(tmp_path / "check")
    names = run(str(tmp_path / "check"))
    assert {"generic", "neon"} & set(names)


@pytest.mark.slow
def test_arm64_is_right_and_the_same_in_any_company(tmp_path: Path) -> None:
    """The same in an emulator, which stands for a CPU that is not here."""
    missing = [tool for tool in (CROSS_COMPILER, EMULATOR) if shutil.which(tool) is None]
    if missing:
        assert os.environ.get("QUIRE_REQUIRE_ARM64") != "1", f"not installed: {missing}"
        pytest.skip(f"not installed: {' and '.join(missing)}")
    build(tmp_path / "check", "--static", "--compiler", CROSS_COMPILER)
    assert "neon" in run(EMULATOR, str(tmp_path / "check"), "--quick")
