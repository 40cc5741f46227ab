"""Where a model's name leads: a folder, the demo, a hub's cache; or an error that says what to do.

Nothing here reaches a network: the hub library is offline, or replaced.
"""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.config import ModelConfig
from quire.errors import ConfigError, ModelNotFoundError
from quire.models import hub
from quire.models.hub import resolve

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A hub cache that holds org/name, revision main."""
    folder = tmp_path / "models--org--name"
    snapshot = folder / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)
    return tmp_path


def test_a_folder_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that exists is taken, also where its name could be a hub's."""
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve("org/name") == tmp_path / "org" / "name"
    assert resolve(str(tmp_path)) == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~/org") == tmp_path / "org"


def test_the_demo_ships_with_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """quire/demo needs no hub, and missing files of it are a quire error."""
    demo = types.ModuleType("quire.demo")
    demo.model_path = lambda: tmp_path  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "quire.demo", demo)
    assert resolve("quire/demo") == tmp_path

    def missing() -> Path:
        raise FileNotFoundError("the files are missing")

    demo.model_path = missing  # type: ignore[attr-defined]
    with pytest.raises(ModelNotFoundError, match="the files are missing"):
        resolve("quire/demo")


def test_a_file_is_not_a_model(tmp_path: Path) -> None:
    """A weight file instead of its folder: the error says so."""
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(ModelNotFoundError, match="which is a file"):
        resolve(str(file))


def test_the_argument_that_is_wrong_is_named() -> None:
    """A tokenizer that is not there is not called a model."""
    with pytest.raises(ModelNotFoundError, match=r"^tokenizer is '\./none': there is no such"):
        hub.resolve_tokenizer(ModelConfig(model="quire/demo", tokenizer="./none"))


@pytest.mark.parametrize("name", ["./none", "/no/such/folder", "a/b/c", "", "a b", "../x", "a/"])
def test_what_can_only_be_a_path_is_not_asked_for(name: str) -> None:
    """A path that leads nowhere is not sent to a hub."""
    with pytest.raises(ModelNotFoundError, match="no such folder"):
        resolve(name)


def test_a_cached_model_is_found_offline(cache: Path) -> None:
    """Under HF_HUB_OFFLINE, what an earlier download left is used; by name and by URL."""
    expected = cache / "models--org--name" / "snapshots" / COMMIT
    for name in ("org/name", "https://huggingface.co/org/name", "https://hf.co/org/name/tree/main"):
        assert resolve(name, download_dir=str(cache)) == expected


def test_what_is_not_cached_says_what_to_do_offline(cache: Path) -> None:
    """The error names the model, the reason, and the ways out."""
    with pytest.raises(ModelNotFoundError) as caught:
        resolve("org/other", revision="v2", download_dir=str(cache))
    message = str(caught.value)
    for part in ("org/other (revision v2)", "HF_HUB_OFFLINE is set", "hf download", "quire/demo"):
        assert part in message


@pytest.mark.parametrize(
    ("url", "revision", "expected"),
    [
        ("https://huggingface.co/gpt2", None, ("gpt2", None)),
        ("https://huggingface.co/org/name/", "v1", ("org/name", "v1")),
        ("http://hf.co/org/name/tree/v2", None, ("org/name", "v2")),
        ("https://huggingface.co/org/name/tree/v2", "v2", ("org/name", "v2")),
        ("https://huggingface.co/gpt2/tree/refs%2Fpr%2F1", None, ("gpt2", "refs/pr/1")),
        ("https://huggingface.co/org/name?library=x", None, ("org/name", None)),
    ],
)
def test_urls_of_models(url: str, revision: str | None, expected: tuple[str, str | None]) -> None:
    """A model's page, and that of one of its revisions, name the model."""
    assert hub._parse_url(url, revision) == expected


@given(st.text(st.characters(codec="ascii", exclude_characters="\0"), max_size=40))
def test_no_text_breaks_the_url_parser(text: str) -> None:
    """Any URL gives a name of at most two parts, or a ModelNotFoundError."""
    try:
        name, _ = hub._parse_url(f"https://huggingface.co/{text}", None)
    except ModelNotFoundError:
        return
    assert name.count("/") <= 1


@pytest.mark.parametrize(
    "url",
    [
        "https://example.com/org/name",
        "ftp://huggingface.co/org/name",
        "https://huggingface.co/",
        "https://huggingface.co/datasets/org/name",
        "https://huggingface.co/org/name/tree/main/folder",
        "https://huggingface.co/org/name/more",
    ],
)
def test_other_urls_are_refused(url: str) -> None:
    """Not any URL is fetched: only those of a model on the hub."""
    with pytest.raises(ModelNotFoundError, match="model is"):
        resolve(url)


def test_two_revisions_contradict_each_other() -> None:
    """A revision in the URL and another as argument: neither is silently dropped."""
    with pytest.raises(ConfigError, match=r"'v1'.*'v2'"):
        resolve("https://huggingface.co/org/name/tree/v2", revision="v1")


