"""The tuning table: what is read, what is refused, what is chosen."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from quire.kernels import KernelError
from quire.kernels.triton import configs
from quire.kernels.triton.configs import (
    as_json,
    bucket,
    candidates,
    config_for,
    file_name,
    parse_table,
    read_table,
    trying,
)
from quire.kernels.triton.tunables import TUNABLES, Entry

CPU = torch.device("cpu")
SHIPPED = sorted((Path(configs.__file__).parent / "configs").iterdir())


@pytest.fixture
def forget():
    """What is kept of files is read anew, before and after."""
    kept = (read_table, configs._choose)
    for function in kept:
        function.cache_clear()
    yield
    for function in kept:
        function.cache_clear()


def test_every_kernel_has_usual_values_for_every_case():
    """The last entry fits always, all fields are there, and all are among the choices."""
    for kernel, tunable in TUNABLES.items():
        assert tunable.usual[-1].when == {}
        for entry in tunable.usual:
            assert set(entry.use) == set(tunable.fields), kernel
            assert set(entry.when) <= set(tunable.keys), kernel
            assert all(value in tunable.fields[name] for name, value in entry.use.items()), kernel


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_every_file_that_ships_is_right(path):
    """It is named as its device is, and says what can be read."""
    text = path.read_text()
    assert path.name == file_name(json.loads(text)["device"])
    assert set(parse_table(text, path.name)) <= set(TUNABLES)


def test_the_first_entry_that_fits_decides():
    """Numbers are the most that an entry is for; texts are equal; what is not asked fits not."""
    entry = Entry({"rows": 16, "kind": "int4"}, {})
    assert entry.fits({"rows": 16, "kind": "int4", "inputs": 5})
    assert not entry.fits({"rows": 17, "kind": "int4"})
    assert not entry.fits({"rows": 3, "kind": "int8"})
    assert not entry.fits({"kind": "int4"})
    assert Entry({}, {}).fits({})
    few = config_for("quantized_product", CPU, rows=1, kind="int4", dtype="bfloat16")
    many = config_for("quantized_product", CPU, rows=4096, kind="int4", dtype="bfloat16")
    assert few["ROWS"] == 16
    assert many["ROWS"] == 128


def test_a_file_of_the_device_goes_first(tmp_path, monkeypatch, forget):
    """By its name, from a folder of one's own; fields that it does not name are the usual ones."""
    device = torch.device("cuda", 0)
    monkeypatch.setattr(configs, "device_name", lambda device: "Some GPU (2)")
    monkeypatch.setenv(configs.FOLDER_VARIABLE, str(tmp_path))
    usual = config_for("norm", device, size=4096)
    for function in (read_table, configs._choose):
        function.cache_clear()
    found = [({"size": 4096}, {"num_warps": 2}), ({}, {"num_warps": 16})]
    (tmp_path / "Some_GPU_2.json").write_text(as_json("Some GPU (2)", {"norm": found}))
    assert config_for("norm", device, size=4096) == {**usual, "num_warps": 2}
    assert config_for("norm", device, size=4097)["num_warps"] == 16
    assert config_for("embedding", device, size=10)["num_warps"] == 4
    with trying("norm", {"num_warps": 1}):
        assert config_for("norm", device, size=4096) == {**usual, "num_warps": 1}
    assert config_for("norm", device, size=4096)["num_warps"] == 2


