"""The sockets that a server listens on, bound before a model is loaded."""

from __future__ import annotations

import errno
import os
import socket
import stat

from quire.errors import ConfigError
from quire.server.settings import Listening


def bind(listening: Listening) -> list[socket.socket]:
    """Return bound sockets; they listen when the server starts.

    Raises
    ------
    ConfigError
        The address is taken, or not one of this machine's.
    """
    if listening.uds is not None:
        return [_bind_unix(listening.uds)]
    host, port = listening.host, listening.port
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise ConfigError(f"host={host!r} is no address: {error}") from None
    bound: list[socket.socket] = []
    problem: OSError | None = None
    for family, kind, protocol, _, address in dict.fromkeys(found):
        sock = socket.socket(family, kind, protocol)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        if port == 0 and bound:  # the same port for all addresses of a name
            address = (address[0], bound[0].getsockname()[1], *address[2:])
        try:
            sock.bind(address)
        except OSError as error:
            sock.close()
            problem = error
            if error.errno == errno.EADDRNOTAVAIL:  # such as that of a network that is off
                continue
            break
        bound.append(sock)
    if problem is not None and (not bound or problem.errno != errno.EADDRNOTAVAIL):
        for sock in bound:
            sock.close()
        raise ConfigError(f"cannot listen on host={host!r}, port={port}: {problem.strerror}")
    return bound


def _bind_unix(path: str) -> socket.socket:
    _remove_stale(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.bind(path)
    except OSError as error:
        sock.close()
        raise ConfigError(f"cannot listen on uds={path!r}: {error.strerror or error}") from None
    return sock


def _remove_stale(path: str) -> None:
    """Remove the socket of a process that is no more; leave one that is answered alone."""
    try:
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            raise ConfigError(f"uds={path!r} is there, and no socket")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
    raise ConfigError(f"uds={path!r}: another process listens there")


def shown_address(listening: Listening, sockets: list[socket.socket]) -> str:
    """Return where clients find a server, for people to read."""
    if listening.uds is not None:
        return f"unix:{listening.uds}"
    scheme = "http" if listening.ssl_certfile is None else "https"
    host = f"[{listening.host}]" if ":" in listening.host else listening.host
    return f"{scheme}://{host}:{sockets[0].getsockname()[1]}"


def is_local(listening: Listening) -> bool:
    """Whether only this machine can connect."""
    if listening.uds is not None:
        return True
    return (
        listening.host == "localhost"
        or listening.host.startswith("127.")
        or listening.host == "::1"
    )
