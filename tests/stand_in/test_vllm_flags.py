"""Flags of vLLM's server become those of quire's, or are refused by name."""

from __future__ import annotations

import pytest

from quire.integrations.vllm.command_line import serve_words
from quire.server.command_line import CommandLine


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["m", "--port", "1"], ["m", "--port", "1"]),
        (["--disable-log-requests", "m"], ["m"]),
        (["--disable-log-stats", "--enforce-eager", "m"], ["--enforce-eager", "m"]),
        (["m", "--api-server-count", "2", "--port=3"], ["m", "--port=3"]),
        (["m", "--moe-backend", "triton"], ["m"]),
        (["m", "--compilation-config", '{"level": 3}'], ["m"]),
        (["m", "--task", "embed", "--runner=pooling"], ["m"]),
        (
            ["m", "--guided-decoding-backend", "guidance"],
            ["m", "--structured-outputs-backend=llguidance"],
        ),
        (["m", "--nnodes", "1"], ["m"]),
        (["m", "--no-enable-log-requests"], ["m"]),
        (["m", "--max_model_len", "64"], ["m", "--max_model_len", "64"]),
        (["m", "--enable-elastic-ep=false"], ["m"]),
    ],
)
def test_words(words: list[str], told: list[str]) -> None:
    assert serve_words(words) == told
    assert CommandLine("vllm serve").read(told)["model"] == "m"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["m", "--nnodes", "2"], "nnodes"),
        (["m", "--middleware", "a.b"], "middleware"),
        (["m", "--enable-dbo"], "enable_dbo"),
        (["m", "--structured-outputs-config", '{"backend": "nobody"}'], "nobody"),
    ],
)
def test_what_is_not_offered_is_refused(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        serve_words(words)
    assert caught.value.code == 2
    assert said in capsys.readouterr().err
