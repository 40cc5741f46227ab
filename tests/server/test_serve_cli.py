"""The command line of ``quire serve``: every argument, files of them, and contradictions."""

from __future__ import annotations

import dataclasses
import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.config import EngineConfig, argument_names
from quire.errors import ConfigError, NotSupportedError
from quire.server.command_line import CommandLine
from quire.server.flag import integer
from quire.server.plan import make_plan

yaml = pytest.importorskip("yaml")

MODEL = "quire/demo"
LINE = CommandLine()


def plan(*words: str, env: dict[str, str] | None = None):
    return make_plan(LINE.read([MODEL, *words]), env or {})


# -- names ---------------------------------------------------------------------------------------


def test_every_argument_of_the_engine_is_a_flag():
    """A new field of the configuration needs nothing else to be reached from the command line."""
    assert set(argument_names()) <= set(LINE.flags)


def test_the_help_has_every_field_with_its_words():
    """What the configuration's docstrings say of a field is what the help says."""
    for config in dataclasses.fields(EngineConfig):
        assert config.name in ("model", "cache", "scheduler", "structured", "lora", "parallel") or (
            LINE.flags[config.name].help
        )
    shown = LINE._parser.format_help()
    for name in ("max-num-seqs", "gpu-memory-utilization", "api-key", "max-waiting-requests"):
        assert f"--{name}" in shown
    assert "--no-enable-prefix-caching" in shown
    assert "``" not in shown
    assert ":class:" not in shown


def test_defaults_written_out_change_nothing():
    """Each field reads its own default, as text, as the configuration would take it."""
    words = []
    for name, value in EngineConfig.create(MODEL).to_kwargs().items():
        flag = LINE.flags[name]
        if value is None or value == () or name == "model":
            continue
        if flag.kind == "switch":
            words.append(flag.option if value else f"--no-{flag.option[2:]}")
        else:
            words += [flag.option, str(value)]
    assert len(words) > 20
    assert EngineConfig.create(**plan(*words).engine_args) == EngineConfig.create(MODEL)


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        (["--max-num-seqs", "8"], "max_num_seqs", 8),
        (["--max_num_seqs=8"], "max_num_seqs", 8),
        (["--max-model-len", "2K"], "max_model_len", 2048),
        (["--no-enable-prefix-caching"], "enable_prefix_caching", False),
        (["--enable_chunked_prefill"], "enable_chunked_prefill", True),
        (["--no_enable_chunked_prefill"], "enable_chunked_prefill", False),
        (["--gpu-memory-utilization", "0.5"], "gpu_memory_utilization", 0.5),
        (["--hf-overrides", '{"rope_theta": 1}'], "hf_overrides", {"rope_theta": 1}),
        (["--quantization", "awq"], "quantization", "awq"),
        (["-q", "int4"], "quantization", "int4"),
        (["--quantization-config", '{"lm_head": null}'], "quantization_config", {"lm_head": None}),
        (["--hf-token"], "hf_token", True),
        (["--hf-token", "hf_abc"], "hf_token", "hf_abc"),
        (["-tp", "1"], "tensor_parallel_size", 1),
        (["--swap-space", "4"], "swap_space", 4),
        (["--code-revision", "123"], "code_revision", "123"),
        (["--enforce-eager"], "enforce_eager", True),
        (["--max-waiting-requests", "0"], "max_waiting_requests", 0),
    ],
)
def test_values_reach_the_engine(words, name, value):
    assert plan(*words).engine_args[name] == value


def test_integers_have_units():
    """vLLM's: decimal in lower case, binary in upper."""
    assert [integer(t) for t in ("3", "-1", "2k", "2K", "1.5k", "1G")] == [
        3, -1, 2000, 2048, 1500, 2**30
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--max-num-seq", "8"], "did you mean --max-num-seqs?"),
        (["--served-model-nam=x"], "did you mean --served-model-name?"),
        (["another/model"], "one model is served, not 2"),
        (["--model", "another/model"], "--model is 'another/model'"),
        (["--port", "http"], "'http' is no integer"),
        (["--hf-overrides", "[1]"], "no JSON object"),
    ],
)
def test_wrong_usage_is_named(words, message, capsys):
    with pytest.raises(SystemExit) as caught:
        LINE.read([MODEL, *words])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_the_model_stands_anywhere():
    for words in ([MODEL, "--port", "0"], ["--port", "0", MODEL], ["--model", MODEL]):
        assert LINE.read(words)["model"] == MODEL


