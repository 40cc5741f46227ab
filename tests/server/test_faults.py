"""What clients do wrong, by accident or on purpose: it is answered or dropped, and harms nobody."""

from __future__ import annotations

import contextlib
import os
import random
import re
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from servers import ServerProcess

httpx = pytest.importorskip("httpx")
pytest.importorskip("uvicorn")

KEY = "right"
HEADERS = {"Authorization": f"Bearer {KEY}"}
MAX_BODY = 1_000_000
MAX_CONNECTIONS = 24
FLAGS = (
    "quire/demo",
    *("--api-key", KEY, "another"),
    *("--max-body-bytes", str(MAX_BODY)),
    *("--max-header-bytes", "4096"),
    *("--max-connections", str(MAX_CONNECTIONS)),
    *("--header-timeout", "1"),
    *("--body-timeout", "1.5"),
    *("--max-num-seqs", "16", "--num-gpu-blocks-override", "512"),
)


@pytest.fixture(scope="module", params=["httptools", pytest.param("h11", marks=pytest.mark.slow)])
def server(request, tmp_path_factory) -> Iterator[ServerProcess]:
    """One with each of the parsers that uvicorn may have."""
    env = {}
    if request.param == "h11":
        folder = tmp_path_factory.mktemp("without")
        (folder / "httptools.py").write_text("raise ImportError('not here')\n")
        env["PYTHONPATH"] = f"{folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    else:
        pytest.importorskip("httptools")
    server = ServerProcess(*FLAGS, env=env)
    yield server
    assert server.stop() == 0
    assert "Traceback" not in server.log


@pytest.fixture
def client(server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, headers=HEADERS, timeout=60) as client:
        yield client


OTHER = {
    "prompt": "The capital of France is",
    "max_tokens": 100,
    "ignore_eos": True,
    "temperature": 0,
    "stream": True,
}


@pytest.fixture(scope="module")
def expected(server) -> str:
    answer = httpx.post(
        f"{server.url}/v1/completions", json={**OTHER, "stream": False}, headers=HEADERS, timeout=60
    )
    return answer.json()["choices"][0]["text"]


@pytest.fixture(autouse=True)
def others(server, client, expected) -> Iterator[None]:
    """Somebody else streams meanwhile, and has the whole answer; nothing is left afterwards."""
    with httpx.Client(base_url=server.url, headers=HEADERS, timeout=60) as other:
        text: list[str] = []
        begun = threading.Event()

        def read() -> None:
            with other.stream("POST", "/v1/completions", json=OTHER) as answer:
                begun.set()
                for line in answer.iter_lines():
                    text.extend(re.findall(r'"text":"((?:[^"\\]|\\.)*)"', line))

        reader = threading.Thread(target=read)
        reader.start()
        assert begun.wait(60)  # before a test takes all the connections there may be
        yield
        reader.join(60)
        assert not reader.is_alive()
    whole = "".join(text).encode().decode("unicode_escape").encode("latin1").decode()
    assert whole == expected
    until(lambda: usage(client) == (0, 0, 0), "blocks or requests are left")


def usage(client) -> tuple[float, float, float]:
    text = client.get("/metrics").text
    names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    return tuple(float(re.search(rf"^quire:{n}{{.*}} (\S+)$", text, re.M)[1]) for n in names)


