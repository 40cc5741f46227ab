"""The command `quire`: every subcommand does what it says, and wrong usage is named."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import quire
from quire.cli import app as app_module
from quire.cli.options import parse_assignments

GREEDY = ["--temperature", "0", "--max-tokens", "6"]


def invoke(*arguments: str, stdin: str | None = None) -> Result:
    result = CliRunner().invoke(app_module.app, list(arguments), input=stdin)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_version_and_help() -> None:
    assert invoke("--version").stdout == f"quire {quire.__version__}\n"
    help_text = invoke("--help").stdout
    for name in ("complete", "chat", "bench", "demo", "collect-env"):
        assert name in help_text


@pytest.fixture
def model(tiny_llama: Path) -> list[str]:
    return ["--model", str(tiny_llama), "--dtype", "float32", "--max-model-len", "64"]


def test_complete_streams_the_text_that_generate_gives(model: list[str]) -> None:
    """The streamed text of one prompt is the text in the JSON of the same request."""
    streamed = invoke("complete", "hello", *model, *GREEDY)
    assert streamed.exit_code == 0
    record = json.loads(invoke("complete", "hello", *model, *GREEDY, "--json").stdout)
    assert streamed.stdout == record["text"] + "\n"
    assert record["prompt"] == "hello"
    assert len(record["token_ids"]) <= 6


def test_the_start_line_goes_to_standard_error_alone(model: list[str]) -> None:
    """What is piped on is the completion; who runs it is told beside it."""
    code = "import quire.cli.app as a; a.main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "complete", "hello", *model, *GREEDY, "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout)["prompt"] == "hello"
    (line,) = done.stderr.splitlines()
    assert line.startswith("INFO quire: ")
    assert "float32" in line


def test_complete_takes_many_prompts_and_n(model: list[str]) -> None:
    result = invoke("complete", "one", "two", *model, "--n", "2", "--max-tokens", "3", "--json")
    records = [json.loads(line) for line in result.stdout.splitlines()]
    assert [(r["prompt"], r["index"]) for r in records] == [
        ("one", 0),
        ("one", 1),
        ("two", 0),
        ("two", 1),
    ]
    shown = invoke("complete", "one", "two", *model, *GREEDY).stdout
    assert "== one\n" in shown
    assert "== two\n" in shown


def test_complete_reads_standard_input(model: list[str]) -> None:
    """A final newline is the pipe's and not the prompt's: `echo` ends every text with one."""
    for piped, prompt in (
        ("from a pipe", "from a pipe"),
        ("from a pipe\n", "from a pipe"),
        ("two\nlines\n\n", "two\nlines\n"),
    ):
        result = invoke("complete", *model, *GREEDY, "--json", stdin=piped)
        assert json.loads(result.stdout)["prompt"] == prompt


def test_engine_and_sampling_arguments_reach_their_place(model: list[str]) -> None:
    result = invoke(
        "complete", "hello", *model, "--temperature", "0", "--json",
        "--engine-arg", "block-size=8", "--sampling-arg", "ignore_eos=true",
        "--sampling-arg", "max_tokens=9",
    )  # fmt: skip
    assert len(json.loads(result.stdout)["token_ids"]) == 9


@pytest.mark.parametrize(
    "options",
    [
        ["--temperature", "0", "--sampling-arg", "temperature=1"],
        ["--max-tokens", "2", "--sampling-arg", "max_tokens=9"],
        ["--max-tokens", "128", "--sampling-arg", "max-tokens=9"],
        ["--n", "1", "--sampling-arg", "n=2"],
        ["--dtype", "float32", "--engine-arg", "dtype=bfloat16"],
        ["--max-model-len", "64", "--engine-arg", "max_model_len=32"],
        ["--model", "quire/demo", "--engine-arg", "model=another"],
    ],
)
def test_a_field_is_given_once(options: list[str]) -> None:
    """The option that names a field and the general one must not contradict each other."""
    result = invoke("complete", "hi", *options)
    assert result.exit_code == 2
    assert "one field" in result.stderr
    assert options[0] in result.stderr


def test_a_default_is_nothing_that_was_given(tiny_llama: Path) -> None:
    """The general options reach the fields that other options have defaults for."""
    result = invoke(
        "complete", "hello", "--model", str(tiny_llama), "--json",
        "--engine-arg", "dtype=float32", "--engine-arg", "max_model_len=64",
        "--sampling-arg", "n=2", "--sampling-arg", "max_tokens=3",
        "--sampling-arg", "ignore_eos=true",
    )  # fmt: skip
    records = [json.loads(line) for line in result.stdout.splitlines()]
    assert [len(record["token_ids"]) for record in records] == [3, 3]


def test_help_tells_the_defaults() -> None:
    """Those that a command has of its own."""
    text = invoke("complete", "--help").stdout
    assert "[default: (128)]" in text
    assert "[default: (1)]" in text
    assert "[default: (auto)]" in text
    assert "the room left" in invoke("chat", "--help").stdout


def test_completions_that_are_compared_first_are_shown_whole(model: list[str]) -> None:
    """With best_of no text is known before all have ended; the one shown is generate's."""
    options = ["--sampling-arg", "best_of=3", "--seed", "1", "--max-tokens", "6"]
    shown = invoke("complete", "hello", *model, *options)
    assert shown.exit_code == 0, shown.stderr
    record = json.loads(invoke("complete", "hello", *model, *options, "--json").stdout)
    assert shown.stdout == record["text"] + "\n"


