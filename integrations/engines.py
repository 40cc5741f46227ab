"""Engines that equal askers share within a process, so that weights are in memory once.

Adapters make many small objects (a LangChain runnable makes a new model object for each call with
a configurable field). Each of them asks here, and holds a lease on an engine that others with the
same checkpoint and engine arguments hold too. The registry itself keeps no engine alive.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Hashable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quire.demo import MODEL_NAME, model_path
from quire.errors import EngineClosedError
from quire.models.hub import existing_path

if TYPE_CHECKING:
    from quire.async_llm import AsyncLLM
    from quire.config import EngineConfig
    from quire.llm import LLM

_PATH_ARGUMENTS = ("model", "tokenizer", "generation_config")
"""Engine arguments that may name a folder, whose files then belong to the engine's identity."""

_NOT_IDENTITY = frozenset({"hf_token"})
"""Engine arguments that do not change the engine that comes out."""


def folder_fingerprint(path: str) -> tuple[Hashable, ...] | None:
    """Return what tells one state of a folder's files from another.

    Parameters
    ----------
    path : str

    Returns
    -------
    tuple or None
        The folder's real path and each file's name, size in bytes and modification time in
        nanoseconds. None when there is no such folder.
    """
    folder = model_path() if path == MODEL_NAME else existing_path(path)
    if folder is None or not folder.is_dir():
        return None
    files = []
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.is_file():
            # Through links: a hub snapshot is a folder of links.
            status = entry.stat()
            files.append((entry.name, status.st_size, status.st_mtime_ns))
    return (os.path.realpath(folder), *files)


def checkpoint_fingerprint(config: EngineConfig) -> dict[str, tuple[Hashable, ...]]:
    """Return the fingerprint of each local folder that an engine reads, by argument.

    A model of a hub has none: it is told by its name and revision.
    """
    arguments = config.to_kwargs()
    found = {}
    for name in _PATH_ARGUMENTS:
        value = arguments[name]
        fingerprint = None if value is None else folder_fingerprint(value)
        if fingerprint is not None:
            found[name] = fingerprint
    return found


def hub_commit(config: EngineConfig) -> str | None:
    """Return the commit of a hub model that is in the hub library's cache, else None.

    The name and revision of a hub model may come to mean other weights, the commit may not.
    """
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    model = config.model
    try:
        cached = try_to_load_from_cache(
            model.model, "config.json", cache_dir=model.download_dir, revision=model.revision
        )
    except HFValidationError:  # a folder or a URL
        return None
    return Path(cached).parent.name if isinstance(cached, str) else None


def engine_key(config: EngineConfig) -> Hashable:
    """Return what two engines must have in common to be one: arguments and checkpoint files."""
    arguments = {k: v for k, v in config.to_kwargs().items() if k not in _NOT_IDENTITY}
    files = checkpoint_fingerprint(config)
    for name, fingerprint in files.items():
        arguments[name] = fingerprint[0]  # the same folder by another spelling is the same folder
    # Adapters that the engine reads as it is made are files of it, too.
    arguments["lora_modules"] = [
        (module.lora_name, folder_fingerprint(module.lora_path) or module.lora_path)
        for module in config.lora.lora_modules
    ]
    processors = arguments.pop("logits_processors")
    return (_hashable(arguments), _hashable(files), tuple(map(_Itself, processors)))


class _Itself:
    """An object that is equal to itself alone, whatever its class says of it."""

    def __init__(self, value: object) -> None:
        self._value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Itself) and other._value is self._value

    def __hash__(self) -> int:
        return id(self._value)


def _hashable(value: Any) -> Hashable:
    if isinstance(value, dict):
        return tuple((k, _hashable(value[k])) for k in sorted(value))
    if isinstance(value, (list, tuple)):
        return tuple(_hashable(item) for item in value)
    # 1, 1.0 and True are equal and yet different arguments.
    return (type(value).__name__, value) if isinstance(value, Hashable) else repr(value)


