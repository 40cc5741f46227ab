"""`import vllm` is served when it is asked for, and only then; what is not served says so."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

import quire.integrations.vllm as stand_in
from quire.integrations.vllm.release import VERSION
from quire.integrations.vllm.surface import RUNNABLE, SURFACE


def test_nothing_is_served_before_install_and_after_uninstall() -> None:
    assert importlib.util.find_spec("vllm") is None
    stand_in.install()
    stand_in.install()
    assert stand_in.is_installed()
    import vllm  # type: ignore[import-not-found]

    kept = vllm.SamplingParams
    stand_in.uninstall()
    stand_in.uninstall()
    assert not stand_in.is_installed()
    assert "vllm" not in sys.modules
    assert importlib.util.find_spec("vllm") is None
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("vllm")
    assert kept(n=2).n == 2


@pytest.mark.parametrize("module", sorted(SURFACE))
def test_every_name_of_the_surface_can_be_imported(module: str, served: None) -> None:
    found = importlib.import_module(module)
    assert found.__name__ == module
    for name in SURFACE[module]:
        assert getattr(found, name) is not None
        assert name in dir(found)
    parent, _, last = module.rpartition(".")
    if parent:
        assert getattr(importlib.import_module(parent), last) is found


def test_stars_submodules_and_plain_imports_work(served: None) -> None:
    space: dict[str, object] = {}
    exec("from vllm import *", space)
    assert "LLM" in space
    assert "__version__" not in space
    exec("import vllm.sampling_params as p\nimport vllm\nassert vllm.sampling_params is p", space)
    exec("from vllm import sampling_params\nassert sampling_params.SamplingParams", space)


def test_the_version_is_the_followed_release_and_says_whose_it_is(served: None) -> None:
    import vllm
    from packaging.version import Version

    assert vllm.__version__ == VERSION == importlib.metadata.version("vllm")
    assert Version(VERSION) >= Version("0.33.0")
    assert "quire" in (Version(VERSION).local or "")
    assert importlib.metadata.metadata("vllm")["Name"] == "vllm"
    assert vllm.__version_tuple__[:3] == (0, 33, 0)
    assert "vllm" in {each.metadata["Name"] for each in importlib.metadata.distributions()}
    spec = importlib.util.find_spec("vllm.sampling_params")
    assert spec is not None
    assert spec.name == "vllm.sampling_params"


@pytest.mark.parametrize(
    "line",
    [
        "from vllm import ModelRegistry",
        "import vllm.model_executor.layers",
        "from vllm.sampling_params import Nothing",
        "from vllm.nothing import LLM",
    ],
)
def test_what_is_not_served_is_an_import_error_that_says_what_is(line: str, served: None) -> None:
    with pytest.raises(ImportError, match=r"not served by quire.*SamplingParams"):
        exec(line)


def test_a_missing_attribute_is_an_attribute_error(served: None) -> None:
    import vllm

    assert not hasattr(vllm, "nothing")
    with pytest.raises(AttributeError, match=r"vllm\.nothing is not served"):
        vllm.nothing  # noqa: B018


def test_a_real_vllm_is_refused_unless_forced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "vllm"
    package.mkdir()
    (package / "__init__.py").write_text("REAL = True\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(stand_in.StandInError, match=r"real vLLM.*vllm.__init__\.py.*force=True"):
        stand_in.install()
    assert not stand_in.is_installed()
    stand_in.install(force=True)
    try:
        import vllm

        assert not hasattr(vllm, "REAL")
    finally:
        stand_in.uninstall()
    import vllm

    assert vllm.REAL
    try:
        with pytest.raises(stand_in.StandInError, match="imported already"):
            stand_in.install(force=True)
    finally:
        del sys.modules["vllm"]


def test_importing_the_stand_in_brings_in_neither_torch_nor_vllm() -> None:
    code = (
        "import sys, quire.integrations.vllm as v; v.install(); import vllm; "
        "heavy = {'torch', 'transformers', 'importlib.metadata'} & set(sys.modules); "
        "assert not heavy, heavy; vllm.SamplingParams; "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-P", "-c", code], check=True, timeout=60)


def test_what_can_be_run_has_a_main(served: None) -> None:
    for target in RUNNABLE.values():
        assert callable(importlib.import_module(target).main)
