"""Adapters that clients have loaded come from below the directories that are named, and no other.

The tree has an adapter inside and a secret one beside it, and every way between them that a file
system has.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

pytest.importorskip("fastapi")

from quire.server.adapter_folders import AdapterFolders
from quire.server.errors import ApiError

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
HAS_OPEN_FILES = Path("/proc/self/fd").is_dir()


def adapter(folder: Path, text: str) -> Path:
    folder.mkdir(parents=True)
    for name in (CONFIG, TENSORS):
        (folder / name).write_text(f"{text} {name}")
    return folder


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``allowed`` is the directory; ``real`` is what it is a symlink to."""
    top = tmp_path_factory.mktemp("tree").resolve()
    inside = top / "real"
    adapter(inside / "good", "good")
    adapter(inside / "deep" / "good", "deep")
    adapter(top / "outside", "secret")
    adapter(top / "allowed-too", "secret")  # begins with the directory's name
    (top / "allowed").symlink_to(inside)
    for name, target in {
        "in": "good",
        "through": "out-and-in/good",
        "out": "../outside",
        "out-and-in": "../real",
        "absolute": str(top / "outside"),
        "up": "..",
        "root": "/",
        "nowhere": "../nothing",
        "loop": "loop",
    }.items():
        (inside / name).symlink_to(target)
    for name, target in {
        "steals": top / "outside",
        "misses": top / "nothing",
        "borrows": inside / "good",
    }.items():
        adapter(inside / name, name)
        for file in (CONFIG, TENSORS):
            (inside / name / file).unlink()
            (inside / name / file).symlink_to(target / file)
    adapter(inside / "half", "half")
    (inside / "half" / TENSORS).unlink()
    (inside / "empty").mkdir()
    return top


@pytest.fixture
def folders(tree: Path) -> AdapterFolders:
    return AdapterFolders([str(tree / "allowed")])


@contextmanager
def opened(folders: AdapterFolders, path: str) -> Iterator[Path]:
    files = folders.open(path)
    try:
        yield Path(files.path)
    finally:
        files.close()


def refusal(folders: AdapterFolders, path: str) -> str:
    with pytest.raises(ApiError) as caught:
        folders.open(path)
    assert (caught.value.status, caught.value.param) == (400, "lora_path")
    return caught.value.message


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("good", "good"),
        ("./good/", "good"),
        ("deep//good", "deep"),
        ("in", "good"),
        ("through", "good"),
        ("{top}/allowed/good", "good"),
        ("{top}/real/deep/good", "deep"),
        ("borrows", "good"),
    ],
)
def test_what_is_inside_is_found(tree: Path, folders: AdapterFolders, path: str, text: str) -> None:
    """By relative and absolute paths, by the directory's own name and by what it leads to."""
    with opened(folders, path.replace("{top}", str(tree))) as folder:
        assert (folder / CONFIG).read_text() == f"{text} {CONFIG}"
        assert (folder / TENSORS).read_text() == f"{text} {TENSORS}"


OUTSIDE = [
    "out", "absolute", "nowhere", "loop", "root", "up/outside", "up/nothing", "root/etc", "missing",
    "~", "~root", "$HOME", "%2e%2e/outside", "..\\outside", "good/adapter_config.json", "good/x",
    "/", "//", "/etc", "/nothing", "/proc/self/cwd", "/proc/self/root", "{top}", "{top}/outside",
    "{top}/nothing", "{top}/allowed-too", "/{top}/outside", "{top}/allowed/out", "x" * 300,
    "x/" * 2000, "Ü", "．．/outside", "good\u2215..", "file://{top}/outside", "org/name", "C:",
]  # fmt: skip


@pytest.mark.parametrize("path", OUTSIDE)
def test_what_is_outside_is_refused_and_not_told_from_what_is_not_there(
    tree: Path, folders: AdapterFolders, path: str
) -> None:
    """The answer is the one for a name that nothing has, with the path as the client wrote it."""
    path = path.replace("{top}", str(tree))
    message = refusal(folders, path)
    shown = repr(path) if len(repr(path)) <= 200 else repr(path)[:200] + "..."
    assert message.replace(shown, "PATH") == refusal(folders, "zz").replace("'zz'", "PATH")


@pytest.mark.parametrize(
    ("path", "word"),
    [
        ("", "the path of a folder"),
        (" \t", "the path of a folder"),
        ("good\0", "control characters"),
        ("good\n", "control characters"),
        ("\x1b[2J", "control characters"),
        ("\u202egood", "control characters"),
        ("good\ud800", "control characters"),
        ("..", "'..'"),
        ("../outside", "'..'"),
        ("good/../../outside", "'..'"),
        ("{top}/allowed/../outside", "'..'"),
        ("good/..", "'..'"),
        ("x" * 5000, "4096 bytes"),
        ("é" * 3000, "4096 bytes"),
    ],
)
def test_what_is_no_path_is_refused_by_what_is_wrong_with_it(
    tree: Path, folders: AdapterFolders, path: str, word: str
) -> None:
    assert word in refusal(folders, path.replace("{top}", str(tree)))


@pytest.mark.parametrize("path", ["steals", "misses"])
def test_files_that_lead_out_are_refused(folders: AdapterFolders, path: str) -> None:
    """Whether there is something at their other end or not."""
    message = refusal(folders, path)
    assert f"{CONFIG} of {path!r} is not a file" in message


