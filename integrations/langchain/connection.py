"""The official client's connection to a server, for synchronous callers and every event loop."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import weakref
from collections.abc import AsyncGenerator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit, urlunsplit

from quire.errors import ConfigError

if TYPE_CHECKING:
    import openai


class Settings(NamedTuple):
    """What a connection is made of; two that are equal may share one."""

    api_key: str
    base_url: str
    organization: str | None = None
    proxy: str | None = None
    timeout: Any = None
    max_retries: int = 2
    default_headers: Mapping[str, str] | None = None
    default_query: Mapping[str, object] | None = None
    http_client: Any = None
    http_async_client: Any = None


class Connection:
    """Clients for one server.

    An asynchronous client's open sockets belong to the event loop that opened them, so that each
    loop has a client of its own here, closed when the loop ends.

    Parameters
    ----------
    settings : Settings

    Raises
    ------
    ImportError
        Without the package openai; the message says what to install.
    ConfigError
        For settings that contradict each other, or that the client refuses.
    """

    def __init__(self, settings: Settings) -> None:
        require_openai()
        import openai

        if settings.proxy and (settings.http_client or settings.http_async_client):
            raise ConfigError(
                "openai_proxy is for the client that is made here, and http_client or "
                "http_async_client brings another: give the proxy to that one"
            )
        self.settings = settings
        self._process = os.getpid()
        self._loops: dict[asyncio.AbstractEventLoop, _LoopClient] = {}
        http_client = settings.http_client
        try:
            if settings.proxy:
                http_client = openai.DefaultHttpxClient(proxy=settings.proxy)
            self.client = openai.OpenAI(**self._arguments(), http_client=http_client)
        except (TypeError, ValueError, openai.OpenAIError) as error:
            raise ConfigError(f"the openai client refuses these settings: {error}") from error
        weakref.finalize(self, self.client.close)
        self.completions = self.client.completions
        _KNOWN[id(self.completions)] = self

    def _arguments(self) -> dict[str, Any]:
        settings = self.settings
        timeout = settings.timeout
        if isinstance(timeout, (tuple, list)):
            import openai

            connect, read = timeout
            timeout = openai.Timeout(read, connect=connect)
        return {
            "api_key": settings.api_key,
            "base_url": settings.base_url,
            "organization": settings.organization,
            "timeout": timeout,
            "max_retries": settings.max_retries,
            "default_headers": settings.default_headers,
            "default_query": settings.default_query,
        }

    @property
    def async_completions(self) -> LoopCompletions:
        """Completions for whichever event loop asks for them."""
        return LoopCompletions(self)

    async def async_client(self) -> openai.AsyncOpenAI:
        """Return the client of the running event loop."""
        loop = asyncio.get_running_loop()
        found = self._loops.get(loop)
        if found is None:
            for ended in [other for other in self._loops if other.is_closed()]:
                del self._loops[ended]
            client = self._make_async_client()
            found = self._loops[loop] = _LoopClient(client, self._keep(loop, client))
            if self.settings.http_async_client is None:
                # A loop that ends closes its asynchronous generators: this one closes the client.
                await anext(found.keeper)
        return found.client

    def _make_async_client(self) -> openai.AsyncOpenAI:
        import openai

        http_client = self.settings.http_async_client
        if self.settings.proxy:
            http_client = openai.DefaultAsyncHttpxClient(proxy=self.settings.proxy)
        return openai.AsyncOpenAI(**self._arguments(), http_client=http_client)

    async def _keep(
        self, loop: asyncio.AbstractEventLoop, client: openai.AsyncOpenAI
    ) -> AsyncGenerator[None, None]:
        try:
            yield
        finally:
            self._loops.pop(loop, None)
            await client.close()


class _LoopClient(NamedTuple):
    client: openai.AsyncOpenAI
    keeper: AsyncGenerator[None, None]


class LoopCompletions:
    """The completions of whichever client belongs to the running event loop."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LoopCompletions) and other.connection is self.connection

    def __hash__(self) -> int:
        return hash(self.connection)

    async def create(self, **kwargs: Any) -> Any:
        """Ask for a completion, as ``AsyncOpenAI().completions.create`` does."""
        client = await self.connection.async_client()
        return await client.completions.create(**kwargs)


_KNOWN: weakref.WeakValueDictionary[int, Connection] = weakref.WeakValueDictionary()
"""Connections by the identity of their completions, which they keep alive."""


def connection_of(client: Any, async_client: Any = None) -> Connection | None:
    """Return the connection that a model's clients came from; None for clients of others."""
    if isinstance(async_client, LoopCompletions):
        return async_client.connection
    return _KNOWN.get(id(client))


def connection_for(settings: Settings) -> Connection:
    """Return a connection with these settings, which models of equal settings share."""
    # A fork must not write to its parent's sockets.
    for known in list(_KNOWN.values()):
        if known.settings == settings and known._process == os.getpid():
            return known
    return Connection(settings)


def require_openai() -> None:
    """Raise an ImportError that says what to install where the package openai is missing."""
    if importlib.util.find_spec("openai") is None:
        raise ImportError(
            "VLLMOpenAI needs the official client: pip install 'quire[openai]'", name="openai"
        )


def shown_url(url: str) -> str:
    """Return a URL without the name and password that may stand in it."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def server_root(url: str) -> str:
    """Return where a server's own endpoints are, beside OpenAI's under ``/v1``."""
    return url.rstrip("/").removesuffix("/v1")