def until(holds, what: str, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, what
        time.sleep(0.02)


def connect(server) -> socket.socket:
    host, port = re.fullmatch(r"http://(.*):(\d+)", server.url).groups()
    return socket.create_connection((host, int(port)), timeout=20)


def read_all(sock: socket.socket) -> bytes:
    """Return what comes until the server closes the connection."""
    found = b""
    try:
        while data := sock.recv(65536):
            found += data
    except ConnectionResetError:
        pass
    return found


def head(*lines: str, path: str = "/v1/completions") -> bytes:
    given = [f"POST {path} HTTP/1.1", "Host: server", f"Authorization: Bearer {KEY}", *lines]
    return "\r\n".join([*given, "", ""]).encode()


JSON = "Content-Type: application/json"


# -- slow and half-sent --------------------------------------------------------------------------


@pytest.mark.parametrize("start", [b"", b"P", b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nX-A"])
def test_half_a_head_is_dropped(server, start):
    with connect(server) as sock:
        sock.sendall(start)
        began = time.monotonic()
        read_all(sock)
        assert 0.5 < time.monotonic() - began < 8


def test_a_head_that_drips_is_dropped(server):
    """Each byte comes before any idle timeout, and the whole would never come."""
    began = time.monotonic()
    with connect(server) as sock, pytest.raises(OSError):  # noqa: PT012
        sock.sendall(b"POST /v1/completions HTTP/1.1\r\n")
        while time.monotonic() - began < 15:
            sock.sendall(b"X-A: b\r\n")
            time.sleep(0.1)
    assert time.monotonic() - began < 10


def test_half_a_head_after_an_answer_is_dropped(server):
    """The clock runs for the second request of a connection as for the first."""
    with connect(server) as sock:
        sock.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
        assert b"200 OK" in sock.recv(65536)
        sock.sendall(b"GET /health HT")
        began = time.monotonic()
        read_all(sock)
        assert time.monotonic() - began < 8


def test_a_body_that_drips_is_answered_with_408(server):
    with connect(server) as sock:
        sock.sendall(head(JSON, "Content-Length: 100"))
        stop = threading.Event()

        def drip() -> None:
            while not stop.wait(0.1):
                try:
                    sock.sendall(b"x")
                except OSError:
                    return

        dripping = threading.Thread(target=drip)
        dripping.start()
        began = time.monotonic()
        answer = read_all(sock)
        stop.set()
        dripping.join()
    assert time.monotonic() - began < 10
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b'"timeout_error"' in answer


def test_a_client_that_goes_away_in_its_body_is_forgotten(server):
    with connect(server) as sock:
        sock.sendall(head(JSON, "Content-Length: 100") + b'{"prompt"')


def test_connections_that_pile_up_are_turned_away_and_then_dropped(server, client):
    """One too many is told so; as the idle ones are dropped, there is room again."""
    socks = [connect(server) for _ in range(2 * MAX_CONNECTIONS)]
    try:
        answers = []
        for sock in socks:
            sock.settimeout(10)
            answers.append(read_all(sock))
        refused = [answer for answer in answers if answer]
        assert len(refused) >= MAX_CONNECTIONS
        for answer in refused:
            assert answer.startswith(b"HTTP/1.1 503 ")
            assert b"Retry-After: 1" in answer
    finally:
        for sock in socks:
            sock.close()
    assert client.get("/health").status_code == 200


# -- too much --------------------------------------------------------------------------------------


def memory(server) -> int:
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024


@pytest.mark.parametrize("is_chunked", [False, True])
@pytest.mark.parametrize("key", [KEY, "wrong"])
def test_a_body_of_100_mb_is_refused_unread(server, is_chunked, key):
    """Announced or in chunks: the client reads why, and the server keeps none of it."""
    before = memory(server)
    piece = b"x" * 1_000_000

    def pieces() -> Iterator[bytes]:
        for _ in range(100):
            yield piece

    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    if not is_chunked:
        headers["Content-Length"] = str(100 * len(piece))
    began = time.monotonic()
    try:
        answer = httpx.post(
            f"{server.url}/v1/completions", content=pieces(), headers=headers, timeout=30
        )
    except (httpx.WriteError, httpx.ReadError):
        pass  # what it sent lay unread when the server closed
    else:
        assert answer.status_code == (413 if key == KEY else 401)
        assert answer.json()["error"]["type"] in ("invalid_request_error", "authentication_error")
    assert time.monotonic() - began < 20
    assert memory(server) - before < 30e6


@pytest.mark.parametrize("is_chunked", [False, True])
def test_the_limit_of_a_body_is_exact(client, is_chunked):
    for size, status in ((MAX_BODY, 400), (MAX_BODY + 1, 413)):
        content = b" " * size
        answer = client.post(
            "/v1/completions",
            content=iter([content[:700], content[700:]]) if is_chunked else content,
            headers={"Content-Type": "application/json"},
        )
        assert answer.status_code == status


def test_what_is_announced_is_refused_before_it_is_sent(server):
    with connect(server) as sock:
        sock.sendall(head(JSON, "Content-Length: 100000000000"))
        assert sock.recv(65536).startswith(b"HTTP/1.1 413 ")


def test_an_endless_head_is_cut_off(server):
    with connect(server) as sock:
        answer = b""
        try:
            sock.sendall(b"GET /health HTTP/1.1\r\n")
            for i in range(1000):
                sock.sendall(b"X-%d: %s\r\n" % (i, b"a" * 500))
        except OSError:
            pass
        else:
            answer = read_all(sock)
    assert not answer or answer.startswith((b"HTTP/1.1 431 ", b"HTTP/1.1 400 "))


# -- nonsense --------------------------------------------------------------------------------------


def test_malformed_http_is_answered_with_400_or_dropped(server):
    for data in (
        b"\r\n\r\n\r\nnonsense\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(64),  # TLS
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
        b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n",
        b"GET \xff\xfe HTTP/1.1\r\nHost: a\r\n\r\n",
    ):
        with connect(server) as sock:
            sock.sendall(data)
            answer = read_all(sock)
        assert not answer or re.match(rb"HTTP/1\.1 4\d\d ", answer), answer


def test_noise_harms_nobody(server):
    rng = random.Random(5)
    for _ in range(50):
        with connect(server) as sock:
            sock.sendall(rng.randbytes(rng.randrange(1, 3000)))
            if rng.random() < 0.5:
                sock.shutdown(socket.SHUT_WR)


NO_REQUESTS = [
    b'{"prompt": "\xff\xfe"}',
    b'{"prompt": "\\ud800"}',
    b"[" * 1000 + b"]" * 1000,
    b'{"prompt": ' * 1000 + b"1" + b"}" * 1000,
    b'{"prompt": "a", "temperature": NaN}',
    b'{"prompt": "a", "max_tokens": ' + b"9" * 5000 + b"}",
    b"",
    b"null",
    b'{"prompt": "a"',
    bytes(1000),
]


@pytest.mark.parametrize(
    "path", ["/v1/completions", "/v1/chat/completions", "/tokenize", "/v1/embeddings"]
)
def test_a_body_that_is_no_request_is_answered_with_400(client, path):
    """In OpenAI's shape, whatever it is."""
    for content in NO_REQUESTS:
        answer = client.post(path, content=content, headers={"Content-Type": "application/json"})
        assert answer.status_code == 400, (content[:80], answer.text)
        assert answer.json()["error"]["message"]
        assert answer.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer wrong"}])
def test_no_key_and_a_wrong_key_are_answered_with_401(server, headers):
    answer = httpx.post(f"{server.url}/v1/completions", json={"prompt": "a"}, headers=headers)
    assert answer.status_code == 401
    assert answer.json()["error"]["type"] == "authentication_error"


# -- clients that leave ----------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_client_that_leaves_frees_what_it_had(server, client, stream, path):
    """The engine runs no more for it, soon after; the fixture sees that no block is left."""
    body = {"max_tokens": 2000, "ignore_eos": True, "n": 4, "stream": stream}
    if "chat" in path:
        body["messages"] = [{"role": "user", "content": "Hello"}]
    else:
        body["prompt"] = "Hello"
    running = usage(client)[0]
    url = f"{server.url}{path}"
    with (
        contextlib.suppress(httpx.ReadTimeout),
        httpx.stream("POST", url, json=body, headers=HEADERS, timeout=0.7) as answer,
    ):
        for number, _ in enumerate(answer.iter_raw()):
            if number == 5:
                break
    until(lambda: usage(client)[0] <= max(running, 1), "it runs on", 3)


def test_requests_in_one_piece_are_answered_in_order(server):
    """Pipelining: the second begins when the first has ended."""
    body = b'{"prompt": "Hello", "max_tokens": 2, "ignore_eos": true}'
    one = head(JSON, f"Content-Length: {len(body)}") + body
    last = b"GET /health HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
    with connect(server) as sock:
        sock.sendall(one + one + last)
        answer = read_all(sock)
    assert answer.count(b"HTTP/1.1 200 OK") == 3
    assert answer.count(b'"text_completion"') == 2
    assert answer.endswith(b'{"status":"ok"}')
