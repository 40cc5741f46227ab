"""A model comes over the network: a hub of our own on loopback, the real client library."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from quire.demo import adapter_path, model_path

COMMIT = "c" * 40
NAME = "somebody/tiny"


class Hub(ThreadingHTTPServer):
    """Serves one folder as the model `NAME`, and remembers who asked for what."""

    def __init__(self, folder: Path, token: str | None = None) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files = {path.name: path.read_bytes() for path in folder.iterdir()}
        self.token = token
        self.asked: list[str] = []

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.server.asked.append(path)
        token = self.server.token
        if token is not None and self.headers.get("Authorization") != f"Bearer {token}":
            self._answer(401, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif re.fullmatch(rf"/api/models/{NAME}(/revision/[\w.]+)?", path):
            siblings = [{"rfilename": name} for name in self.server.files]
            self._json({"id": NAME, "sha": COMMIT, "siblings": siblings})
        elif re.fullmatch(rf"/api/models/{NAME}/tree/[\w.]+", path):
            self._json(
                [
                    {"type": "file", "path": name, "size": len(data), "oid": "0" * 40}
                    for name, data in self.server.files.items()
                ]
            )
        elif match := re.fullmatch(rf"/{NAME}/resolve/[\w.]+/(.+)", path):
            data = self.server.files[match[1]]
            etag = hashlib.sha256(data).hexdigest()
            self._answer(200, data, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})
        else:
            self._answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def _json(self, value: object) -> None:
        self._answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    shutil.copytree(model_path(), folder, dirs_exist_ok=True)
    # The same weights in the other format, as many models have them: not to be downloaded.
    (folder / "pytorch_model.bin").write_bytes(b"not needed")
    return folder


@pytest.fixture
def hub(checkpoint: Path) -> Iterator[Hub]:
    with Hub(checkpoint) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def generate(home: Path, endpoint: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """Load the model by its name in a new process and generate three tokens."""
    program = f"""
import quire
with quire.LLM({NAME!r}, dtype="float32", max_model_len=32) as llm:
    params = quire.SamplingParams(temperature=0, max_tokens=3)
    print(llm.generate([{{"prompt_token_ids": [1, 2, 3]}}], params)[0].outputs[0].token_ids)
"""
    return run(program, home, endpoint, **settings)


def run(
    program: str, home: Path, endpoint: str, **settings: str
) -> subprocess.CompletedProcess[str]:
    """Run a program in a new process that has this hub."""
    keep = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    settings = {"HF_HOME": str(home), "HF_ENDPOINT": endpoint, **settings}
    settings.setdefault("HF_HUB_DISABLE_XET", "1")
    return subprocess.run(
        [sys.executable, "-c", program],
        env={**keep, **settings},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_a_model_is_downloaded_into_hf_home_and_then_found_offline(
    hub: Hub, tmp_path: Path
) -> None:
    """One format of the weights comes, into HF_HOME; afterwards nothing is asked of the hub."""
    first = generate(tmp_path, hub.endpoint)
    assert first.returncode == 0, first.stderr
    snapshot = tmp_path / "hub" / "models--somebody--tiny" / "snapshots" / COMMIT
    names = {path.name for path in snapshot.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert "pytorch_model.bin" not in names
    asked = len(hub.asked)
    offline = generate(tmp_path, hub.endpoint, HF_HUB_OFFLINE="1")
    assert offline.returncode == 0, offline.stderr
    assert (offline.stdout, len(hub.asked)) == (first.stdout, asked)


@pytest.mark.parametrize("variable", ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"])
def test_a_private_model_needs_the_token(hub: Hub, tmp_path: Path, variable: str) -> None:
    """Either variable's token goes to the hub; without it, or with another, the error says so."""
    hub.token = "hf_secret"
    allowed = generate(tmp_path / "home", hub.endpoint, **{variable: "hf_secret"})
    assert allowed.returncode == 0, allowed.stderr
    refused = generate(tmp_path / "other", hub.endpoint, **{variable: "hf_wrong"})
    assert refused.returncode != 0
    assert "ModelNotFoundError" in refused.stderr
    assert "set HF_TOKEN" in refused.stderr
    assert "hf_wrong" not in refused.stderr.splitlines()[-1]


def test_a_hub_that_is_down_leaves_what_is_cached(hub: Hub, tmp_path: Path) -> None:
    """A download of earlier is used when the hub cannot be reached, and its lack explained."""
    first = generate(tmp_path, hub.endpoint)
    assert first.returncode == 0, first.stderr
    nowhere = "http://127.0.0.1:9"
    again = generate(tmp_path, nowhere)
    assert (again.returncode, again.stdout) == (0, first.stdout), again.stderr
    missing = generate(tmp_path / "empty", nowhere)
    assert missing.returncode != 0
    assert "the hub cannot be used now" in missing.stderr


@pytest.mark.parametrize(
    ("weights", "others"),
    [
        ("gptq_model-4bit-128g.safetensors", ["sq-model-w4.pt"]),
        ("sq-model-w4.pt", ["weights.gguf"]),
        ("pytorch_model.bin", ["consolidated.safetensors"]),
    ],
)
def test_weights_of_other_names_are_downloaded_where_there_are_no_usual_ones(
    weights: str, others: list[str], tmp_path: Path
) -> None:
    """As older quantized models have them; of several kinds one comes."""
    folder = tmp_path / "model"
    folder.mkdir()
    for name in (weights, *others, "config.json", "quantize_config.json"):
        (folder / name).write_bytes(b"{}")
    program = f"""
from quire.models.hub import resolve
print(sorted(path.name for path in resolve({NAME!r}).iterdir()))
"""
    with Hub(folder) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        first = run(program, tmp_path / "home", server.endpoint)
        offline = run(program, tmp_path / "home", server.endpoint, HF_HUB_OFFLINE="1")
        server.shutdown()
    expected = sorted([weights, "config.json", "quantize_config.json"])
    assert first.stdout == f"{expected}\n", first.stderr
    assert offline.stdout == first.stdout, offline.stderr


def test_an_adapter_is_downloaded_by_its_name_and_then_found_offline(tmp_path: Path) -> None:
    """Its two files come, once, and it says what it says from a folder."""
    program = f"""
import quire
from quire.demo import adapter_path
with quire.LLM("quire/demo", enable_lora=True) as llm:
    params = quire.SamplingParams(temperature=0, max_tokens=24)
    named = llm.load_lora({NAME!r})
    paths = [named, quire.LoRARequest("x", 1, {NAME!r}), adapter_path("french")]
    paths[2] = quire.LoRARequest("y", 2, str(paths[2]))
    prompts = ["What is the capital of Greece?"] * 3
    outputs = llm.generate(prompts, params, lora_request=paths, use_tqdm=False)
    print(named.lora_name, ascii({{output.outputs[0].text for output in outputs}}))
"""
    with Hub(adapter_path("french")) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        first = run(program, tmp_path, server.endpoint)
        asked = len(server.asked)
        offline = run(program, tmp_path, server.endpoint, HF_HUB_OFFLINE="1")
        assert len(server.asked) == asked
        server.shutdown()
    assert first.returncode == 0, first.stderr
    texts = {" La capitale de la Grèce est Athènes."}
    assert first.stdout == f"tiny {texts!a}\n"
    assert (offline.returncode, offline.stdout) == (0, first.stdout), offline.stderr
    snapshot = tmp_path / "hub" / "models--somebody--tiny" / "snapshots" / COMMIT
    names = {path.name for path in snapshot.iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors"}
