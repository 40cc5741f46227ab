"""AdapterStore: never another content than was asked for, read once, and gone when nobody needs it.

Folders are dicts here, so that time and files do what a test says.
"""

from __future__ import annotations

import logging
import tempfile
import threading
import time
import weakref
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from quire import LoRARequest
from quire.config import LoRAConfig
from quire.errors import AdapterError, EngineClosedError, InvalidRequestError
from quire.lora.store import AdapterStore, AdapterTools
from quire.models.adapter import PreparedAdapter
from quire.utils import forks


@dataclass(frozen=True)
class Stamp:
    changed_ns: int


class InBytes:
    """A path, but no text."""

    def __fspath__(self):
        return b"b"


class Disk:
    """Folders of made-up adapters, and a count of what was read of them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.contents: dict[Path, str] = {}
        self.changed: dict[Path, int] = {}
        self.num_read = 0
        self.num_prepared = 0
        self.on_read = lambda folder: None

    def write(self, name: str, content: str, *, age: float = 10) -> str:
        folder = (self.root / name).resolve()
        folder.mkdir(exist_ok=True)
        self.contents[folder] = content
        self.changed[folder] = time.time_ns() - int(age * 1e9)
        return str(folder)

    def look(self, folder):
        if folder not in self.contents:
            raise AdapterError(f"{folder} has no adapter_config.json")
        # The content is no part of it: only the time tells.
        return Stamp(self.changed[folder])

    def read(self, folder):
        content = self.contents.get(folder)
        if content is None:
            raise AdapterError(f"{folder} has no adapter_config.json")
        self.num_read += 1
        self.on_read(folder)
        return SimpleNamespace(digest=content)

    def prepare(self, adapter):
        self.num_prepared += 1
        return PreparedAdapter(adapter.digest, 1, object())

    def find(self, path):
        raise AdapterError(f"lora_path is {path!r}, which is neither here nor on the hub")

    @property
    def tools(self):
        return AdapterTools(self.find, self.look, self.read, self.prepare)


@pytest.fixture
def disk(tmp_path):
    return Disk(tmp_path)


@pytest.fixture
def make_store(disk):
    def make(**options):
        return AdapterStore(LoRAConfig(enable_lora=True, **options), disk.tools)

    return make


@pytest.fixture
def store(make_store):
    return make_store()


def at(path, name="n", **options):
    return LoRARequest(name, lora_path=path, **options)


def test_content_decides_which_adapter_it_is(store, disk):
    """Equal content under other names, folders and numbers is one object; other content is not."""
    one, same, other = disk.write("one", "x"), disk.write("same", "x"), disk.write("other", "y")
    first = store.resolve(at(one, "a", lora_int_id=1))
    assert store.resolve(at(same, "b", lora_int_id=2)) is first
    assert store.resolve(at(other, "a", lora_int_id=1)) is not first
    store.load(same, "c")
    assert store.resolve("c") is store.resolve(LoRARequest("c")) is first
    assert disk.num_prepared == 2
    assert store.resolve(None) is None


def test_a_folder_is_read_when_it_has_changed_and_only_then(store, disk):
    path = disk.write("a", "x")
    for _ in range(3):
        assert store.resolve(at(path)).digest == "x"
    assert disk.num_read == 1
    disk.write("a", "y", age=5)
    for _ in range(3):
        assert store.resolve(at(path)).digest == "y"
    assert disk.num_read == 2


def test_a_folder_that_was_just_written_is_not_believed_to_be_unchanged(store, disk):
    """Two writes within a tick of the file system's clock leave the same fingerprint."""
    path = disk.write("a", "x", age=0.5)
    stamp = disk.changed.copy()
    assert store.resolve(at(path)).digest == "x"
    disk.write("a", "y")
    disk.changed = stamp
    assert store.resolve(at(path)).digest == "y"
    assert store.resolve(at(path)).digest == "y"
    assert disk.num_read == 3
    assert disk.num_prepared == 2, "what was read again and is the same is not made again"


def test_a_folder_that_changes_while_it_is_read_is_read_again(store, disk):
    """What is returned was read between two equal looks at the files."""
    path = disk.write("a", "x")
    writes = iter("yz")

    def change(folder):
        if (content := next(writes, None)) is not None:
            disk.write("a", content, age=5 - disk.num_read)

    disk.on_read = change
    assert store.resolve(at(path)).digest == "z"
    ages = iter(range(100, 0, -1))
    disk.on_read = lambda folder: disk.write("a", "never still", age=next(ages))
    disk.write("a", "w")
    with pytest.raises(AdapterError, match="changed each of the 5 times"):
        store.resolve(at(path))


