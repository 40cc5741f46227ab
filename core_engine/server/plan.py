"""Plan: all that a server is started with, checked before a model is loaded."""

from __future__ import annotations

import importlib
import os
import re
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quire.config import EngineConfig, argument_names, checks
from quire.config.attention_backend import honour_attention_backend
from quire.errors import ConfigError, QuireError
from quire.sampling_params import SamplingParams
from quire.server.adapter_names import check_adapter_names
from quire.server.server_flags import IGNORED
from quire.server.settings import Listening, ServerSettings
from quire.utils.checks import shown
from quire.utils.log import LEVELS

_SECONDS = checks.number(0, 10**7, above_low=True)
_PREFIX = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to serve, how, and where.

    Attributes
    ----------
    engine_args : dict
        Of :class:`quire.AsyncLLM`.
    settings : ServerSettings
    listening : Listening
    log_level : str or None
    uvicorn_log_level : str
    """

    engine_args: dict[str, Any] = field(repr=False)
    settings: ServerSettings = field(repr=False)
    listening: Listening = field(repr=False)
    log_level: str | None = None
    uvicorn_log_level: str = "WARNING"


def make_plan(given: Mapping[str, Any], environ: Mapping[str, str] = os.environ) -> Plan:
    """Return the plan of what was given.

    Parameters
    ----------
    given : mapping
        Values by the names of flags.
    environ : mapping
        Where keys are that were not given.

    Raises
    ------
    ConfigError
        A value is wrong, or contradicts another.
    """
    values = {name: value for name, value in given.items() if name not in IGNORED}
    if "model" not in values:
        raise ConfigError("no model was given: quire serve MODEL, such as quire/demo")
    engine_args = {
        name: values.pop(name) for name in argument_names() if name in _of_engine(values)
    }
    template = _chat_template(values.pop("chat_template", None))
    if template is not None:
        engine_args["chat_template"] = template
    if "logits_processors" in engine_args:
        engine_args["logits_processors"] = [
            _imported(name) for name in engine_args["logits_processors"]
        ]
    if engine_args.get("lora_modules") and not engine_args.get("enable_lora"):
        raise ConfigError("lora_modules is about adapters: give enable_lora, too")
    config = EngineConfig.create(**engine_args)
    _check_defaults(config.model.override_generation_config or {})
    honour_attention_backend(environ, of_vllm=True)

    settings = _settings(values, engine_args["model"], template, environ)
    _check_adapters(config, settings)
    plan = Plan(
        engine_args=engine_args,
        log_level=_level("log_level", values.pop("log_level", None)),
        uvicorn_log_level=_level("uvicorn_log_level", values.pop("uvicorn_log_level", None))
        or "WARNING",
        settings=settings,
        listening=_listening(values),
    )
    assert not values, values
    return plan


def _check_defaults(fields: Mapping[str, Any]) -> None:
    """Try default parameters out, which requests that give none of their own would fail by."""
    names = {"max_new_tokens": "max_tokens"}
    values = {names.get(key, key): value for key, value in fields.items() if key != "eos_token_id"}
    try:
        SamplingParams(**values)
    except QuireError as error:
        raise ConfigError(f"override_generation_config: {error}") from None


def _of_engine(values: Mapping[str, Any]) -> set[str]:
    return values.keys() - {"served_model_name", "reasoning_parser", "chat_template"}


def _settings(
    values: dict[str, Any], model: str, template: str | None, environ: Mapping[str, str]
) -> ServerSettings:
    take = _Taker(values)
    enable_tools = take("enable_auto_tool_choice", checks.boolean, True)
    tool_call_parser = take("tool_call_parser", checks.text, None)
    if not enable_tools:
        if tool_call_parser not in (None, "none"):
            raise ConfigError(
                f"tool_call_parser={tool_call_parser!r} reads tool calls, and "
                "enable_auto_tool_choice is off: give one"
            )
        tool_call_parser = "none"
    no_access_log = take("disable_access_log", checks.boolean, False)
    access_log = take("access_log", checks.boolean, not no_access_log)
    if access_log and no_access_log:
        raise ConfigError("access_log and disable_access_log contradict each other: give one")
    origins = take("allowed_origins", _texts, ())
    cors = {name: name in values for name in ("allowed_methods", "allowed_headers")}
    settings = ServerSettings(
        served_model_names=take("served_model_name", _texts, (model,)),
        api_keys=_api_keys(take("api_key", _texts, None), environ),
        chat_template=template,
        trust_request_chat_template=take("trust_request_chat_template", checks.boolean, False),
        tool_call_parser=tool_call_parser,
        reasoning_parser=take("reasoning_parser", checks.text, None),
        strict_fields=take("strict_fields", checks.boolean, False),
        root_path=take("root_path", _root_path, ""),
        allowed_origins=origins,
        allowed_methods=take("allowed_methods", _texts, ("*",)),
        allowed_headers=take("allowed_headers", _texts, ("*",)),
        allow_credentials=take("allow_credentials", checks.boolean, False),
        max_body_bytes=take("max_body_bytes", checks.integer(1), ServerSettings.max_body_bytes),
        body_timeout=take("body_timeout", _SECONDS, ServerSettings.body_timeout),
        request_timeout=take("request_timeout", _SECONDS, None),
        open_metrics=take("open_metrics", checks.boolean, False),
        metrics_prefix=take("metrics_prefix", _metrics_prefix, ServerSettings.metrics_prefix),
        page=not take("disable_page", checks.boolean, False),
        access_log=access_log,
        log_prompts=take("log_prompts", checks.boolean, False),
        allow_runtime_lora_updating=take("allow_runtime_lora_updating", checks.boolean, False),
        allowed_lora_dirs=take("allowed_lora_dirs", _texts, ()),
    )
    if not origins and (settings.allow_credentials or any(cors.values())):
        names = [name for name, was_given in cors.items() if was_given] or ["allow_credentials"]
        raise ConfigError(f"{names[0]} is about allowed_origins, of which there are none")
    if settings.allow_credentials and "*" in origins:
        raise ConfigError(
            "allow_credentials with allowed_origins=* would lend every page of the web the "
            "visitor's cookies: name the origins"
        )
    _check_parsers(settings)
    return settings


def _check_adapters(config: EngineConfig, settings: ServerSettings) -> None:
    check_adapter_names([each.lora_name for each in config.lora.lora_modules], settings)
    allowed, directories = settings.allow_runtime_lora_updating, settings.allowed_lora_dirs
    if allowed and not config.lora.enable_lora:
        raise ConfigError("allow_runtime_lora_updating needs adapters: give enable_lora, too")
    if allowed and not directories:
        raise ConfigError(
            "allow_runtime_lora_updating lets clients have files read: allowed_lora_dirs has to "
            "name the directories that those may be in"
        )
    if directories and not allowed:
        raise ConfigError(
            "allowed_lora_dirs is about adapters that clients load: give "
            "allow_runtime_lora_updating, too"
        )
    for each in directories:
        if not Path(each).is_dir():
            raise checks.refuse("allowed_lora_dirs", each, "a directory")


def _check_parsers(settings: ServerSettings) -> None:
    if settings.tool_call_parser is None and settings.reasoning_parser is None:
        return
    from quire.chat import reasoning_parser_names, tool_parser_names

    for field_name, name, known in (
        ("tool_call_parser", settings.tool_call_parser, tool_parser_names()),
        ("reasoning_parser", settings.reasoning_parser, reasoning_parser_names()),
    ):
        if name is not None and name not in known and name != "none":
            right = ", ".join(repr(each) for each in [*known, "none"])
            raise ConfigError(f"{field_name} must be one of {right}, not {name!r}")


def _listening(values: dict[str, Any]) -> Listening:
    take = _Taker(values)
    beside = [name for name in ("host", "port") if name in values]
    of_ssl = [name for name in values if name.startswith("ssl_") and name != "ssl_certfile"]
    listening = Listening(
        host=take("host", checks.text, Listening.host),
        port=take("port", checks.integer(0, 65535), Listening.port),
        uds=take("uds", checks.text, None),
        ssl_keyfile=take("ssl_keyfile", _file, None),
        ssl_certfile=take("ssl_certfile", _file, None),
        ssl_ca_certs=take("ssl_ca_certs", _file, None),
        ssl_cert_reqs=take("ssl_cert_reqs", checks.integer(0, 2), 0),
        ssl_ciphers=take("ssl_ciphers", checks.text, None),
        ssl_keyfile_password=take("ssl_keyfile_password", checks.text, None),
        header_timeout=take("header_timeout", _SECONDS, Listening.header_timeout),
        keep_alive_timeout=take(
            "keep_alive_timeout", checks.integer(1, 10**6), Listening.keep_alive_timeout
        ),
        max_header_bytes=take(
            "max_header_bytes", checks.integer(1024, 2**30), Listening.max_header_bytes
        ),
        max_connections=take(
            "max_connections", checks.integer(1, 10**6), Listening.max_connections
        ),
        drain_timeout=take("drain_timeout", checks.number(0, 10**7), Listening.drain_timeout),
    )
    if listening.uds is not None and beside:
        raise ConfigError(f"uds is listened to instead of {beside[0]}: give one")
    if of_ssl and listening.ssl_certfile is None:
        raise ConfigError(f"{of_ssl[0]} needs a certificate: give ssl_certfile, too")
    if listening.ssl_cert_reqs and listening.ssl_ca_certs is None:
        raise ConfigError(
            "ssl_cert_reqs asks clients for certificates: ssl_ca_certs has to say whose count"
        )
    _check_certificate(listening)
    return listening


def _check_certificate(listening: Listening) -> None:
    """Try what the web server does with the files once it starts."""
    if listening.ssl_certfile is None:
        return
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(
            listening.ssl_certfile,
            listening.ssl_keyfile,
            lambda: listening.ssl_keyfile_password or "",
        )
        if listening.ssl_ca_certs is not None:
            context.load_verify_locations(listening.ssl_ca_certs)
        if listening.ssl_ciphers is not None:
            context.set_ciphers(listening.ssl_ciphers)
    except (OSError, ValueError) as error:  # SSLError is an OSError
        raise ConfigError(f"the server's ssl files or ciphers cannot be used: {error}") from None


class _Taker:
    """Takes values out of a dict, checked."""

    def __init__(self, values: dict[str, Any]) -> None:
        self._values = values

    def __call__(self, name: str, check: Callable[[str, Any], Any], default: Any) -> Any:
        value = self._values.pop(name, None)
        return default if value is None else check(name, value)


def _texts(name: str, value: Any) -> tuple[str, ...]:
    kept = tuple(checks.text(name, each) for each in value)
    for each in kept:
        if kept.count(each) > 1:
            what = "a key" if name == "api_key" else repr(each)
            raise ConfigError(f"{name} has {what} twice")
    return kept


def _api_keys(given: tuple[str, ...] | None, environ: Mapping[str, str]) -> tuple[str, ...]:
    """Return the keys of the command line or the file, else those of the environment."""
    if given is not None:
        keys = given
    else:
        told = environ.get("QUIRE_API_KEY") or environ.get("VLLM_API_KEY") or ""
        keys = tuple(key.strip() for key in told.split(",") if key.strip())
    for key in keys:
        # What no header can carry would shut everybody out.
        if not key.isascii() or not key.isprintable() or key != key.strip():
            raise ConfigError("api_key: a key has printable ASCII characters and no spaces around")
    return keys


def _root_path(name: str, value: Any) -> str:
    path = checks.text(name, value).rstrip("/")
    if path and not path.startswith("/"):
        raise checks.refuse(name, value, "a path that begins with /")
    return path


def _metrics_prefix(name: str, value: Any) -> str:
    if not isinstance(value, str) or not (value == "" or _PREFIX.fullmatch(value)):
        raise checks.refuse(name, value, "letters, digits, _ and :, such as 'vllm:'")
    return value


def _file(name: str, value: Any) -> str:
    path = checks.text(name, value)
    if not Path(path).is_file():
        raise checks.refuse(name, value, "a file")
    return path


def _level(name: str, value: Any) -> str | None:
    if value is None:
        return None
    level = str(value).strip().upper()
    if level not in LEVELS:
        raise checks.refuse(name, value, "one of " + ", ".join(each.lower() for each in LEVELS))
    return level


def _chat_template(value: Any) -> str | None:
    """Return a template that is given as text, or as the file that it is in."""
    if value is None:
        return None
    text = checks.text("chat_template", value)
    if not any(mark in text for mark in ("{{", "{%", "\n")):
        try:
            text = Path(text).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"chat_template={shown(value)} is no template, and no readable file: {error}"
            ) from None
    from quire.tokenizer.chat_template import check_template

    try:
        check_template(text)
    except QuireError as error:
        raise ConfigError(f"chat_template: {error}") from None
    return text


def _imported(name: str) -> Any:
    """Return the class that ``package.module:Class`` names."""
    module, colon, attribute = name.partition(":")
    if not colon:
        module, _, attribute = name.rpartition(".")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"logits_processors: {name!r} is no 'package.module:Class' that can be imported "
            f"({error})"
        ) from None
