"""A server's process, from its plan to its exit code."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import resource
import signal
import socket
from collections.abc import Iterator
from typing import Any

import uvicorn

from quire.async_llm import AsyncLLM
from quire.server.app import build_app
from quire.server.connection import guarded_protocol
from quire.server.logs import set_up_logs
from quire.server.plan import Plan
from quire.server.service import Service
from quire.server.sockets import bind, is_local, shown_address

logger = logging.getLogger("quire")

_WATCH_SECONDS = 0.5
_BROKEN_SECONDS = 5.0
"""How long requests have to be told, and probes to see, that the engine is no more."""


def launch(plan: Plan) -> int:
    """Load the model, serve it until the process is told to end, and return the exit code.

    Raises
    ------
    QuireError
        What keeps the server from starting.
    """
    set_up_logs(plan.log_level, plan.uvicorn_log_level)
    _allow_many_files()
    sockets = bind(plan.listening)
    try:
        with AsyncLLM(**plan.engine_args) as llm:
            return asyncio.run(_serve(llm, plan, sockets))
    finally:
        for sock in sockets:
            sock.close()
        if plan.listening.uds is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(plan.listening.uds)


def _allow_many_files() -> None:
    """Let the process have as many connections as the system allows it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


async def _serve(llm: AsyncLLM, plan: Plan, sockets: list[socket.socket]) -> int:
    listening = plan.listening
    service = Service(llm, plan.settings, await llm.get_tokenizer())
    ciphers: dict[str, Any] = {}  # what uvicorn has for a default is not the same in all releases
    if listening.ssl_ciphers is not None:
        ciphers["ssl_ciphers"] = listening.ssl_ciphers
    config = uvicorn.Config(
        build_app(service),
        http=guarded_protocol(listening),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=listening.keep_alive_timeout,
        timeout_graceful_shutdown=2,  # of those that do not read; the others had their time
        ssl_certfile=listening.ssl_certfile,
        ssl_keyfile=listening.ssl_keyfile,
        ssl_keyfile_password=listening.ssl_keyfile_password,
        ssl_ca_certs=listening.ssl_ca_certs,
        ssl_cert_reqs=listening.ssl_cert_reqs,
        **ciphers,
    )
    run = _Run(service, _Server(config), listening.drain_timeout)
    return await run.serve(sockets, shown_address(listening, sockets), is_local(listening))


class _Server(uvicorn.Server):
    """Leaves signals to :class:`_Run`: its own way of ending knows nothing of draining."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Capture none."""
        yield


class _Run:
    """One server from its first to its last request."""

    def __init__(self, service: Service, server: _Server, drain_timeout: float) -> None:
        self._service = service
        self._server = server
        self._drain_timeout = drain_timeout
        self._code = 0
        self._tasks: set[asyncio.Task[None]] = set()

    async def serve(self, sockets: list[socket.socket], address: str, local: bool) -> int:
        """Serve until the end, and return the exit code."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._signalled, number)
        serving = asyncio.ensure_future(self._server.serve(sockets=sockets))
        while not self._server.started and not serving.done():
            await asyncio.sleep(0.01)
        if self._server.started:
            logger.info("quire is running on %s (Ctrl-C ends it)", address)
            if not local and not self._service.settings.api_keys:
                logger.warning("anybody who reaches %s may use it: there is no --api-key", address)
        # What has been loaded stays: no need for the garbage collector to look at it again.
        gc.collect()
        gc.freeze()
        self._start(self._watch())
        await serving
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        logger.info("the server has ended")
        return self._code

    def _start(self, work: object) -> None:
        task = asyncio.ensure_future(work)  # type: ignore[call-overload]
        self._tasks.add(task)

    def _signalled(self, number: signal.Signals) -> None:
        if self._service.life.ending is not None:
            logger.warning("%s again: ending at once", number.name)
            logging.shutdown()
            os._exit(128 + number)
        self._start(self._end(f"the server is shutting down ({number.name})", self._drain_timeout))

    async def _watch(self) -> None:
        """Wait for the engine to break down, which it hardly ever does."""
        llm = self._service.llm
        while llm.engine_error is None and not llm.closed:
            await asyncio.sleep(_WATCH_SECONDS)
        logger.critical("the engine broke down, and the server ends: %r", llm.engine_error)
        self._code = 1
        if self._service.life.ending is None:
            await asyncio.sleep(_BROKEN_SECONDS / 2)
            await self._end("the engine broke down", _BROKEN_SECONDS / 2)

    async def _end(self, reason: str, seconds: float) -> None:
        life = self._service.life
        count = life.num_requests
        logger.info("%s; %d running requests have %g seconds", reason, count, seconds)
        late = await life.end(reason, seconds)
        if late:
            logger.warning("%d requests were ended before they had finished", late)
        self._server.should_exit = True