def test_half_a_file_is_an_error_only_if_it_stays_one(store, disk):
    """An error of a folder that was written meanwhile is none of the user's."""
    path = disk.write("a", "x")

    def fail_once(folder):
        disk.on_read = lambda folder: None
        disk.write("a", "y", age=3)
        raise AdapterError("truncated")

    disk.on_read = fail_once
    assert store.resolve(at(path)).digest == "y"

    def fail(folder):
        raise AdapterError("truncated")

    disk.on_read = fail
    disk.write("a", "z", age=2.5)
    with pytest.raises(AdapterError, match="truncated"):
        store.resolve(at(path))


def test_load_inplace_reads_what_seems_unchanged(store, disk):
    path = disk.write("a", "x")
    store.load(path, "a")
    stamp = disk.changed.copy()
    disk.write("a", "y")
    disk.changed = stamp
    assert store.resolve(at(path)).digest == "x"
    assert store.resolve(at(path, load_inplace=True)).digest == "y"
    assert store.resolve("a").digest == "x", "a name means what was read when it was loaded"
    store.load(path, "a", load_inplace=True)
    assert store.resolve("a").digest == "y"


def test_a_name_means_what_was_loaded_until_it_is_loaded_again(store, disk):
    path = disk.write("french", "x")
    request = store.load(path)
    assert request == LoRARequest("french", lora_path=path)
    disk.write("french", "y", age=5)
    assert store.resolve("french").digest == "x"
    assert store.resolve(request).digest == "y", "with a path it means what lies there"
    store.load(path)
    assert store.resolve("french").digest == "y"
    assert store.list() == [request]


def test_what_is_not_there_is_said_with_what_is(store, disk):
    with pytest.raises(AdapterError, match="no adapter is called 'a'; loaded are: none"):
        store.resolve("a")
    for name in "bc":
        store.load(disk.write(name, name))
    for wrong in ("a", LoRARequest("a"), LoRARequest("a", 3)):
        with pytest.raises(AdapterError, match="no adapter is called 'a'; loaded are: 'b', 'c'"):
            store.resolve(wrong)
    for name in ("a", None, 3, ["b"], LoRARequest("b")):
        what = r"unload_lora: no adapter is called .* 'b', 'c'\. It takes a name, as a str"
        with pytest.raises(AdapterError, match=what):
            store.unload(name)
    with pytest.raises(AdapterError, match="neither here nor on the hub"):
        store.resolve(at("no/where"))
    with pytest.raises(InvalidRequestError, match="lora_path must be a folder"):
        store.resolve(SimpleNamespace(lora_name="b", lora_path=InBytes()))
    for wrong in (3, object(), {"lora_name": "b"}, ["b"]):
        with pytest.raises(InvalidRequestError, match="lora_request must be a LoRARequest"):
            store.resolve(wrong)
    for wrong in (3, "", None):
        with pytest.raises(InvalidRequestError, match="path must be"):
            store.load(wrong)
    with pytest.raises(InvalidRequestError, match="lora_name"):
        store.load(disk.write("b", "b"), " ")
    assert [each.lora_name for each in store.list()] == ["b", "c"]


def test_without_adapters_the_error_says_what_to_set(disk):
    store = AdapterStore(LoRAConfig())
    assert store.resolve(None) is None
    assert store.list() == []
    for call in (
        lambda: store.resolve(at(disk.write("a", "x"))),
        lambda: store.load(disk.write("a", "x")),
        lambda: store.unload("a"),
    ):
        with pytest.raises(AdapterError, match="enable_lora=True"):
            call()


def test_requests_of_other_libraries_are_read(store, disk):
    """Whatever has the attributes `lora_name` and `lora_path` is a request for an adapter."""
    foreign = SimpleNamespace(lora_name="a", lora_path=disk.write("a", "x"), lora_int_id=7)
    assert store.resolve(foreign).digest == "x"
    foreign = SimpleNamespace(lora_name="b", lora_path=None)
    store.load(disk.write("b", "y"))
    assert store.resolve(foreign).digest == "y"


# -- memory --------------------------------------------------------------------------------------


def test_memory_holds_as_many_as_it_may_and_forgets_the_least_recently_used(make_store, disk):
    store = make_store(max_cpu_loras=2)
    paths = {name: disk.write(name, name) for name in "abc"}
    known = {name: weakref.ref(store.resolve(at(path))) for name, path in paths.items()}
    assert [name for name, ref in known.items() if ref() is None] == ["a"]
    store.resolve(at(paths["b"]))
    store.resolve(at(paths["a"]))
    assert known["c"]() is None
    assert known["b"]() is not None
    assert store.num_kept == 2