@pytest.mark.parametrize(
    "options", [["n=2"], ["n=2", "best_of=3"], ["n=2", "use_beam_search=true"]]
)
def test_a_chat_has_one_answer(model: list[str], options: list[str]) -> None:
    """Several would be run together in the terminal and in what the model is told it said."""
    arguments = [part for option in options for part in ("--sampling-arg", option)]
    result = invoke("chat", *model, "--max-tokens", "6", *arguments, stdin="hi\n")
    assert result.exit_code == 2
    assert "n must be 1 in a chat" in " ".join(result.stderr.split())
    assert result.stdout == ""


@pytest.mark.parametrize("options", [["best_of=2"], ["best_of=2", "use_beam_search=true"]])
def test_a_chat_shows_the_best_answer_whole(model: list[str], options: list[str]) -> None:
    """One of several is one answer."""
    arguments = [part for option in options for part in ("--sampling-arg", option)]
    result = invoke("chat", *model, "--max-tokens", "6", *arguments, "--seed", "1", stdin="hi\n")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.strip()


def test_python_m_quire_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "quire", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"quire {quire.__version__}\n"


@pytest.mark.parametrize(
    ("option", "text"), [("--engine-arg", "blok_size=8"), ("--sampling-arg", "top_q=1")]
)
def test_an_unknown_argument_is_wrong_usage(option: str, text: str, model: list[str]) -> None:
    result = invoke("complete", "hello", *model, option, text)
    assert result.exit_code == 2
    assert text.split("=")[0] in result.stderr


