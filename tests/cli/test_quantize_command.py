"""``quire quantize``: what it writes can be run at once, and wrong usage is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from quire.cli import app as app_module
from quire.converter.texts import USUAL_TEXTS, read_texts
from quire.errors import ConfigError, QuireError


def invoke(*arguments: object) -> Result:
    result = CliRunner().invoke(app_module.app, [str(each) for each in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.mark.parametrize("to", ["awq", "gptq", "int8", "w8a8", "int4", "fp8"])
def test_a_written_folder_runs(
    to: str, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """All inputs of this model are in groups of 32."""
    model, out = tiny_checkpoint("gpt-neox"), tmp_path / "made"
    done = invoke("quantize", model, "--to", to, "--out", out)
    assert done.exit_code == 0
    assert "8 projections" in done.stdout
    assert f"{out}: " in done.stdout
    shown = invoke(
        "complete", "hello", "--model", out, "--dtype", "float32", "--max-model-len", "64",
        "--max-tokens", "4", "--json",
    )  # fmt: skip
    assert len(json.loads(shown.stdout)["token_ids"]) > 0


def test_texts_of_a_file_are_looked_at(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("hello world\n\nWhat is the capital?\n")
    model = tiny_checkpoint("gpt-neox")
    plain, aware = tmp_path / "plain", tmp_path / "aware"
    assert "tokens seen" not in invoke("quantize", model, "--to", "int4", "-o", plain).stdout
    seen = invoke("quantize", model, "--to", "int4", "-o", aware, "--calibration", texts)
    assert "tokens seen" in seen.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--to", "nf4"], "--to must be one of"),
        (["--to", "int8", "--group-size", "64"], "--group-size is for"),
        (["--to", "int4"], "does not divide"),
    ],
)
def test_wrong_usage_is_named(
    arguments: list[str], message: str, tiny_llama: Path, tmp_path: Path
) -> None:
    with pytest.raises(QuireError, match=message):
        invoke("quantize", tiny_llama, *arguments, "--out", tmp_path / "made")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("texts.txt", "one\n\n two \n"),
        ("texts.jsonl", '"one"\n{"text": " two ", "id": 3}\n'),
        ("texts.json", '["one", " two "]'),
    ],
)
def test_files_of_texts(name: str, content: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    assert read_texts(tmp_path / name) == ("one", " two ")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("texts.txt", b"\n \n", "must have texts"),
        ("texts.txt", b"\xff\xfe\xff", "cannot be read as text"),
        ("texts.jsonl", b'{"prompt": "one"}\n', "must have texts"),
        ("texts.jsonl", b"one\n", "not valid JSON"),
        ("texts.json", b'{"one": 1}', "must have texts"),
        ("texts.json", b"[1]", "must have texts"),
        ("texts.json", b"[" * 100_000, "not valid JSON"),
    ],
)
def test_files_that_have_no_texts_are_named(
    name: str, content: bytes, message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        read_texts(tmp_path / name)


def test_the_usual_texts_are_texts() -> None:
    assert len(set(USUAL_TEXTS)) == len(USUAL_TEXTS) > 8
    assert all(text.strip() for text in USUAL_TEXTS)
