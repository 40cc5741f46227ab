"""The wheel holds the whole project under one import name."""

from __future__ import annotations

import configparser
import shutil
import subprocess
import sys
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest

import quire

pytestmark = pytest.mark.slow  # the native kernels are compiled for it, for every instruction set

ROOTS = {"core_engine": "quire", "kernels": "quire/kernels", "integrations": "quire/integrations"}
BUILD = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"


@pytest.fixture(scope="module")
def wheel(repo_root: Path, tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """A wheel built without network, from a copy that has no leftovers of other builds."""
    pytest.importorskip("setuptools", reason="building a wheel needs setuptools")
    checkout = tmp_path_factory.mktemp("checkout")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(repo_root / name, checkout)
    for folder in ROOTS:
        ignored = shutil.ignore_patterns("__pycache__", "*.so")
        shutil.copytree(repo_root / folder, checkout / folder, ignore=ignored)
    built = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-c", BUILD, str(built)],
        cwd=checkout,
        check=True,
        capture_output=True,
    )
    (path,) = built.glob("quire-*.whl")
    return zipfile.ZipFile(path)


@pytest.fixture(scope="module")
def metadata(wheel: zipfile.ZipFile) -> Message:
    (name,) = (n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))
    return Parser().parsestr(wheel.read(name).decode())


def test_every_module_ships_under_the_import_name(repo_root: Path, wheel: zipfile.ZipFile) -> None:
    """No package folder is forgotten, and nothing is installed beside `quire`."""
    expected = {
        f"{target}/{path.relative_to(repo_root / folder).as_posix()}"
        for folder, target in ROOTS.items()
        for path in (repo_root / folder).rglob("*.py")
    }
    shipped = set(wheel.namelist())
    assert expected - shipped == set()
    assert {name for name in shipped if name.endswith(".py")} == expected
    assert {name.split("/")[0] for name in shipped} == {
        "quire",
        f"quire-{quire.__version__}.dist-info",
    }


def test_type_marker_and_demo_model_with_its_adapters_ship(
    repo_root: Path, wheel: zipfile.ZipFile
) -> None:
    """Type checkers see the types, and `quire/demo` loads from an installed wheel."""
    shipped = set(wheel.namelist())
    assert "quire/py.typed" in shipped
    model = repo_root / "core_engine" / "demo" / "model"
    files = {f"quire/demo/model/{path.name}" for path in model.iterdir() if path.is_file()}
    assert files
    assert files <= shipped
    assert sum(wheel.getinfo(name).file_size for name in files) <= 8 * 2**20
    adapters = repo_root / "core_engine" / "demo" / "adapters"
    files = {f"quire/demo/{path.relative_to(adapters.parent)}" for path in adapters.glob("*/*")}
    assert len(files) == 6
    assert files <= shipped


def test_the_page_of_the_server_ships(repo_root: Path, wheel: zipfile.ZipFile) -> None:
    """What a browser loads comes with the server."""
    files = [each.name for each in (repo_root / "core_engine/server/page").iterdir()]
    assert "index.html" in files
    assert {f"quire/server/page/{name}" for name in files} <= set(wheel.namelist())


def test_what_was_tuned_for_gpus_ships(repo_root: Path, wheel: zipfile.ZipFile) -> None:
    """Beside the module that reads it."""
    files = [each.name for each in (repo_root / "kernels/triton/configs").iterdir()]
    assert "NVIDIA_H200.json" in files
    assert {f"quire/kernels/triton/configs/{name}" for name in files} <= set(wheel.namelist())


def test_the_native_kernels_ship(wheel: zipfile.ZipFile) -> None:
    """Where there is a compiler, their library is in the wheel; their sources are not."""
    shipped = [name for name in wheel.namelist() if name.startswith("quire/kernels/cpu/")]
    assert not [name for name in shipped if name.endswith((".cpp", ".h"))]
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler")
    assert [name for name in shipped if name.startswith("quire/kernels/cpu/_native.")]


def test_metadata_says_what_pyproject_means(metadata: Message) -> None:
    assert metadata["Version"] == quire.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    extras = {
        "bench",
        "langchain",
        "outlines",
        "outlines-core",
        "xgrammar",
        "openai",
        "server",
        "ray",
        "gpu",
        "dev",
        "all",
    }
    assert set(metadata.get_all("Provides-Extra", [])) == extras
    required = [r for r in metadata.get_all("Requires-Dist", []) if "extra ==" not in r]
    assert {r.split(">")[0] for r in required} >= {
        "torch",
        "transformers",
        "safetensors",
        "tokenizers",
        "numpy",
        "msgpack",
        "tqdm",
    }
    assert not any("<" in r or "langchain" in r for r in required)


def test_console_script_leads_to_a_function(wheel: zipfile.ZipFile) -> None:
    (name,) = (n for n in wheel.namelist() if n.endswith("entry_points.txt"))
    parser = configparser.ConfigParser()
    parser.read_string(wheel.read(name).decode())
    assert dict(parser["console_scripts"]) == {"quire": "quire.cli.app:main"}
    from quire.cli.app import main

    assert callable(main)


def test_the_unpacked_wheel_imports_by_itself(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    """All three roots are found in the installed files, not in the checkout."""
    wheel.extractall(tmp_path)
    code = (
        "import quire, quire.kernels, quire.integrations, quire.demo\n"
        "print(quire.__file__, quire.kernels.__file__, quire.integrations.__file__,"
        " quire.demo.model_path(), sep='\\n')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd="/",
        env={"PYTHONPATH": str(tmp_path), "PATH": ""},
        check=True,
        capture_output=True,
        text=True,
    )
    assert all(line.startswith(str(tmp_path)) for line in done.stdout.splitlines())
