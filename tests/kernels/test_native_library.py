"""The shared library: what it offers, that its parts stay apart, and that it is the right one."""

from __future__ import annotations

import ctypes
import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from quire.kernels import available_backends
from quire.kernels.cpu import library, structs
from quire.kernels.cpu.sources import hash_of

needs_library = pytest.mark.skipif(
    "cpu" not in available_backends(), reason="the native kernels were not built: no compiler"
)
POINTER_TO_LAYER = ctypes.POINTER(structs.Layer)
NATIVE = Path("kernels/cpu/native")
C_TYPES = {
    "int32_t": ctypes.c_int32,
    "int64_t": ctypes.c_int64,
    "float": ctypes.c_float,
    "Norm": structs.Norm,
    "Matrix": structs.Matrix,
}


def output_of(*command: str) -> list[str]:
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return done.stdout.splitlines()


@needs_library
def test_nothing_but_its_functions_can_be_seen_from_outside() -> None:
    """A weak symbol that is exported may be taken from another library, or be taken by one."""
    path = str(library.load_library()._name)
    listed = [line.split() for line in output_of("nm", "-D", "--defined-only", path)]
    assert {name for _, _, name in listed} == set(library._FUNCTIONS)
    assert {kind for _, kind, _ in listed} == {"T"}


@needs_library
@pytest.mark.skipif(platform.machine() != "x86_64", reason="one instruction set only")
def test_code_that_every_cpu_runs_has_no_instructions_that_some_lack() -> None:
    """Of functions that several files instantiate one copy stays, whatever it was compiled for."""
    path = str(library.load_library()._name)
    function, vector_code = "", set()
    for line in output_of("objdump", "-d", "-C", "--no-show-raw-insn", "-j", ".text", path):
        if header := re.match(r"[0-9a-f]+ <(.*)>:$", line):
            function = header.group(1)
        elif re.match(r"\s*[0-9a-f]+:\s+(v[a-z]|k[a-z]+[bwdq]\s|tile|\{)", line):
            vector_code.add(function)
    if "quire_forward" in vector_code:
        pytest.skip("all of it was compiled for a newer CPU")
    assert [name for name in vector_code if "quire::avx2::" in name]
    elsewhere = re.compile(r"quire::(avx|amx)\w*::")
    assert [name for name in vector_code if not elsewhere.search(name)] == []


def test_structs_are_those_of_the_header(repo_root: Path) -> None:
    """Field by field, in name, order and type: Python writes what C++ reads."""
    header = re.sub(r"//.*", "", (repo_root / NATIVE / "abi.h").read_text(encoding="utf-8"))
    declared = re.findall(r"struct (\w+) \{(.*?)\};", header, flags=re.DOTALL)
    assert {"Norm", "Matrix", "Layer", "Model", "Batch"} < {name for name, _ in declared}
    renamed = {"in": "in_features", "out": "out_features"}
    with_sizes = ("Matrix", "Packing", "CodesPacking")
    for struct, body in declared:
        fields = []
        for kind, pointer, name in re.findall(r"(?:const )?(\w+)(\*?) (\w+)(?: = \w+)?;", body):
            name = renamed.get(name, name) if struct in with_sizes else name
            fields.append((name, "pointer" if pointer else C_TYPES[kind].__name__))
        mirrored = [
            (name, "pointer" if kind in (ctypes.c_void_p, POINTER_TO_LAYER) else kind.__name__)
            for name, kind in getattr(structs, struct)._fields_
        ]
        assert mirrored == fields, struct


@needs_library
def test_a_library_that_was_built_from_other_sources_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One that was left lying after a change would compute what nobody can explain."""
    monkeypatch.setattr(library, "hash_of", lambda folder: "changed")
    library.load_library.cache_clear()
    try:
        with pytest.raises(library.LibraryError, match=r"other sources.*build_ext --inplace"):
            library.load_library()
    finally:
        library.load_library.cache_clear()


def test_the_hash_is_of_names_and_contents(tmp_path: Path) -> None:
    """Any change of a source shows; other files do not count."""
    first, second = tmp_path / "a.h", tmp_path / "b.cpp"
    first.write_text("x")
    second.write_text("y")
    hashes = {hash_of(tmp_path)}
    (tmp_path / "notes.txt").write_text("z")
    assert hash_of(tmp_path) in hashes
    second.write_text("yy")
    hashes.add(hash_of(tmp_path))
    first.rename(tmp_path / "c.h")
    hashes.add(hash_of(tmp_path))
    second.unlink()
    hashes.add(hash_of(tmp_path))
    assert len(hashes) == 4
