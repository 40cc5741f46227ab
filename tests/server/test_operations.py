"""A server's life: it starts, is watched, is told to end, and ends with the right code."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from servers import ServerProcess

httpx = pytest.importorskip("httpx")
pytest.importorskip("uvicorn")

LONG = {"prompt": "Hello", "max_tokens": 800, "ignore_eos": True, "stream": True}


DEVICE = """
import os
import time

from quire import LogitsProcessor
from quire.engine.engine import Engine
from quire.errors import DeviceLostError

step = Engine.step


def step_of_another_device(engine):
    if os.path.exists(os.environ["LOST"]):
        raise DeviceLostError("the device fell off")
    time.sleep(float(os.environ["STEP_SECONDS"]))
    return step(engine)


Engine.step = step_of_another_device


class Nothing(LogitsProcessor):
    def update(self, change):
        pass

    def apply(self, logits):
        return logits
"""


@pytest.fixture
def device(tmp_path: Path) -> dict[str, str]:
    """An environment whose steps take 5 ms and more, however fast the machine is.

    What a test asks for is then still running when it looks at it. A file ``LOST`` makes the
    device fall off.
    """
    (tmp_path / "device.py").write_text(DEVICE)
    return {
        "PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
        "LOST": str(tmp_path / "lost"),
        "STEP_SECONDS": "0.005",
    }


@contextmanager
def running(
    *flags: str, env: dict[str, str] | None = None, port: int = 0
) -> Iterator[ServerProcess]:
    if env is not None:
        flags = (*flags, "--logits-processors", "device:Nothing")
    server = ServerProcess("quire/demo", *flags, env=env, port=port)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.process.kill()
        server.process.wait()


class Reader(threading.Thread):
    """Reads a stream on a thread of its own."""

    def __init__(self, url: str, body: dict) -> None:
        super().__init__()
        self.url, self.body = url, body
        self.begun = threading.Event()
        self.lines: list[str] = []
        self.error: Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            with httpx.stream(
                "POST", f"{self.url}/v1/completions", json=self.body, timeout=120
            ) as answer:
                for line in answer.iter_lines():
                    if line.startswith("data: "):
                        self.lines.append(line[6:])
                        self.begun.set()
        except httpx.HTTPError as error:
            self.error = error
        finally:
            self.begun.set()

    @property
    def events(self) -> list[dict]:
        return [json.loads(line) for line in self.lines if line != "[DONE]"]

    @property
    def is_whole(self) -> bool:
        return self.error is None and self.lines[-1:] == ["[DONE]"]


def wait_for(holds, what: str, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, what
        time.sleep(0.02)


def status(url: str) -> int | None:
    """Return the status of an answer, None where nobody listens."""
    try:
        return httpx.get(url, timeout=10).status_code
    except httpx.TransportError:
        return None


def test_sigterm_lets_running_requests_finish_and_takes_no_more(device: dict[str, str]):
    """/ready says so, new requests are asked to come again, the port closes, the code is 0."""
    with running("--drain-timeout", "60", env=device) as server:
        readers = [Reader(server.url, LONG) for _ in range(2)]
        for reader in readers:
            assert reader.begun.wait(30)
        server.process.send_signal(signal.SIGTERM)
        wait_for(lambda: status(f"{server.url}/ready") == 503, "it is still ready")
        answer = httpx.post(f"{server.url}/v1/completions", json={"prompt": "Hi"}, timeout=10)
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "shutting_down"
        assert int(answer.headers["retry-after"]) > 0
        assert httpx.get(f"{server.url}/health", timeout=10).status_code == 200
        for reader in readers:
            reader.join(60)
            assert reader.is_whole
            tokens = sum(len(event["choices"][0].get("text", "")) > 0 for event in reader.events)
            assert tokens > 100
        assert server.process.wait(30) == 0
        server._reader.join(10)
        assert status(f"{server.url}/health") is None
        assert "Traceback" not in server.log
        assert "the server has ended" in server.log


@pytest.mark.slow
def test_what_does_not_finish_in_time_is_ended_and_told(device: dict[str, str]):
    """A stream ends with an error event; then the process ends as well as ever."""
    with running("--drain-timeout", "0.3", env=device) as server:
        reader = Reader(server.url, {**LONG, "n": 16})
        assert reader.begun.wait(30)
        began = time.monotonic()
        assert server.stop() == 0
        assert time.monotonic() - began < 15
        reader.join(10)
        assert reader.events[-1]["error"]["code"] == "shutting_down"
        assert "1 requests were ended" in server.log
        assert "Traceback" not in server.log


@pytest.mark.slow
def test_a_second_signal_ends_at_once(device: dict[str, str]):
    with running("--drain-timeout", "600", env=device) as server:
        reader = Reader(server.url, {**LONG, "n": 32})
        assert reader.begun.wait(30)
        server.process.send_signal(signal.SIGINT)
        wait_for(lambda: "shutting down" in server.log, "the signal was not seen")
        began = time.monotonic()
        assert server.stop(signal.SIGINT) == 128 + signal.SIGINT
        assert time.monotonic() - began < 5
        assert "Traceback" not in server.log
        reader.join(10)


@pytest.mark.slow
def test_ctrl_c_ends_an_idle_server_and_one_with_idle_connections():
    with running() as server, httpx.Client() as client:
        client.get(f"{server.url}/health")
        with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))):
            began = time.monotonic()
            assert server.stop(signal.SIGINT) == 0
            assert time.monotonic() - began < 10
        assert "Traceback" not in server.log


def test_a_lost_device_is_seen_by_probes_and_ends_the_process(device: dict[str, str]):
    """Who waits is told, /health is 503 for a while, and the exit code is not 0."""
    with running(env=device) as server:
        assert status(f"{server.url}/health") == 200
        reader = Reader(server.url, LONG)
        assert reader.begun.wait(30)
        Path(device["LOST"]).touch()
        answer = httpx.post(f"{server.url}/v1/completions", json={"prompt": "Hi"}, timeout=30)
        assert answer.status_code == 503
        assert status(f"{server.url}/health") == 503
        assert status(f"{server.url}/ready") == 503
        assert status(f"{server.url}/metrics") in (200, 503)
        reader.join(30)
        assert not reader.is_whole
        assert server.process.wait(30) == 1
        server._reader.join(10)
        assert "the engine broke down" in server.log
        assert "the device fell off" in server.log


@pytest.mark.slow
def test_limits_on_waiting_and_on_time_are_answered_so_that_clients_try_again(
    device: dict[str, str],
):
    """503 with Retry-After where too many wait; 504 where it takes too long."""
    flags = ["--max-num-seqs", "1", "--max-waiting-requests", "1", "--request-timeout", "3"]
    with running(*flags, env=device) as server:
        url = f"{server.url}/v1/completions"
        reader = Reader(server.url, LONG)
        assert reader.begun.wait(30)
        whole = {**LONG, "stream": False}
        answers: list = []
        waiting = [
            threading.Thread(target=lambda: answers.append(httpx.post(url, json=whole, timeout=60)))
            for _ in range(4)
        ]
        for thread in waiting:
            thread.start()
        for thread in waiting:
            thread.join(60)
        reader.join(60)
        assert sorted(answer.status_code for answer in answers) == [503, 503, 503, 504]
        for answer in answers:
            error = answer.json()["error"]
            if answer.status_code == 503:
                assert error["code"] == "overloaded"
                assert int(answer.headers["retry-after"]) >= 1
            else:
                assert error["code"] == "request_timeout"
                assert "3 seconds" in error["message"]
        assert reader.events[-1]["error"]["code"] == "request_timeout"
        [gone] = [
            line for line in httpx.get(f"{server.url}/metrics").text.splitlines()
            if line.startswith("quire:num_requests_running{")
        ]  # fmt: skip
        assert gone.endswith(" 0.0")
        assert server.stop() == 0


@pytest.mark.slow
def test_a_killed_server_starts_anew_on_its_port(device: dict[str, str]):
    """kill -9 under load: clients see it at once, and nothing keeps the next one from starting."""
    with running(env=device) as server:
        port = int(server.url.rpartition(":")[2])
        readers = [Reader(server.url, LONG) for _ in range(16)]
        for reader in readers:
            assert reader.begun.wait(60)
        server.process.kill()
        for reader in readers:
            reader.join(10)
            assert not reader.is_alive()
            assert not reader.is_whole
        server.process.wait()
    with running(port=port) as again:
        reader = Reader(again.url, {**LONG, "max_tokens": 20})
        reader.join(60)
        assert reader.is_whole
        assert again.stop() == 0


def start(*flags: str) -> tuple[subprocess.Popen, str]:
    """Start a server without a port of its own, and return it with its address."""
    process = subprocess.Popen(
        [sys.executable, "-m", "quire.server", "quire/demo", *flags],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    for line in process.stderr:
        if "running on " in line:
            return process, line.split("running on ")[1].split()[0]
    raise AssertionError("it did not start")


@pytest.mark.slow
def test_a_unix_socket_is_made_and_removed_and_a_stale_one_replaced(tmp_path: Path):
    path = tmp_path / "quire.sock"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    process, address = start("--uds", str(path))
    try:
        assert address == f"unix:{path}"
        transport = httpx.HTTPTransport(uds=str(path))
        with httpx.Client(transport=transport, base_url="http://server") as client:
            assert client.get("/health").status_code == 200
        second = subprocess.run(
            [*process.args[:4], "--uds", str(path)], capture_output=True, text=True
        )
        assert second.returncode == 1
        assert "another process listens there" in second.stderr
    finally:
        process.terminate()
        process.communicate()
    assert process.returncode == 0
    assert not path.exists()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl to make certificates with")
def test_https_with_certificates_of_clients(tmp_path: Path):
    """Who shows none that the authority signed does not get to ask."""
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj",
         "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1",
         "-keyout", str(key), "-out", str(certificate)],
        check=True, capture_output=True,
    )  # fmt: skip
    flags = ["--ssl-keyfile", str(key), "--ssl-certfile", str(certificate)]
    asks = ["--ssl-ca-certs", str(certificate), "--ssl-cert-reqs", "2"]
    with running(*flags, *asks) as server:
        assert server.url.startswith("https://")
        trusting = ssl.create_default_context(cafile=str(certificate))
        with httpx.Client(verify=trusting) as client, pytest.raises(httpx.TransportError):
            client.get(f"{server.url}/health")
        trusting.load_cert_chain(certificate, key)
        with httpx.Client(verify=trusting) as client:
            assert client.get(f"{server.url}/health").json() == {"status": "ok"}
        assert server.stop() == 0
