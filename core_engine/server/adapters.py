"""ServedAdapters: the adapters that clients may ask for by name, as they come and go."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, TypeVar

from quire.errors import InvalidRequestError
from quire.server.adapter_folders import AdapterFolders, OpenAdapter
from quire.server.adapter_names import name_problem
from quire.server.errors import ApiError
from quire.utils.checks import shown

if TYPE_CHECKING:
    from quire.async_llm import AsyncLLM
    from quire.lora_request import LoRARequest
    from quire.request_maker import FoundAdapter
    from quire.server.settings import ServerSettings

T = TypeVar("T")

logger = logging.getLogger("quire")

_MOST_LOADED: Final = 1000
"""Adapters that clients may have loaded at once: each holds files open."""


@dataclass(frozen=True)
class ServedModel:
    """What a request asked for.

    Attributes
    ----------
    name : str
        As the request has it; it stands in the answer.
    is_adapter : bool
        Whether it is an adapter, and not the model itself.
    """

    name: str
    is_adapter: bool = False


@dataclass(frozen=True)
class OpenModel:
    """A model that stays what it is, whatever is loaded under its name meanwhile.

    Attributes
    ----------
    name : str
        As the request has it.
    adapter : FoundAdapter or None
        For ``lora_request``; None for the model itself.
    """

    name: str
    adapter: FoundAdapter | None = None


@dataclass(frozen=True)
class AdapterCard:
    """What is told of an adapter.

    Attributes
    ----------
    name : str
    path : str
        As whoever had it loaded wrote it.
    parent : str
        The model that it is for.
    created : int
        When it was loaded, in seconds since 1970.
    """

    name: str
    path: str
    parent: str
    created: int


@dataclass(frozen=True)
class _Loaded:
    files: OpenAdapter
    created: int


@dataclass(eq=False)
class _Change:
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    users: int = 0


class ServedAdapters:
    """The engine's adapters, and who had them loaded.

    The engine's own list is what counts: an adapter that its owner loads is served, too.

    Parameters
    ----------
    llm : AsyncLLM
    settings : ServerSettings
    """

    def __init__(self, llm: AsyncLLM, settings: ServerSettings) -> None:
        self._llm = llm
        self._settings = settings
        self._enabled = llm.config.lora.enable_lora
        self._created = int(time.time())
        self._folders = AdapterFolders(settings.allowed_lora_dirs)
        self._given = {each.lora_name: each.lora_path for each in llm.config.lora.lora_modules}
        self._loaded: dict[str, _Loaded] = {}
        self._changes: dict[str, _Change] = {}

    async def has(self, name: str) -> bool:
        """Whether there is an adapter of this name."""
        return any(each.lora_name == name for each in await self._list())

    async def cards(self) -> list[AdapterCard]:
        """Return what is told of each adapter."""
        return [self._card(each) for each in await self._list()]

    async def _list(self) -> list[LoRARequest]:
        own = self._settings.served_model_names
        if not self._enabled:
            return []
        return [each for each in await self._llm.list_loras() if each.lora_name not in own]

    def _card(self, adapter: LoRARequest) -> AdapterCard:
        path, created = adapter.lora_path, self._created
        loaded = self._loaded.get(adapter.lora_name)
        given = self._given.get(adapter.lora_name)
        if loaded is not None and loaded.files.path == path:
            path, created = loaded.files.given, loaded.created
        elif given is not None and os.path.realpath(os.path.expanduser(given)) == path:
            path = given
        return AdapterCard(
            name=adapter.lora_name,
            path=path,
            parent=adapter.base_model_name or self._settings.served_model_names[0],
            created=created,
        )

    async def load(self, name: str, path: str, *, in_place: bool) -> AdapterCard:
        """Load an adapter from one of the directories that are allowed.

        Parameters
        ----------
        name : str
            What requests call it.
        path : str
            Of its folder: see :meth:`AdapterFolders.open`.
        in_place : bool
            Whether it may take the place of one of the same name. Requests that run go on with
            that one.

        Raises
        ------
        ApiError
            400: the name is taken or none, or there is no adapter that fits the model; 403: the
            server does not let clients load any.
        """
        self._check_allowed("loaded")
        problem = name_problem(name)
        if problem is not None:
            raise _refused(f"lora_name must be {problem}, got {shown(name)}")
        if name in self._settings.served_model_names:
            raise _refused(f"lora_name: {name!r} is the model itself; give the adapter another")
        return await _to_the_end(self._load(name, path, in_place))

    async def _load(self, name: str, path: str, in_place: bool) -> AdapterCard:
        async with self._changing(name):
            if not in_place and await self.has(name):
                raise _refused(
                    f"lora_name: {name!r} is loaded already; unload it, or have it replaced by "
                    "load_inplace=true",
                    code="adapter_exists",
                )
            await self._forget_others()
            if len(self._loaded) >= _MOST_LOADED and name not in self._loaded:
                raise _refused(f"{_MOST_LOADED} adapters are loaded: unload one", code="too_many")
            files = await asyncio.to_thread(self._folders.open, path)
            try:
                adapter = await self._llm.load_lora(files.path, name, load_inplace=in_place)
            except InvalidRequestError as error:
                files.close()
                raise ApiError(400, files.words(error), param="lora_path") from None
            except BaseException:
                files.close()
                raise
            before = self._loaded.get(name)
            self._loaded[name] = _Loaded(files, int(time.time()))
            if before is not None:
                before.files.close()
            logger.info("loaded the adapter %r from %r", name, path)
            return self._card(adapter)

    async def unload(self, name: str) -> None:
        """Let an adapter go; requests that run go on with it.

        Raises
        ------
        ApiError
            403: the server does not let clients do so; 404: there is no such adapter.
        """
        self._check_allowed("unloaded")
        await _to_the_end(self._unload(name))

    async def _unload(self, name: str) -> None:
        async with self._changing(name):
            if not await self.has(name):
                raise ApiError(
                    404,
                    f"lora_name: there is no adapter {shown(name)}",
                    param="lora_name",
                    code="model_not_found",
                )
            await self._llm.unload_lora(name)
            loaded = self._loaded.pop(name, None)
            if loaded is not None:
                loaded.files.close()
            logger.info("unloaded the adapter %r", name)

    async def _forget_others(self) -> None:
        """Close the files of what was unloaded by others than clients."""
        names = {each.lora_name for each in await self._list()}
        for name in self._loaded.keys() - names:
            self._loaded.pop(name).files.close()

    def _check_allowed(self, done: str) -> None:
        if not self._settings.allow_runtime_lora_updating:
            raise ApiError(
                403,
                f"adapters are not {done} by clients of this server: it would have to be started "
                "with --enable-lora, --allow-runtime-lora-updating and --allowed-lora-dirs",
                param="lora_name",
                code="runtime_lora_updating_is_off",
            )

    @asynccontextmanager
    async def _changing(self, name: str) -> AsyncIterator[None]:
        """Wait until nobody else changes what this name means."""
        change = self._changes.setdefault(name, _Change())
        change.users += 1
        try:
            async with change.lock:
                yield
        finally:
            change.users -= 1
            if not change.users:
                del self._changes[name]


async def _to_the_end(work: Coroutine[Any, Any, T]) -> T:
    """Do what must not be left half done, though the client goes away."""
    task = asyncio.ensure_future(work)
    task.add_done_callback(_seen)
    return await asyncio.shield(task)


def _seen(task: asyncio.Future[Any]) -> None:
    if not task.cancelled():
        task.exception()


def _refused(message: str, code: str | None = None) -> ApiError:
    return ApiError(400, message, param="lora_name", code=code)
