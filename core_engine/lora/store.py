"""AdapterStore: adapters by their content, and what that content is called and where it lies."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

from quire.errors import AdapterError, EngineClosedError, InvalidRequestError
from quire.lora_request import LoRARequest
from quire.utils import forks
from quire.utils.checks import flag, refuse, shown

if TYPE_CHECKING:
    from quire.config import LoRAConfig
    from quire.lora.content import Fingerprint
    from quire.models.adapter import Adapter, PreparedAdapter

logger = logging.getLogger("quire")

_SETTLED_NS = 2_000_000_000
"""Age from which a file's time tells it from one that is written again: some file systems count
in steps of two seconds."""

_ATTEMPTS = 5
"""Times that a folder is read which somebody writes into meanwhile."""

# Of these names within a class that has a method `list`.
_Requests = list[LoRARequest]
_Places = list["_Name | _Known"]
_Leaving = list["PreparedAdapter | None"]


@dataclass(frozen=True, slots=True)
class AdapterTools:
    """How adapters are had; all of it may lead to the model.

    Attributes
    ----------
    find : callable
        From the path of a folder that is not here, as a name on the hub is, to a folder.
    look : callable
        From a folder to its Fingerprint.
    read : callable
        From a folder to its Adapter.
    prepare : callable
        From that to the PreparedAdapter; ``Decoder.prepare_adapter``.
    """

    find: Callable[[str], Path]
    look: Callable[[Path], Fingerprint]
    read: Callable[[Path], Adapter]
    prepare: Callable[[Adapter], PreparedAdapter]


@dataclass(frozen=True, slots=True)
class _Known:
    """What a folder held when it was read.

    `settled` says whether an equal fingerprint means equal content: not where the files had been
    written just before.
    """

    fingerprint: Fingerprint
    digest: str
    settled: bool


@dataclass(slots=True)
class _Name:
    """What a name stands for."""

    request: LoRARequest
    folder: Path
    digest: str


class AdapterStore:
    """The adapters of an engine; any thread may ask for one.

    An adapter is its content: folders and names that hold the same share one object. Those that
    were used last are kept; a request keeps its own alive besides, so that an adapter leaves
    memory when neither the store nor a request needs it any more.

    Parameters
    ----------
    config : LoRAConfig
    tools : AdapterTools, optional
        How adapters are had; not needed where there are none.
    """

    def __init__(self, config: LoRAConfig, tools: AdapterTools | None = None) -> None:
        self._config = config
        self._tools = tools
        # The lock is held for moments only, and never while a last reference is let go: what ends
        # with it tells the engine's thread.
        self._lock = threading.Lock()
        self._folder_locks: WeakValueDictionary[Path, threading.Lock] = WeakValueDictionary()
        self._alive: WeakValueDictionary[str, PreparedAdapter] = WeakValueDictionary()
        self._kept: OrderedDict[str, PreparedAdapter] = OrderedDict()  # the latest last
        self._known: dict[Path, _Known] = {}
        self._names: dict[str, _Name] = {}
        self._downloads: dict[str, Path] = {}
        self._num_reads = 0

    # -- names -----------------------------------------------------------------------------------

    def load(
        self,
        path: str | os.PathLike[str],
        name: str | None = None,
        *,
        load_inplace: bool = False,
        base_model_name: str | None = None,
    ) -> LoRARequest:
        """Read an adapter and give it a name, which it then has instead of any other.

        Parameters
        ----------
        path : str or path
            A folder or a name on the hub.
        name : str, optional
            By default the last part of the path.
        load_inplace : bool
            Read the files even where they seem unchanged.
        base_model_name : str, optional

        Returns
        -------
        LoRARequest
            By which requests can ask for it.

        Raises
        ------
        AdapterError
            There is none, or it does not fit.
        """
        self._open(f"load_lora({shown(path)})")
        flag("load_inplace", load_inplace)
        if isinstance(path, os.PathLike):
            path = os.fspath(path)
        if not isinstance(path, str) or not path.strip():
            raise refuse("path", path, "an adapter's folder or a name on the hub")
        folder = self._find(path, again=True)
        is_local = folder == _resolved(path)
        if name is None:
            name = folder.name if is_local else path.rstrip("/").rpartition("/")[2]
        request = LoRARequest(
            lora_name=name,
            lora_path=str(folder) if is_local else path,
            base_model_name=base_model_name,
        )
        adapter = self._at(folder, again=load_inplace)
        with self._lock:
            self._open("load_lora")
            before = self._names.get(name)
            self._names[name] = _Name(request, folder, adapter.digest)
            leaving = self._keep(adapter)
            if before is not None:
                leaving.append(self._release_unused(before.digest))
        del leaving
        return request

    def unload(self, name: str) -> None:
        """Forget a name, and let the adapter go unless it has another; requests keep theirs.

        Raises
        ------
        AdapterError
            No adapter has that name.
        """
        self._open(f"unload_lora({shown(name)})")
        with self._lock:
            entry = self._names.pop(name, None) if isinstance(name, str) else None
            if entry is None:
                raise self._unknown("unload_lora", name, "It takes a name, as a str")
            known = self._known.get(entry.folder)
            if known is not None and known.digest == entry.digest:
                del self._known[entry.folder]
            leaving = self._release_unused(entry.digest)
        del leaving

    def list(self) -> _Requests:
        """Return the adapters that have a name, in the order in which they were loaded."""
        with self._lock:
            return [entry.request for entry in self._names.values()]

    # -- requests --------------------------------------------------------------------------------

    def resolve(self, lora_request: Any) -> PreparedAdapter | None:
        """Return the adapter that a request wants, and read it where that is necessary.

        Parameters
        ----------
        lora_request : LoRARequest, or the like, or str, or None
            With a path, what lies there now; without one, or as a str, what has that name.

        Raises
        ------
        AdapterError
            There is none, or it does not fit.
        InvalidRequestError
            It is none of these.
        """
        if lora_request is None:
            return None
        self._open(f"lora_request={shown(lora_request)}")
        name, path, again = _fields(lora_request)
        if not path:
            return self._named(name)
        return self._at(self._find(path, again=again), again=again)

    def is_at_hand(self, lora_request: Any) -> bool:
        """Whether :meth:`resolve` will return, or raise, without a look at any file."""
        if lora_request is None or self._tools is None or not self._config.enable_lora:
            return True
        try:
            name, path, _ = _fields(lora_request)
        except InvalidRequestError:
            return True
        if path:
            return False
        with self._lock:
            entry = self._names.get(name)
            return entry is None or entry.digest in self._alive

    # -- for the copies of an engine, each of which has a store of its own ------------------------

    def in_memory(self, digest: str) -> PreparedAdapter | None:
        """Return an adapter by its content, if it is at hand."""
        with self._lock:
            adapter = self._alive.get(digest)
            leaving = [] if adapter is None else self._keep(adapter)
        del leaving
        return adapter

    def folder_of(self, digest: str) -> Path | None:
        """Return a folder that held an adapter when it was read last, if one is known."""
        with self._lock:
            for folder, known in self._known.items():
                if known.digest == digest:
                    return folder
            return next((n.folder for n in self._names.values() if n.digest == digest), None)

    def let_go(self, digest: str) -> None:
        """Forget an adapter under all its names; requests keep theirs."""
        with self._lock:
            for name in [n for n, entry in self._names.items() if entry.digest == digest]:
                del self._names[name]
            leaving = self._release(digest)
        del leaving

    @property
    def num_kept(self) -> int:
        """Adapters that are kept in memory for requests to come."""
        return len(self._kept)

    @property
    def num_reads(self) -> int:
        """Times that an adapter's files were read."""
        return self._num_reads

    def close(self) -> None:
        """Let go of everything, also of the model. Idempotent."""
        with self._lock:
            self._tools = None
            kept, self._kept = self._kept, OrderedDict()
            self._known.clear()
            self._names.clear()
        del kept

    # -- details: those called with the lock held return what is to be let go without it ---------

    def _open(self, what: str) -> AdapterTools:
        if not self._config.enable_lora:
            raise AdapterError(
                f"{what}: this engine has no adapters (enable_lora=False); make it with "
                "enable_lora=True"
            )
        tools = self._tools
        if tools is None:
            raise EngineClosedError("the engine is closed: make a new one")
        return tools

    def _find(self, path: str, *, again: bool) -> Path:
        """Return the folder of a path; a name on the hub is asked for once, unless `again`."""
        local = _resolved(path)
        if local is not None:
            return local
        folder = None if again else self._downloads.get(path)
        if folder is None:
            folder = self._downloads[path] = self._open(path).find(path)
        return folder

    def _named(self, name: str) -> PreparedAdapter:
        with self._lock:
            entry = self._names.get(name)
            if entry is None:
                raise self._unknown(
                    "lora_request",
                    name,
                    "load_lora(path, name) loads one, and a LoRARequest with a lora_path needs "
                    "none loaded",
                )
            adapter = self._alive.get(entry.digest)
            leaving = [] if adapter is None else self._keep(adapter)
        del leaving
        return self._read_again(name, entry) if adapter is None else adapter

    def _read_again(self, name: str, entry: _Name) -> PreparedAdapter:
        """Read an adapter that left memory."""
        try:
            adapter = self._at(entry.folder, again=False)
        except AdapterError as error:
            with self._lock:
                is_current = self._names.get(name) is entry
            if not is_current:  # loaded again, or unloaded, and its folder with that
                return self._named(name)
            raise AdapterError(
                f"the adapter {name!r} left memory (max_cpu_loras="
                f"{self._config.max_cpu_loras}) and cannot be read again: {error}"
            ) from error
        with self._lock:
            changed = adapter.digest != entry.digest
            entry.digest = adapter.digest
        if changed:
            logger.warning(
                "the adapter %r left memory, and %s holds another one than when it was loaded: "
                "from here on it is that one",
                name,
                entry.folder,
            )
        return adapter

    def _at(self, folder: Path, *, again: bool) -> PreparedAdapter:
        """Return what a folder holds; who asks for it meanwhile waits."""
        tools = self._open(str(folder))
        with self._lock:
            folder_lock = self._folder_locks.setdefault(folder, threading.Lock())
        with folder_lock:
            adapter = None
            if not again:
                now = tools.look(folder)
                with self._lock:
                    known = self._known.get(folder)
                    if known is not None and known.settled and known.fingerprint == now:
                        adapter = self._alive.get(known.digest)
            if adapter is not None:
                return self._kept_now(adapter)
            return forks.compute(lambda: self._read(folder, tools))

    def _read(self, folder: Path, tools: AdapterTools) -> PreparedAdapter:
        for _ in range(_ATTEMPTS):
            started = time.time_ns()
            before = tools.look(folder)
            try:
                adapter = tools.read(folder)
            except AdapterError:
                if tools.look(folder) == before:
                    raise
                continue
            if tools.look(folder) == before:
                break
        else:
            raise AdapterError(
                f"{folder} changed each of the {_ATTEMPTS} times that it was read: wait until it "
                "is written"
            )
        prepared = self._alive.get(adapter.digest) or tools.prepare(adapter)
        settled = started - before.changed_ns >= _SETTLED_NS
        # The same content may have come from another folder meanwhile.
        with self._lock:
            self._num_reads += 1
            prepared = self._alive.setdefault(prepared.digest, prepared)
            known = self._known.get(folder)
            self._known[folder] = _Known(before, prepared.digest, settled)
            old = None if known is None else self._release_unused(known.digest)
        del old
        return self._kept_now(prepared)

    def _kept_now(self, adapter: PreparedAdapter) -> PreparedAdapter:
        with self._lock:
            self._open("lora_request")
            leaving = self._keep(adapter)
        del leaving
        return adapter

    def _keep(self, adapter: PreparedAdapter) -> _Leaving:
        """Keep an adapter as the one that was used last."""
        self._kept[adapter.digest] = adapter
        self._kept.move_to_end(adapter.digest)
        most = self._config.max_cpu_loras
        leaving = list(self._kept)
        if most is None:
            most = self._config.max_loras
            named = {entry.digest for entry in self._names.values()}
            leaving = [digest for digest in leaving if digest not in named]
        return [self._release(digest) for digest in leaving[: max(0, len(leaving) - most)]]

    def _release_unused(self, digest: str) -> PreparedAdapter | None:
        """Stop keeping an adapter if neither a name nor a folder is known to stand for it."""
        places: _Places = [*self._names.values(), *self._known.values()]
        if any(place.digest == digest for place in places):
            return None
        return self._release(digest)

    def _release(self, digest: str) -> PreparedAdapter | None:
        """Stop keeping an adapter."""
        for folder in [f for f, known in self._known.items() if known.digest == digest]:
            del self._known[folder]
        return self._kept.pop(digest, None)

    def _unknown(self, field: str, name: object, advice: str) -> AdapterError:
        loaded = ", ".join(map(repr, self._names)) or "none"
        return AdapterError(
            f"{field}: no adapter is called {shown(name)}; loaded are: {loaded}. {advice}"
        )


def _resolved(path: str) -> Path | None:
    """Return the folder of that path, if there is one here."""
    try:
        folder = Path(path).expanduser()
        return folder.resolve() if folder.is_dir() else None
    except (OSError, RuntimeError, ValueError):  # too long, nobody's home, a NUL character
        return None


def _fields(lora_request: Any) -> tuple[str, str, bool]:
    """Return an adapter's name, its path or "", and whether it is to be read again."""
    if isinstance(lora_request, str):
        return lora_request, "", False
    name = getattr(lora_request, "lora_name", None)
    path = getattr(lora_request, "lora_path", None)
    if not isinstance(name, str) or not isinstance(path, (str, os.PathLike, type(None))):
        raise refuse(
            "lora_request", lora_request, "a LoRARequest, the name of a loaded adapter, or None"
        )
    path = "" if path is None else os.fspath(path)
    if not isinstance(path, str):
        raise refuse("lora_path", path, "a folder or a name on the hub")
    return name, path, getattr(lora_request, "load_inplace", False) is True
