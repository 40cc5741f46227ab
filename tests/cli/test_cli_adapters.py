"""The command `quire` with LoRA adapters: `--lora` for a text, `--lora-modules` for a batch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from adapters import write_adapter
from typer.testing import CliRunner, Result

import quire.demo
from quire import LLM, LoRARequest, SamplingParams
from quire.cli import app as app_module
from quire.errors import AdapterError, ConfigError

MODEL = Path(quire.demo.__file__).parent / "model"
PROMPT = "The capital of France is"
GREEDY = ["--temperature", "0", "--max-tokens", "6", "--dtype", "float32"]


def invoke(*arguments: str, stdin: str | None = None) -> Result:
    result = CliRunner().invoke(app_module.app, list(arguments), input=stdin)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(tmp_path_factory.mktemp("adapters") / "mine", MODEL, size=1.0)


@pytest.fixture(scope="module")
def expected(adapter: Path) -> dict[str, str]:
    """What the model says without the adapter, with it, and with it in a chat."""
    params = SamplingParams(temperature=0, max_tokens=6)
    request = LoRARequest("mine", lora_path=str(adapter))
    with LLM("quire/demo", dtype="float32", enable_lora=True) as llm:
        outputs = llm.generate([PROMPT] * 2, params, lora_request=[None, request])
        outputs += llm.chat([{"role": "user", "content": "Hello"}], params, lora_request=request)
    base, adapted, chat = (output.outputs[0].text for output in outputs)
    assert base != adapted
    return {"base": base, "adapted": adapted, "chat": chat}


def test_texts_and_chats_are_the_adapters(adapter: Path, expected: dict[str, str]) -> None:
    """Streamed, in JSON, several at once, and turn by turn."""
    lora = ["--lora", str(adapter), *GREEDY]
    assert invoke("complete", PROMPT, *lora).stdout == expected["adapted"] + "\n"
    records = invoke("complete", PROMPT, PROMPT, *lora, "--json").stdout.splitlines()
    assert [json.loads(line)["text"] for line in records] == [expected["adapted"]] * 2
    assert invoke("chat", *lora, stdin="Hello\n").stdout == expected["chat"] + "\n"
    assert invoke("complete", PROMPT, *GREEDY).stdout == expected["base"] + "\n"


def test_what_goes_wrong_with_an_adapter_is_named(adapter: Path, tmp_path: Path) -> None:
    """Nothing is answered by the model alone instead."""
    with pytest.raises(AdapterError, match="nowhere"):
        invoke("complete", PROMPT, "--lora", str(tmp_path / "nowhere"), *GREEDY)
    lora = ["--lora", str(adapter), *GREEDY]
    with pytest.raises(AdapterError, match="max_lora_rank"):
        invoke("complete", PROMPT, *lora, "--engine-arg", "max_lora_rank=2")
    with pytest.raises(AdapterError, match="enable_lora"):
        invoke("complete", PROMPT, *lora, "--engine-arg", "enable_lora=false")
    result = invoke("complete", PROMPT, "--lora", str(adapter), "--url", "http://localhost:1")
    assert result.exit_code == 2
    assert "--model is the name" in " ".join(result.stderr.replace("│", " ").split())


def test_a_batch_asks_for_adapters_by_name(
    adapter: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    pytest.importorskip("fastapi")
    source, target = tmp_path / "in", tmp_path / "out"
    body = {"prompt": PROMPT, "temperature": 0, "max_tokens": 6}
    names = {"base": "quire/demo", "adapted": "mine", "unknown": "theirs"}
    lines = [
        {"custom_id": key, "method": "POST", "url": "/v1/completions",
         "body": {"model": name, **body}}
        for key, name in names.items()
    ]  # fmt: skip
    source.write_text("\n".join(map(json.dumps, lines)))
    words = ["run-batch", "-i", str(source), "-o", str(target), "--dtype", "float32"]
    result = invoke(*words, "--lora-modules", f"mine={adapter}")
    assert result.exit_code == 1
    answers = {
        record["custom_id"]: record["response"]
        for record in map(json.loads, target.read_text().splitlines())
    }
    for key in ("base", "adapted"):
        assert answers[key]["body"]["model"] == names[key]
        assert answers[key]["body"]["choices"][0]["text"] == expected[key]
    assert answers["unknown"]["status_code"] == 404
    for module, word in ((f"quire/demo={adapter}", "served already"), (str(adapter), "name=path")):
        with pytest.raises(ConfigError, match=word):
            invoke(*words, "--lora-modules", module)