def test_several_values_stand_behind_a_flag_or_behind_several():
    words = ["--served-model-name", "a", "b", "--api-key", "k1", "--api-key", "k2"]
    settings = plan(*words).settings
    assert settings.served_model_names == ("a", "b")
    assert settings.api_keys == ("k1", "k2")
    assert plan().settings.served_model_names == (MODEL,)


# -- files ---------------------------------------------------------------------------------------

ENTRIES = st.fixed_dictionaries(
    {},
    optional={
        "max_num_seqs": st.integers(1, 1000),
        "enable_prefix_caching": st.booleans(),
        "gpu_memory_utilization": st.sampled_from([0.25, 0.5, 1.0]),
        "served_model_name": st.lists(st.sampled_from("abc"), min_size=1, unique=True),
        "quantization": st.sampled_from(["awq", "gptq", "int8"]),
        "quantization_config": st.dictionaries(st.sampled_from("ab"), st.integers(), min_size=1),
        "hf_overrides": st.dictionaries(st.sampled_from("ab"), st.integers(), min_size=1),
        "revision": st.sampled_from(["main", "2024"]),
        "port": st.integers(0, 65535),
        "strict_fields": st.booleans(),
        "drain_timeout": st.sampled_from([0, 1.5]),
    },
)


def words_of(entries: dict) -> list[str]:
    words = []
    for name, value in entries.items():
        option = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            words.append(option if value else option.replace("--", "--no-", 1))
        elif isinstance(value, list):
            words += [option, *value]
        else:
            words += [option, json.dumps(value) if isinstance(value, dict) else str(value)]
    return words


@given(told=ENTRIES, given_too=ENTRIES, hyphens=st.booleans())
def test_a_file_says_what_the_command_line_says_and_that_wins(tmp_path, told, given_too, hyphens):
    """The same names and values, and of those in both the command line's."""
    file = tmp_path / "serve.yaml"
    named = {(k.replace("_", "-") if hyphens else k): v for k, v in told.items()}
    file.write_text(yaml.safe_dump(named))
    expected = LINE.read(words_of(told)) | LINE.read(words_of(given_too))
    assert LINE.read(["--config", str(file), *words_of(given_too)]) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_num_seq: 8", "no argument 'max_num_seq': did you mean 'max_num_seqs'?"),
        ("max_num_seqs: 8\nmax-num-seqs: 9", "are one argument"),
        ("port: 1\nport: 2", "'port' stands there twice"),
        ("enable_prefix_caching: 'yes'", "must be true or false"),
        ("- port", "must be a mapping"),
        ("port: [", "cannot be read"),
        ("port: {a: 1}", "port cannot be"),
        ("config: other.yaml", "cannot name another"),
        ("port: !!python/object/apply:os.getpid []", "cannot be read"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path, text, message):
    file = tmp_path / "serve.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"serve\.yaml") as caught:
        LINE.read([MODEL, "--config", str(file)])
    assert message in str(caught.value)


def test_a_file_may_name_the_model_and_leave_things_open(tmp_path):
    file = tmp_path / "serve.yaml"
    file.write_text(f"model: {MODEL}\nrevision: null\nhf_token: true\n")
    assert LINE.read(["--config", str(file)]) == {"model": MODEL, "hf_token": True}