def test_what_is_no_file_is_refused_at_once(tree: Path) -> None:
    """A pipe without a writer, a folder, a device: nothing of these is waited for, or read."""
    top = tree / "real" / "strange"
    for name in ("pipe", "folder", "device"):
        adapter(top / name, name)
        (top / name / TENSORS).unlink()
    os.mkfifo(top / "pipe" / TENSORS)
    (top / "folder" / TENSORS).mkdir()
    (top / "device" / TENSORS).symlink_to("/dev/zero")
    folders = AdapterFolders([str(top)])
    for name in ("pipe", "folder", "device"):
        assert f"{TENSORS} of {name!r}" in refusal(folders, name)


def test_an_incomplete_folder_is_told_so(tree: Path, folders: AdapterFolders) -> None:
    """Pickled tensors are the reader's to refuse, which knows what to do about them."""
    for path in ("half", "empty", "deep", "."):
        assert f"has to have the files {CONFIG} and {TENSORS}" in refusal(folders, path)
    pickled = adapter(tree / "real" / "pickled", "pickled")
    (pickled / TENSORS).rename(pickled / "adapter_model.bin")
    with opened(folders, "pickled") as folder:
        assert {each.name for each in folder.iterdir()} == {CONFIG, "adapter_model.bin"}


def test_relative_paths_are_looked_for_in_each_directory(tree: Path, tmp_path: Path) -> None:
    """In their order; and what one of them leads to in another is inside."""
    adapter(tmp_path / "mine", "mine")
    adapter(tmp_path / "good", "first")
    (tmp_path / "theirs").symlink_to(tree / "real" / "deep" / "good")
    folders = AdapterFolders([str(tmp_path), str(tree / "allowed")])
    for path, text in (("mine", "mine"), ("good", "first"), ("in", "good"), ("theirs", "deep")):
        with opened(folders, path) as folder:
            assert (folder / CONFIG).read_text().startswith(text)


PARTS = st.sampled_from(
    ["good", "deep", "in", "out", "up", "root", "absolute", "out-and-in", "steals", "borrows",
     "outside", "allowed", "real", "allowed-too", "..", ".", "", "~", CONFIG, "loop"]
)  # fmt: skip


@given(parts=st.lists(PARTS, max_size=6), start=st.sampled_from(["", "/", "{top}/", "{top}/real/"]))
@example(parts=["up", "outside"], start="")
@settings(deadline=None)
def test_no_path_leads_to_a_file_outside(tree: Path, parts: list[str], start: str) -> None:
    """Whatever way through links, dots and slashes: what is opened is of the directory."""
    folders = AdapterFolders([str(tree / "allowed")])
    try:
        files = folders.open(start.replace("{top}", str(tree)) + "/".join(parts))
    except ApiError:
        return
    try:
        for file in Path(files.path).iterdir():
            assert not file.read_text().startswith("secret")
    finally:
        files.close()


def test_a_link_that_is_put_there_after_the_check_is_not_followed(
    tree: Path, folders: AdapterFolders, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if each were still a folder, or a file, when the path was looked at."""
    real = os.path.realpath
    late = {str(tree / "real" / name) for name in ("out", "up", "absolute", "steals")}

    def before(path: str) -> str:
        for each in late:
            if path.replace("/allowed", "/real").startswith(each):
                return path.replace("/allowed", "/real")
        return real(path)

    monkeypatch.setattr(os.path, "realpath", before)
    for path in ("out", "up/outside", "absolute", "steals"):
        refusal(folders, path)


@pytest.mark.skipif(not HAS_OPEN_FILES, reason="needs /proc/self/fd")
def test_what_was_checked_is_what_is_read(tmp_path: Path) -> None:
    """Whatever takes the place of the folder, or of a file in it, between check and reading."""
    inside, secret = adapter(tmp_path / "a" / "mine", "mine"), adapter(tmp_path / "b", "secret")
    with opened(AdapterFolders([str(tmp_path / "a")]), "mine") as folder:
        (inside / CONFIG).unlink()
        (inside / CONFIG).symlink_to(secret / CONFIG)
        assert (folder / CONFIG).read_text() == f"mine {CONFIG}"
        inside.rename(tmp_path / "c")
        inside.symlink_to(secret)
        for _ in range(2):
            assert (folder / TENSORS).read_text() == f"mine {TENSORS}"


@pytest.mark.skipif(not HAS_OPEN_FILES, reason="needs /proc/self/fd")
def test_nothing_stays_open(folders: AdapterFolders, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither of what was refused nor of what was closed, once or twice; nor is a folder left."""

    def numbers() -> set[str]:
        return set(os.listdir("/proc/self/fd"))

    before = numbers()
    for path in (*OUTSIDE, "steals", "misses"):
        refusal(folders, path)
    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "tempdir", "/nowhere")
        with pytest.raises(ApiError, match="temporary files"):
            folders.open("good")
    files = folders.open("good")
    folder = Path(files.path)
    assert folder.is_dir()
    files.close()
    files.close()
    assert not folder.exists()
    assert numbers() <= before


def test_messages_have_the_path_that_the_client_wrote(folders: AdapterFolders) -> None:
    """Not the one that the reader got, which tells of the server's machine."""
    files = folders.open("good")
    error = ValueError(f"{files.path}/{CONFIG}: r is -1, and '{files.path}' has it")
    assert files.words(error) == f"good/{CONFIG}: r is -1, and 'good' has it"
    files.close()