@pytest.mark.parametrize(
    ("kernels", "message"),
    [
        ("[", r"x\.json: is no JSON"),
        ([], r"x\.json: file is \[\]; it must be an object"),
        ({"kernel": {}}, r"x\.json: field is 'kernel'; it must be device, note, kernels"),
        ({"kernels": 3}, r"x\.json: kernels is 3; it must be an object"),
        ({"kernels": {"nrom": []}}, r"kernels\.nrom is 'nrom'; it must be one of norm, rotary"),
        ({"kernels": {"norm": {}}}, r"kernels\.norm is \{\}; it must be a list"),
        ({"kernels": {"norm": [{"use": {}}]}}, r"norm\[0\] is \{'use': \{\}\}; .* \"when\" and"),
        (
            {"kernels": {"norm": [{"when": {"rows": 3}, "use": {}}]}},
            r"norm\[0\]\.when is 'rows'; it must be one of size, dtype",
        ),
        (
            {"kernels": {"norm": [{"when": {"size": "big"}, "use": {}}]}},
            r"norm\[0\]\.when\.size is 'big'; it must be of type int",
        ),
        (
            {"kernels": {"norm": [{"when": {}, "use": {"blocks": 3}}]}},
            r"norm\[0\]\.use is 'blocks'; it must be one of BLOCK, num_warps",
        ),
        (
            {"kernels": {"norm": [{"when": {}, "use": {"num_warps": 3}}]}},
            r"x\.json: kernels\.norm\[0\]\.use\.num_warps is 3; it must be one of 1, 2, 4, 8, 16",
        ),
        (
            {"kernels": {"norm": [{"when": {}, "use": {"num_warps": True}}]}},
            r"num_warps is True",
        ),
    ],
)
def test_what_is_not_right_in_a_file_is_named(kernels, message):
    """The file, the field, the value, and what would be right."""
    text = kernels if isinstance(kernels, str) else json.dumps(kernels)
    with pytest.raises(KernelError, match=message):
        parse_table(text, "x.json")


def test_a_folder_or_file_that_cannot_be_read_is_named(tmp_path, monkeypatch, forget):
    """Else a name that is wrong by a letter would have no effect, and nobody would know."""
    monkeypatch.setenv(configs.FOLDER_VARIABLE, str(tmp_path / "cofnigs"))
    wanted = r"QUIRE_KERNEL_CONFIGS='.*cofnigs' is no folder: it must be .* such as Some_GPU\.json"
    with pytest.raises(KernelError, match=wanted):
        read_table("Some GPU")
    monkeypatch.setenv(configs.FOLDER_VARIABLE, str(tmp_path))
    (tmp_path / "Some_GPU.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(KernelError, match=r"Some_GPU\.json: cannot be read: 'utf-8'"):
        read_table("Some GPU")
    with pytest.raises(KernelError, match=r"x\.json: is no JSON"):
        parse_table("[" * 100_000, "x.json")


def test_unknown_kernels_and_keys_are_refused():
    """By name, with what there is."""
    with pytest.raises(KernelError, match="kernel 'nrom' is not one that can be tuned: norm"):
        config_for("nrom", CPU)
    with pytest.raises(KernelError, match=r"'norm' is not tuned by rows=3; it is by size \(int\)"):
        config_for("norm", CPU, rows=3)
    with pytest.raises(KernelError, match="kernel 'nrom'"):
        candidates("nrom")
    with pytest.raises(KernelError, match="'rotary' is not tuned by head_dim='x'"):
        candidates("rotary", head_dim="x")


def test_candidates_are_what_a_file_may_say():
    """All are choices of the kernel; blocks are no larger than what they divide."""
    for kernel, tunable in TUNABLES.items():
        found = candidates(kernel)
        assert len({tuple(each.items()) for each in found}) == len(found) > 1
        as_json("x", {kernel: [({}, found[0]), ({}, found[-1])]})
        assert set(found[0]) == set(tunable.fields)
    few = candidates("quantized_product", rows=3, outputs=100, inputs=64, kind="int4")
    assert {each["ROWS"] for each in few} == {16}
    assert max(each["OUTPUTS"] for each in few) == 128
    assert max(each["INPUTS"] for each in few) == 64


def test_buckets_are_powers_of_two():
    assert [bucket(n) for n in (0, 1, 2, 3, 4, 5, 1000)] == [1, 1, 2, 4, 4, 8, 1024]