def test_an_adapter_in_use_is_found_again_and_not_read(make_store, disk):
    """Who holds one shares it with those who ask later, though the store had let it go."""
    store = make_store(max_cpu_loras=1)
    a, b = disk.write("a", "x"), disk.write("b", "y")
    store.load(a, "a")
    in_use = store.resolve("a")
    store.resolve(at(b))
    assert disk.num_read == 2
    assert store.resolve("a") is in_use
    assert disk.num_read == 2
    store.resolve(at(b))
    assert store.resolve(at(a)) is in_use, "it was read again, and is the same"
    assert disk.num_prepared == 3


def test_a_name_whose_adapter_left_memory_is_read_again(make_store, disk, caplog):
    """As it is now; when that is another content, the log says so."""
    store = make_store(max_cpu_loras=1)
    store.load(disk.write("a", "x"))
    store.load(disk.write("b", "y"))
    with caplog.at_level(logging.WARNING, logger="quire"):
        assert store.resolve("a").digest == "x"
        assert not caplog.records
        store.resolve("b")
        disk.write("a", "z", age=5)
        assert store.resolve("a").digest == "z"
    assert "holds another one than when it was loaded" in caplog.text
    store.resolve("b")
    del disk.contents[Path(store.list()[0].lora_path)]
    with pytest.raises(AdapterError, match=r"'a' left memory \(max_cpu_loras=1\) and cannot be"):
        store.resolve("a")


@pytest.mark.parametrize("loaded_again", [True, False])
def test_a_name_that_changes_while_it_is_read_again_is_what_it_is_now(
    make_store, disk, loaded_again
):
    """Its folder goes in that moment, as a server's does: the request gets the new one, or hears
    that there is none, and not of a folder that nobody knows."""
    store = make_store(max_cpu_loras=1)
    store.load(disk.write("a", "x"), "n")
    store.load(disk.write("b", "y"), "other")

    def change(folder):
        disk.on_read = lambda folder: None
        if loaded_again:
            store.load(disk.write("c", "z"), "n")
        else:
            store.unload("n")
        del disk.contents[folder]

    disk.on_read = change
    if loaded_again:
        assert store.resolve("n").digest == "z"
    else:
        with pytest.raises(AdapterError, match="no adapter is called 'n'"):
            store.resolve("n")


def test_by_default_what_was_loaded_by_name_stays(make_store, disk):
    """Besides, as many as run at once are kept."""
    store = make_store(max_loras=2)
    for name in "abcd":
        store.load(disk.write(name, name))
    for name in "efgh":
        store.resolve(at(disk.write(name, name)))
    assert store.num_kept == 6
    before = disk.num_read
    for name in "abcd":
        store.resolve(name)
    assert disk.num_read == before


def test_memory_goes_with_the_last_name_and_the_last_request(store, disk):
    path = disk.write("a", "x")
    store.load(path, "a")
    store.load(path, "b")
    running = store.resolve("a")
    known = weakref.ref(running)
    store.unload("a")
    store.unload("b")
    assert known() is running
    assert store.num_kept == 0
    del running
    assert known() is None


def test_a_replaced_content_does_not_stay_behind(store, disk):
    """Neither that of a name nor that of a folder."""
    path = disk.write("a", "x")
    by_name = weakref.ref(store.resolve(store.load(path)))
    disk.write("a", "y", age=5)
    store.load(path)
    assert by_name() is None
    folder = disk.write("b", "p")
    by_path = weakref.ref(store.resolve(at(folder)))
    disk.write("b", "q", age=5)
    store.resolve(at(folder))
    assert by_path() is None
    assert store.num_kept == 2


def test_a_closed_store_holds_nothing(store, disk):
    path = disk.write("a", "x")
    known = weakref.ref(store.resolve(store.load(path)))
    store.close()
    store.close()
    assert known() is None
    for call in (lambda: store.resolve("a"), lambda: store.load(path)):
        with pytest.raises(EngineClosedError):
            call()


def test_what_is_read_while_the_store_is_closed_is_not_kept(store, disk):
    disk.on_read = lambda folder: store.close()
    with pytest.raises(EngineClosedError):
        store.resolve(at(disk.write("a", "x")))
    assert store.num_kept == 0


# -- threads -------------------------------------------------------------------------------------


def test_threads_that_ask_at_once_read_once(store, disk):
    """The others wait for the one that reads; who asks for another folder does not."""
    path, other = disk.write("a", "x"), disk.write("b", "y")
    entered, go_on = threading.Event(), threading.Event()

    def hold(folder):
        if folder == Path(path):
            entered.set()
            assert go_on.wait(20)

    disk.on_read = hold
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(store.resolve(at(path)))) for _ in range(5)
    ]
    for thread in threads:
        thread.start()
    assert entered.wait(20)
    assert store.resolve(at(other)).digest == "y"
    assert store.list() == []
    go_on.set()
    for thread in threads:
        thread.join(20)
    assert len(found) == 5
    assert len(set(map(id, found))) == 1
    assert disk.num_read == 2


