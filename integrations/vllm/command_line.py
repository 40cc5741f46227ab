"""vLLM's flags of a server, as those of ``quire serve``."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from quire.config.engine_config import argument_names
from quire.errors import NotSupportedError
from quire.integrations.vllm.engine_args import NOT_OFFERED, TRANSLATED, WITHOUT_EFFECT, as_quire

_OF_A_SERVER = frozenset(
    [
        "api_server_count",
        "data_parallel_supervisor",
        "disable_frontend_multiprocessing",
        "disable_log_requests",
        "disable_log_stats",
        "enable_force_include_usage",
        "enable_log_deltas",
        "enable_log_outputs",
        "enable_log_requests",
        "enable_prompt_tokens_details",
        "enable_request_id_headers",
        "enable_server_load_tracking",
        "enable_ssl_refresh",
        "enable_tokenizer_info_endpoint",
        "exclude_tools_when_tool_choice_none",
        "h11_max_header_count",
        "h11_max_incomplete_event_size",
        "max_log_len",
        "response_role",
        "return_tokens_as_token_ids",
        "disable_fastapi_docs",
        "enable_offline_docs",
        "fingerprint_mode",
        "fingerprint_value",
        "log_error_stack",
        "chat_template_content_format",
        "disable_access_log_for_endpoints",
        "enable_per_request_metrics",
    ]
)
"""Flags of vLLM's server alone that change nothing here."""

_REFUSED = {
    "headless": "a server without HTTP",
    "middleware": "code from a command line",
    "grpc": "gRPC",
    "tool_server": "tools that the server calls",
    "tool_parser_plugin": "code from a file: a package of yours offers parsers by an entry point",
    "omni": "sound and images",
}

_SWITCHES = ("enable_", "disable_", "no_", "use_", "return_", "exclude_", "skip_", "log_error")


def serve_words(words: Sequence[str]) -> list[str]:
    """Return a command line of ``vllm serve`` as one of ``quire serve``.

    Flags that change nothing here are left out, those with another form are brought into it, and
    all others stay as they are, for ``quire serve`` to judge.

    Parameters
    ----------
    words : sequence of str
        Without the command's name. What is not offered ends the process with code 2.
    """
    told: list[str] = []
    rest = list(words)
    own = frozenset(argument_names()) - frozenset(TRANSLATED)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") or word == "--":
            told.append(word)
            continue
        flag, equals, value = word.partition("=")
        name = flag[2:].replace("-", "_")
        plain = name.removeprefix("no_")
        if plain in _REFUSED:
            _refuse(f"{flag}: {_REFUSED[plain]} is not offered")
        foreign = plain in _OF_A_SERVER or (
            (plain in WITHOUT_EFFECT or plain in NOT_OFFERED or plain in _IN_ANOTHER_FORM)
            and plain not in own
        )
        if not foreign:
            told.append(word)
            continue
        if not equals:
            is_switch = name.startswith(_SWITCHES)
            value = "true" if is_switch or not rest or rest[0].startswith("--") else rest.pop(0)
        if plain in _OF_A_SERVER:
            continue
        try:
            told += _flags(as_quire({plain: False if name != plain else _read(value)}))
        except NotSupportedError as error:
            _refuse(f"{flag}: {error}")
    return told


_IN_ANOTHER_FORM = frozenset(TRANSLATED) - {"served_model_name", "chat_template"}


def _flags(arguments: dict[str, Any]) -> list[str]:
    found: list[str] = []
    for name, value in arguments.items():
        text = value if isinstance(value, str) else json.dumps(value)
        found.append(f"--{name.replace('_', '-')}={text}")
    return found


def _read(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _refuse(message: str) -> NoReturn:
    sys.stderr.write(f"error: {message}\n")
    sys.exit(2)