class EngineLease:
    """One user's hold on an engine.

    Dropping the last reference to a lease and to ``llm`` frees the engine, as closing the last
    lease does. Leases are made by :func:`acquire`, :func:`borrow` and :meth:`share`.

    Attributes
    ----------
    shared : bool
        Whether the engine is of this registry, so that its last user's closing closes it.
    """

    def __init__(self, llm: LLM, *, shared: bool) -> None:
        self._llm: LLM | None = llm
        self._async_llm: AsyncLLM | None = None
        self.shared = shared
        with _LOCK:
            _LEASES[id(self)] = self

    @property
    def llm(self) -> LLM:
        """The engine.

        Raises
        ------
        EngineClosedError
            After :meth:`close`.
        """
        llm = self._llm
        if llm is None:
            raise EngineClosedError("this model object was closed; make a new one")
        return llm

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._llm is None

    @property
    def async_llm(self) -> AsyncLLM:
        """The same engine's door for asyncio."""
        llm = self.llm
        if self._async_llm is None:
            from quire.async_llm import AsyncLLM

            self._async_llm = AsyncLLM.from_llm(llm)
        return self._async_llm

    def share(self) -> EngineLease:
        """Return another lease on the same engine, for one more user."""
        with _LOCK:
            lease = EngineLease(self.llm, shared=self.shared)
            lease._async_llm = self._async_llm
            return lease

    def close(self) -> None:
        """Give the lease back; the last user's closes a shared engine. May be called again.

        An engine that was made by somebody else (see :func:`borrow`) is left running.
        """
        with _LOCK:
            llm, self._llm, self._async_llm = self._llm, None, None
            if llm is None or not self.shared:
                return
            if any(lease._llm is llm for lease in list(_LEASES.values())):
                return
            # Gone from the registry before anybody else can be given an engine about to close.
            for key, reference in list(_ENGINES.items()):
                if reference() is llm:
                    del _ENGINES[key]
        llm.close()

    def __eq__(self, other: object) -> bool:
        """Return whether both are holds on one engine."""
        return isinstance(other, EngineLease) and self._llm is other._llm

    __hash__ = None  # type: ignore[assignment]


class _Gate:
    """Lets one thread load an engine while others that want the same one wait."""

    def __init__(self) -> None:
        self.lock = threading.Lock()


# Reentrant, because the collector may run a finalizer that comes here while it is held.
_LOCK = threading.RLock()
_ENGINES: dict[Hashable, weakref.ref[LLM]] = {}
_GATES: weakref.WeakValueDictionary[Hashable, _Gate] = weakref.WeakValueDictionary()
# By id and not in a set: leases on one engine are equal.
_LEASES: weakref.WeakValueDictionary[int, EngineLease] = weakref.WeakValueDictionary()


def acquire(config: EngineConfig) -> EngineLease:
    """Return a lease on the engine of this configuration, made now if nobody has it.

    Parameters
    ----------
    config : EngineConfig

    Returns
    -------
    EngineLease

    Raises
    ------
    ConfigError, ModelNotFoundError, ModelLoadError, OutOfMemoryError
        As making a :class:`quire.LLM` does.
    """
    key = engine_key(config)
    with _LOCK:
        gate = _GATES.setdefault(key, _Gate())
    with gate.lock:
        with _LOCK:
            found = _running(key)
            if found is not None:
                return EngineLease(found, shared=True)
        from quire.llm import LLM  # brings in torch

        llm = LLM(**config.to_kwargs())
        with _LOCK:
            _ENGINES[key] = weakref.ref(llm)
            return EngineLease(llm, shared=True)


def borrow(llm: LLM) -> EngineLease:
    """Return a lease on an engine that the caller was given and that others will close."""
    return EngineLease(llm, shared=is_shared(llm))


def is_shared(llm: LLM) -> bool:
    """Return whether :func:`acquire` made this engine."""
    with _LOCK:
        return any(reference() is llm for reference in _ENGINES.values())


def _running(key: Hashable) -> LLM | None:
    reference = _ENGINES.get(key)
    llm = None if reference is None else reference()
    if llm is not None and _usable(llm):
        return llm
    _ENGINES.pop(key, None)
    return None


def _usable(llm: LLM) -> bool:
    """Return whether the engine runs, and in this process: a fork has no share in its thread."""
    try:
        return llm.engine_loop is not None
    except EngineClosedError:
        return False


def _after_fork() -> None:
    # A thread of the parent may have held these, and is not here to let go of them.
    global _LOCK
    _LOCK = threading.RLock()
    _GATES.clear()


os.register_at_fork(after_in_child=_after_fork)
