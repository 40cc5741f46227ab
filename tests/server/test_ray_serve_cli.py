"""``quire serve --data-parallel-backend ray``, from its start to Ctrl-C."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time

import httpx
import pytest
from ray_clusters import WHY, actor_pids

from quire.errors import ConfigError
from quire.server.ray_launch import launch_on_ray

GIVEN = {"model": "quire/demo", "data_parallel_size": 2, "data_parallel_backend": "ray"}


def test_without_ray_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"pip install 'quire\[ray\]'"):
        launch_on_ray(GIVEN)


def test_what_ray_serve_does_not_have_is_refused():
    pytest.importorskip("ray", reason=WHY)
    with pytest.raises(ConfigError, match="uds is not offered"):
        launch_on_ray({**GIVEN, "uds": "/tmp/socket"})


@pytest.mark.slow
def test_two_replicas_until_ctrl_c(tmp_path):
    pytest.importorskip("ray.serve", reason=WHY)
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = [sys.executable, "-m", "quire.server", "quire/demo", "--data-parallel-size", "2"]
    command += ["--data-parallel-backend", "ray", "--port", str(port), "--max-model-len", "512"]
    told = {
        "RAY_ADDRESS": "local",
        "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    log = tmp_path / "log"
    with log.open("wb") as to:
        process = subprocess.Popen(
            command, env={**os.environ, **told}, stdout=to, stderr=subprocess.STDOUT
        )
    try:
        end = time.monotonic() + 120
        while b"quire is running on" not in log.read_bytes():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.2)
        assert len(actor_pids("ServeReplica:quire:Replica")) == 2
        fields = {"model": "quire/demo", "prompt": "The capital of Norway is", "max_tokens": 4}
        answer = httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=fields, timeout=60)
        assert "Oslo" in answer.json()["choices"][0]["text"]
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0, log.read_text()
    finally:
        process.kill()
        process.wait()
    assert not actor_pids("ServeReplica")