# -- contradictions, all before a model is loaded --------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--max-num-seqs", "0"], "max_num_seqs"),
        (["--tensor-parallel-size", "0"], "tensor_parallel_size"),
        (["--quantization", "abc"], "quantization must be one of"),
        (["--fully-sharded-loras"], "fully_sharded_loras=True is not offered"),
        (["--lora-modules", "a=b"], "lora_modules is about adapters: give enable_lora"),
        (["--max-loras", "4"], "set enable_lora=True"),
        (["--enable-lora", "--lora-modules", "a"], "lora_modules[0]"),
        (["--enable-lora", "--lora-modules", '{"name": "a"}'], "lora_modules[0]"),
        (["--enable-lora", "--lora-modules", "a=b", "--lora-modules", "a=c"], "has the name 'a'"),
        (["--enable-lora", "--lora-modules", f"{MODEL}=b"], "is served already, as the model"),
        (["--enable-lora", "--served-model-name", "m", "--lora-modules", "m=b"], "served already"),
        (["--enable-lora", "--lora-modules", "a\n=b"], "without control characters"),
        (["--enable-lora", "--lora-modules", " a=b"], "without spaces around it"),
        (["--enable-lora", "--lora-modules", f"{'a' * 300}=b"], "at most 256 characters"),
        (["--allow-runtime-lora-updating", "--allowed-lora-dirs", "/tmp"], "give enable_lora"),
        (["--enable-lora", "--allow-runtime-lora-updating"], "allowed_lora_dirs has to name"),
        (["--enable-lora", "--allowed-lora-dirs", "/tmp"], "give allow_runtime_lora_updating"),
        (["--enable-lora", "--allow-runtime-lora-updating", "--allowed-lora-dirs", "/nowhere"],
         "allowed_lora_dirs must be a directory"),
        (["--uds", "/tmp/s", "--port", "80"], "uds is listened to instead of port"),
        (["--ssl-keyfile", __file__], "ssl_keyfile needs a certificate"),
        (["--ssl-certfile", "/nowhere.pem"], "ssl_certfile must be a file"),
        (["--ssl-certfile", __file__], "ssl files"),
        (["--ssl-cert-reqs", "3"], "ssl_cert_reqs must be from 0 to 2"),
        (["--allow-credentials"], "there are none"),
        (["--allowed-origins", "*", "--allow-credentials"], "name the origins"),
        (["--allowed-methods", "GET"], "there are none"),
        (["--metrics-prefix", "1 x"], "metrics_prefix"),
        (["--log-level", "loud"], "log_level"),
        (["--access-log", "--disable-access-log"], "contradict"),
        (["--tool-call-parser", "nothing"], "tool_call_parser must be one of"),
        (["--reasoning-parser", "nothing"], "reasoning_parser must be one of"),
        (["--tool-call-parser", "hermes", "--no-enable-auto-tool-choice"], "give one"),
        (["--chat-template", "nowhere.jinja"], "no template, and no readable file"),
        (["--chat-template", "{% if %}"], "not valid Jinja"),
        (["--request-timeout", "0"], "request_timeout"),
        (["--override-generation-config", '{"temperatur": 1}'], "did you mean 'temperature'?"),
        (["--override-generation-config", '{"temperature": -1}'], "override_generation_config: "),
        (["--port", "65536"], "port"),
        (["--root-path", "api"], "a path that begins with /"),
        (["--api-key", " "], "api_key"),
        (["--api-key", "k", "k"], "a key twice"),
        (["--api-key", "schlüssel"], "printable ASCII"),
        (["--logits-processors", "nowhere:Nothing"], "logits_processors"),
        (["--max-num-batched-tokens", "8", "--max-model-len", "16", "--no-enable-chunked-prefill"],
         "max_num_batched_tokens=8 is less"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_by_name(words, message):
    with pytest.raises(ConfigError) as caught:
        plan(*words)
    assert message in str(caught.value)


def test_sharded_adapters_are_refused_as_not_offered():
    with pytest.raises(NotSupportedError):
        plan("--fully-sharded-loras")


def test_adapters_are_named_in_each_way(tmp_path):
    """As name=path, as JSON, in a file; behind one flag or several, all in their order."""
    wanted = [("a", "x/a", None), ("b", "y=b", None), ("c/d", "z", "base")]
    words = ["--enable-lora", "--lora-modules", "a=x/a", "b=y=b"]
    words += ["--lora-modules", '{"name": "c/d", "path": "z", "base_model_name": "base"}']
    file = tmp_path / "serve.yaml"
    file.write_text(
        "enable-lora: true\nlora-modules:\n  - a=x/a\n  - {name: b, path: y=b}\n"
        "  - {name: c/d, path: z, base_model_name: base}\n"
    )
    for line in (words, ["--config", str(file)]):
        config = EngineConfig.create(**plan(*line).engine_args)
        assert [
            (each.lora_name, each.lora_path, each.base_model_name)
            for each in config.lora.lora_modules
        ] == wanted


def test_clients_load_adapters_from_where_they_may(tmp_path):
    settings = plan(
        "--enable-lora", "--allow-runtime-lora-updating",
        "--allowed-lora-dirs", str(tmp_path), "--allowed-lora-dirs", "/",
    ).settings  # fmt: skip
    assert settings.allow_runtime_lora_updating
    assert settings.allowed_lora_dirs == (str(tmp_path), "/")
    assert not plan().settings.allow_runtime_lora_updating


def test_no_message_repeats_a_key(capsys):
    """Neither of the server nor of the hub."""
    for words in (["--api-key", "sécret"], ["--api-key", "secret", "secret"]):
        with pytest.raises(ConfigError) as caught:
            plan(*words)
        assert "cret" not in str(caught.value)
    assert "secret" not in repr(plan("--api-key", "secret", "--hf-token", "secret"))


def test_keys_come_from_the_environment_unless_given():
    """QUIRE_API_KEY goes before VLLM_API_KEY, the command line before both; empty is none."""
    both = {"QUIRE_API_KEY": "q1, q2", "VLLM_API_KEY": "v"}
    assert plan(env=both).settings.api_keys == ("q1", "q2")
    assert plan(env={"QUIRE_API_KEY": "", "VLLM_API_KEY": "v"}).settings.api_keys == ("v",)
    assert plan("--api-key", "c", env=both).settings.api_keys == ("c",)
    assert plan(env={}).settings.api_keys == ()


def test_a_chat_template_is_a_file_or_a_template(tmp_path: Path):
    text = "{% for m in messages %}{{ m.content }}{% endfor %}"
    file = tmp_path / "chat.jinja"
    file.write_text(text)
    for given_as in (text, str(file)):
        made = plan("--chat-template", given_as)
        assert made.settings.chat_template == text
        assert made.engine_args["chat_template"] == text


def test_logits_processors_are_imported_by_name():
    made = plan("--logits-processors", "quire.logits_processor:LogitsProcessor")
    assert made.engine_args["logits_processors"][0].__name__ == "LogitsProcessor"


# -- who computes attention ------------------------------------------------------------------------


def test_attention_backends_of_vllm_have_no_effect_and_say_so(caplog, monkeypatch):
    monkeypatch.delenv("QUIRE_KERNELS", raising=False)
    plan(env={"VLLM_ATTENTION_BACKEND": "FLASH_ATTN"})
    assert "VLLM_ATTENTION_BACKEND=FLASH_ATTN has no effect" in caplog.text


def test_an_attention_backend_of_ours_is_chosen(monkeypatch):
    """QUIRE_ATTENTION_BACKEND goes before VLLM_ATTENTION_BACKEND."""
    import os

    monkeypatch.setenv("QUIRE_KERNELS", "")
    plan(env={"QUIRE_ATTENTION_BACKEND": "Reference", "VLLM_ATTENTION_BACKEND": "nonsense"})
    assert os.environ["QUIRE_KERNELS"] == "reference"


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"VLLM_ATTENTION_BACKEND": "FLASH_ATN"}, "did you mean FLASH_ATTN?"),
        ({"QUIRE_ATTENTION_BACKEND": "referense"}, "did you mean reference?"),
        ({"QUIRE_ATTENTION_BACKEND": "reference", "QUIRE_KERNELS": "cpu"}, "contradict"),
    ],
)
def test_an_unknown_attention_backend_is_refused(env, message):
    with pytest.raises(ConfigError) as caught:
        plan(env=env)
    assert message in str(caught.value)


# -- the process -----------------------------------------------------------------------------------


def run(*words: str, code: str = "") -> subprocess.CompletedProcess[str]:
    program = f"{code}\nfrom quire.server.cli import main\nmain({list(words)!r})"
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)


def test_a_missing_package_is_named_with_the_extra():
    done = run(MODEL, code="import sys; sys.modules['uvicorn'] = None")
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "pip install 'quire[server]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_help_needs_no_torch_and_no_extra():
    block = "import sys; sys.modules.update(dict.fromkeys(['torch', 'fastapi', 'uvicorn', 'yaml']))"
    done = run("--help", code=block)
    assert done.returncode == 0, done.stderr
    assert "--max-num-seqs N" in done.stdout


def test_a_taken_port_fails_before_the_model_loads():
    """The model is nowhere, which would be the error if it had been looked for first."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = run("/nowhere", "--port", str(port))
    assert done.returncode == 1
    assert f"cannot listen on host='127.0.0.1', port={port}" in done.stderr
    assert "Traceback" not in done.stderr


def test_no_model_is_named():
    done = run()
    assert done.returncode == 1
    assert "no model was given" in done.stderr