def test_chat_keeps_the_conversation_until_reset(
    model: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each turn goes out with what was said before; /reset and /exit do what they say."""
    from quire.engine.processor import Processor

    seen: list[list[tuple[str, str]]] = []
    render = Processor.render_chat

    def record(self: Processor, messages: list[dict[str, str]], **options: object) -> list[int]:
        seen.append([(message["role"], message["content"]) for message in messages])
        return render(self, messages, **options)

    monkeypatch.setattr(Processor, "render_chat", record)
    turns = "hi\n\nagain\n/what\n/reset\nnew\n/exit\nnever\n"
    result = invoke("chat", *model, *GREEDY, "--system", "Be kind.", stdin=turns)
    assert result.exit_code == 0
    assert "/reset" in result.stderr
    system = ("system", "Be kind.")
    assert [messages[-1] for messages in seen] == [("user", t) for t in ("hi", "again", "new")]
    assert seen[0] == [system, ("user", "hi")]
    assert [role for role, _ in seen[1]] == ["system", "user", "assistant", "user"]
    assert seen[2] == [system, ("user", "new")]
    assert seen[1][2][1] in result.stdout


def test_chat_goes_on_after_a_message_that_does_not_fit(model: list[str]) -> None:
    turns = "long " * 200 + "\nhi\n"
    result = invoke("chat", *model, *GREEDY, stdin=turns)
    assert result.exit_code == 0
    assert "error:" in result.stderr
    assert result.stdout.strip()


def test_interrupting_an_answer_keeps_what_was_said(tiny_llama: Path) -> None:
    from quire import LLM, SamplingParams
    from quire.cli.chat import Conversation
    from quire.cli.speaker import LocalSpeaker

    with LLM(tiny_llama, dtype="float32", max_model_len=64) as llm:
        params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
        conversation = Conversation(LocalSpeaker(llm, params))
        pieces = conversation.answer("hi")
        first = next(pieces)
        pieces.close()
        assert conversation.messages[-1] == {"role": "assistant", "content": first.text}
        assert any(piece.text for piece in conversation.answer("again"))


def test_collect_env_tells_versions_and_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    text = invoke("collect-env").stdout
    facts = json.loads(invoke("collect-env", "--json").stdout)
    assert facts["quire"] == quire.__version__
    assert facts["packages"]["torch"].startswith("2.")
    assert facts["cpu"]["threads"] >= 1
    assert "reference" in facts["torch"]["kernel backends"]
    assert facts["torch"]["native kernels"]
    assert facts["variables"]["HF_TOKEN"] == "set"
    assert "hf_secret" not in text
    assert f"quire: {quire.__version__}" in text


def test_bench_passes_everything_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """`quire bench --help` and options behind it belong to the bench's own parser."""
    bench = pytest.importorskip("quire.bench.cli")
    calls = []
    monkeypatch.setattr(bench, "app", lambda **given: calls.append(given))
    invoke("bench", "--help")
    invoke("bench", "latency", "--batch", "4")
    assert [call["args"] for call in calls] == [["--help"], ["latency", "--batch", "4"]]


@pytest.mark.parametrize("status", [0, 1])
def test_demo_ends_with_the_demos_status(monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    monkeypatch.setattr("quire.demo.__main__.main", lambda: status)
    assert invoke("demo").exit_code == status


def test_an_error_is_one_line_and_status_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    missing = str(tmp_path / "nothing")
    monkeypatch.setattr(sys, "argv", ["quire", "complete", "hello", "--model", missing])
    with pytest.raises(SystemExit) as exit_info:
        app_module.main()
    assert exit_info.value.code == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert missing in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("n=2", {"n": 2}),
        ("stop-token-ids=[1, 2]", {"stop_token_ids": [1, 2]}),
        ("early_stopping=never", {"early_stopping": "never"}),
        ("ignore_eos=True", {"ignore_eos": True}),
        ("stop=a=b", {"stop": "a=b"}),
        ("dtype=", {"dtype": ""}),
    ],
)
def test_assignments_are_json_where_they_can_be(text: str, expected: dict[str, object]) -> None:
    assert parse_assignments("--x", [text]) == expected


@pytest.mark.parametrize("text", ["n", "=3", " =3"])
def test_what_is_no_assignment_is_refused(text: str) -> None:
    import typer

    with pytest.raises(typer.BadParameter, match="NAME=VALUE"):
        parse_assignments("--x", [text])


def test_bench_names_the_dimensions_that_there_are():
    """A misspelt --random is a usage error, not a traceback."""
    from quire.bench.cli import app as bench_app

    result = CliRunner().invoke(bench_app, ["throughput", "--random", "zzz"])
    assert result.exit_code == 2
    assert "llama-small" in result.output