class FakeHub:
    """Stands for huggingface_hub online; records what is asked of it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, files: list[str]) -> None:
        import huggingface_hub

        self.calls: list[dict[str, Any]] = []
        self.failure: Exception | None = None
        fake = self

        class Api:
            def __init__(self, token: Any) -> None:
                self.token = token

            def model_info(self, name: str, revision: str | None) -> types.SimpleNamespace:
                if fake.failure:
                    raise fake.failure
                siblings = [types.SimpleNamespace(rfilename=file) for file in files]
                return types.SimpleNamespace(siblings=siblings)

        def snapshot_download(name: str, **options: Any) -> str:
            self.calls.append({"name": name, **options})
            if options.get("local_files_only"):
                raise FileNotFoundError("not cached")
            return "/snapshot"

        monkeypatch.setattr(huggingface_hub, "HfApi", Api)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)


@pytest.mark.parametrize(
    ("files", "wanted", "unwanted"),
    [
        (["model.safetensors", "pytorch_model.bin"], "model*.safetensors", "pytorch_model*.bin"),
        (["pytorch_model.bin", "x/model.safetensors"], "pytorch_model*.bin", "model*.safetensors"),
    ],
)
def test_only_one_format_of_the_weights_is_downloaded(
    files: list[str], wanted: str, unwanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Safetensors where there are any at the top, .bin files else, and nothing from folders."""
    fake = FakeHub(monkeypatch, files)
    path = resolve("org/name", revision="v1", download_dir="/d", token="secret")
    assert path == Path("/snapshot")
    (call,) = fake.calls
    assert wanted in call["allow_patterns"]
    assert unwanted not in call["allow_patterns"]
    assert "*.json" in call["allow_patterns"]
    assert call["ignore_patterns"] == ["*/*"]
    assert (call["revision"], call["cache_dir"], call["token"]) == ("v1", "/d", "secret")


def http_error(kind: str) -> Exception:
    """An error of the hub library, as it is raised for a response."""
    from huggingface_hub import errors

    error: Exception = getattr(errors, kind).__new__(getattr(errors, kind))
    error.args = (kind,)
    return error


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        ("GatedRepoError", "is gated.*HF_TOKEN"),
        ("RepositoryNotFoundError", "no model of that name.*HF_TOKEN"),
        ("RevisionNotFoundError", "no revision 'v9'"),
        ("HFValidationError", "no name of a model"),
        ("OfflineModeIsEnabled", "the hub cannot be used now"),
    ],
)
def test_what_a_hub_answers_is_put_into_words(
    failure: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gated, private, misspelt, unreachable: each its own message."""
    fake = FakeHub(monkeypatch, [])
    fake.failure = http_error(failure)
    with pytest.raises(ModelNotFoundError, match=message):
        resolve("org/name", revision="v9")


def test_modelscope_is_used_where_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """VLLM_USE_MODELSCOPE sends names there; what goes wrong there is a ModelNotFoundError."""
    calls = []

    def snapshot_download(name: str, **options: Any) -> str:
        if name == "org/none":
            raise OSError("no such model")
        calls.append((name, options))
        return "/scope"

    package = types.ModuleType("modelscope.hub.snapshot_download")
    package.snapshot_download = snapshot_download  # type: ignore[attr-defined]
    for name in ("modelscope", "modelscope.hub"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, package.__name__, package)
    monkeypatch.setenv("VLLM_USE_MODELSCOPE", "True")
    assert resolve("org/name", revision="v1", download_dir="/d") == Path("/scope")
    assert calls == [("org/name", {"revision": "v1", "cache_dir": "/d"})]
    with pytest.raises(ModelNotFoundError, match="ModelScope: no such model"):
        resolve("org/none")


def test_modelscope_without_its_package_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for and not installed: the error says how to get it."""
    monkeypatch.setitem(sys.modules, "modelscope", None)
    monkeypatch.setenv("VLLM_USE_MODELSCOPE", "1")
    with pytest.raises(ConfigError, match="pip install modelscope"):
        resolve("org/name")


def test_model_and_tokenizer_may_come_from_two_places(cache: Path, tmp_path: Path) -> None:
    """A tokenizer of its own is looked up by its own name and revision."""
    (tmp_path / "model").mkdir()
    config = types.SimpleNamespace(
        model=str(tmp_path / "model"),
        tokenizer=None,
        revision=None,
        tokenizer_revision="main",
        download_dir=str(cache),
        hf_token=None,
        load_format="auto",
    )
    assert hub.resolve_model(config) == hub.resolve_tokenizer(config) == tmp_path / "model"
    config.tokenizer = "org/name"
    assert hub.resolve_tokenizer(config).name == COMMIT


def test_a_tokenizer_may_come_from_another_revision_of_the_model(cache: Path) -> None:
    """tokenizer_revision is honoured without a tokenizer of another name."""
    other = "f" * 40
    folder = cache / "models--org--name"
    (folder / "snapshots" / other).mkdir()
    (folder / "snapshots" / other / "config.json").write_text("{}")
    (folder / "refs" / "v2").write_text(other)
    for tokenizer in (None, "org/name"):
        config = ModelConfig(
            model="org/name", tokenizer=tokenizer, tokenizer_revision="v2", download_dir=str(cache)
        )
        assert hub.resolve_model(config).name == COMMIT
        assert hub.resolve_tokenizer(config).name == other
    same = ModelConfig(model="org/name", revision="v2", download_dir=str(cache))
    assert hub.resolve_tokenizer(same).name == other