def test_a_fork_reads_on_a_new_thread(store, disk, monkeypatch):
    """The thread that forked would wait for OpenMP's threads, which are in the parent process."""
    readers = []
    disk.on_read = lambda folder: readers.append(threading.current_thread())
    store.load(disk.write("a", "x"))
    monkeypatch.setattr(forks, "_is_fork", True)
    store.load(disk.write("b", "y"))
    here, elsewhere = readers
    assert here is threading.current_thread() is not elsewhere


def test_an_error_is_told_to_each_who_asks(store, disk):
    def fail(folder):
        raise AdapterError("damaged")

    disk.on_read = fail
    path = disk.write("a", "x")
    for _ in range(2):
        with pytest.raises(AdapterError, match="damaged"):
            store.resolve(at(path))
    disk.on_read = lambda folder: None
    assert store.resolve(at(path)).digest == "x"


def test_what_is_at_hand_needs_no_thread(store, disk):
    """A name whose adapter is in memory is; a path, whose files have to be looked at, is not."""
    path = disk.write("a", "x")
    store.load(path)
    assert store.is_at_hand(None)
    assert store.is_at_hand("a")
    assert store.is_at_hand("nobody"), "an error is"
    assert store.is_at_hand(3)
    assert not store.is_at_hand(at(path))


# -- anything in any order -----------------------------------------------------------------------


class StoreStates(RuleBasedStateMachine):
    """Writes, loads, unloads and requests in any order, against what the folders held when."""

    names = st.sampled_from("abc")
    contents = st.sampled_from("wxyz")

    @initialize(most=st.sampled_from([None, 1, 2]))
    def start(self, most):
        self.folder = tempfile.TemporaryDirectory()
        self.disk = Disk(Path(self.folder.name))
        config = LoRAConfig(enable_lora=True, max_loras=2, max_cpu_loras=most)
        self.store = AdapterStore(config, self.disk.tools)
        self.most = most
        self.loaded: dict[str, set[str]] = {}  # what a name may mean
        self.folders: dict[str, str] = {}
        self.running: list[PreparedAdapter] = []
        self.clock = 1000.0
        for name in "abc":
            self.write(name, name)

    def write(self, folder, content):
        self.clock -= 1
        self.disk.write(folder, content, age=self.clock)

    def holds(self, folder):
        return self.disk.contents[(self.disk.root / folder).resolve()]

    @rule(folder=names, content=contents)
    def edit(self, folder, content):
        self.write(folder, content)

    @rule(folder=names, name=names)
    def load(self, folder, name):
        self.store.load(str(self.disk.root / folder), name)
        self.loaded[name], self.folders[name] = {self.holds(folder)}, folder

    @precondition(lambda self: self.loaded)
    @rule(data=st.data())
    def unload(self, data):
        name = data.draw(st.sampled_from(sorted(self.loaded)))
        self.store.unload(name)
        del self.loaded[name]

    @rule(name=names, keep=st.booleans())
    def ask_by_name(self, name, keep):
        if name not in self.loaded:
            with pytest.raises(AdapterError):
                self.store.resolve(name)
            return
        adapter = self.store.resolve(name)
        # Read again after it left memory, it is what the folder holds now; never anything else.
        allowed = self.loaded[name] | ({self.holds(self.folders[name])} if self.most else set())
        assert adapter.digest in allowed
        self.loaded[name] = {adapter.digest}
        if keep:
            self.running.append(adapter)

    @rule(folder=names, keep=st.booleans(), again=st.booleans())
    def ask_by_path(self, folder, keep, again):
        request = LoRARequest("n", lora_path=self.disk.root / folder, load_inplace=again)
        adapter = self.store.resolve(request)
        assert adapter.digest == self.holds(folder)
        if keep:
            self.running.append(adapter)

    @precondition(lambda self: self.running)
    @rule()
    def end(self):
        self.running.pop(0)

    @invariant()
    def books_agree(self):
        if not hasattr(self, "store"):
            return
        assert sorted(each.lora_name for each in self.store.list()) == sorted(self.loaded)
        alive = {}
        for adapter in self.running:
            assert alive.setdefault(adapter.digest, adapter) is adapter, "two of one content"
        if self.most is not None:
            assert self.store.num_kept <= self.most

    def teardown(self):
        if hasattr(self, "folder"):
            self.store.close()
            self.folder.cleanup()


TestStoreStates = StoreStates.TestCase
TestStoreStates.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
