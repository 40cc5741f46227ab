"""The flags of ``quire serve`` that are not the engine's."""

from __future__ import annotations

from quire.server.flag import Flag
from quire.server.settings import Listening, ServerSettings

_LISTENING = "Where it listens"
_LIMITS = "Limits"
_ANSWERS = "Names and answers"
_ADAPTERS = "Adapters"
_ACCESS = "Access"
_LOGS = "Logs, metrics, page"


def server_flags() -> list[Flag]:
    """Return the flags, in the order of the help."""
    listening = Listening()
    settings = ServerSettings(served_model_names=())
    return [
        Flag(
            name="config",
            kind="text",
            group="The model",
            help="A YAML file with any of these names; the command line goes before it.",
        ),
        Flag(name="model", kind="text", group="The model", help="MODEL, by name."),
        Flag(
            name="served_model_name",
            kind="several",
            group=_ANSWERS,
            help="Names that clients may ask for, the first one for answers [MODEL].",
        ),
        Flag(
            name="chat_template",
            kind="text",
            group=_ANSWERS,
            help="A file with a Jinja template, or the template.",
        ),
        Flag(
            name="trust_request_chat_template",
            kind="switch",
            group=_ANSWERS,
            help="Run templates that come with requests, for clients who may stop the server.",
            default=settings.trust_request_chat_template,
        ),
        Flag(
            name="tool_call_parser",
            kind="text",
            group=_ANSWERS,
            help="How tool calls are written [guessed by the chat template]; none: not read.",
        ),
        Flag(
            name="reasoning_parser",
            kind="text",
            group=_ANSWERS,
            help="How reasoning is written [guessed by the chat template]; none: not read.",
        ),
        Flag(
            name="enable_auto_tool_choice",
            kind="switch",
            group=_ANSWERS,
            help="Read tool calls; off is --tool-call-parser none.",
            default=True,
        ),
        Flag(
            name="strict_fields",
            kind="switch",
            group=_ANSWERS,
            help="Refuse requests with fields that nobody knows.",
            default=settings.strict_fields,
        ),
        Flag(
            name="lora_modules",
            kind="modules",
            group=_ADAPTERS,
            help='Adapters, as NAME=PATH or {"name", "path", "base_model_name"} in JSON; '
            "requests ask for one by its name.",
        ),
        Flag(
            name="allow_runtime_lora_updating",
            kind="switch",
            group=_ADAPTERS,
            help="Let clients load and unload adapters.",
            default=settings.allow_runtime_lora_updating,
        ),
        Flag(
            name="allowed_lora_dirs",
            kind="several",
            group=_ADAPTERS,
            help="Directories that clients may load adapters from.",
        ),
        Flag(
            name="host",
            kind="text",
            group=_LISTENING,
            help="The address.",
            default=listening.host,
        ),
        Flag(
            name="port",
            kind="integer",
            group=_LISTENING,
            help="The port; 0 takes a free one.",
            default=listening.port,
        ),
        Flag(
            name="uds",
            kind="text",
            group=_LISTENING,
            help="The path of a Unix socket, instead of an address and a port.",
        ),
        Flag(
            name="ssl_certfile",
            kind="text",
            group=_LISTENING,
            help="A certificate, for HTTPS.",
        ),
        Flag(
            name="ssl_keyfile",
            kind="text",
            group=_LISTENING,
            help="Its key, where it is another file.",
        ),
        Flag(
            name="ssl_keyfile_password",
            kind="text",
            group=_LISTENING,
            help="What opens the key.",
        ),
        Flag(
            name="ssl_ca_certs",
            kind="text",
            group=_LISTENING,
            help="Who may sign the certificates of clients.",
        ),
        Flag(
            name="ssl_cert_reqs",
            kind="integer",
            group=_LISTENING,
            help="Whether clients show a certificate: 0 no, 1 if they like, 2 they have to.",
            default=listening.ssl_cert_reqs,
        ),
        Flag(
            name="ssl_ciphers",
            kind="text",
            group=_LISTENING,
            help="OpenSSL's names of ciphers.",
        ),
        Flag(
            name="root_path",
            kind="text",
            group=_LISTENING,
            help="What a proxy in front puts before every path.",
        ),
        Flag(
            name="api_key",
            kind="several",
            group=_ACCESS,
            help="Keys, of which a client has to send one [QUIRE_API_KEY, else VLLM_API_KEY].",
        ),
        Flag(
            name="allowed_origins",
            kind="several",
            group=_ACCESS,
            help="Origins whose pages may ask, or * for all [none].",
        ),
        Flag(
            name="allowed_methods",
            kind="several",
            group=_ACCESS,
            help="What methods they may use.",
            default=settings.allowed_methods,
        ),
        Flag(
            name="allowed_headers",
            kind="several",
            group=_ACCESS,
            help="What headers they may send.",
            default=settings.allowed_headers,
        ),
        Flag(
            name="allow_credentials",
            kind="switch",
            group=_ACCESS,
            help="Whether they may send cookies.",
            default=settings.allow_credentials,
        ),
        Flag(
            name="max_body_bytes",
            kind="integer",
            group=_LIMITS,
            help="Longest body of a request.",
            default=settings.max_body_bytes,
        ),
        Flag(
            name="max_header_bytes",
            kind="integer",
            group=_LIMITS,
            help="Longest head of a request.",
            default=listening.max_header_bytes,
        ),
        Flag(
            name="max_connections",
            kind="integer",
            group=_LIMITS,
            help="Connections at once; one more is told that the server is busy.",
            default=listening.max_connections,
        ),
        Flag(
            name="header_timeout",
            kind="number",
            group=_LIMITS,
            help="Most seconds in which the head of a request arrives.",
            default=listening.header_timeout,
        ),
        Flag(
            name="body_timeout",
            kind="number",
            group=_LIMITS,
            help="Most seconds in which a body arrives.",
            default=settings.body_timeout,
        ),
        Flag(
            name="request_timeout",
            kind="number",
            group=_LIMITS,
            help="Most seconds of a request, from its head to the end of its answer [no limit].",
        ),
        Flag(
            name="keep_alive_timeout",
            kind="integer",
            group=_LIMITS,
            help="Seconds that an idle connection stays open.",
            default=listening.keep_alive_timeout,
        ),
        Flag(
            name="drain_timeout",
            kind="number",
            group=_LIMITS,
            help="Seconds that running requests have to finish after SIGTERM.",
            default=listening.drain_timeout,
        ),
        Flag(
            name="log_level",
            kind="text",
            group=_LOGS,
            help="debug, info, warning, error or critical [QUIRE_LOG_LEVEL, else info].",
        ),
        Flag(
            name="uvicorn_log_level",
            kind="text",
            group=_LOGS,
            help="The same for the web server underneath.",
            default="warning",
        ),
        Flag(
            name="access_log",
            kind="switch",
            group=_LOGS,
            help="Write a line for each request, without prompts.",
            default=True,
            spellings=("--uvicorn-access-log",),
        ),
        Flag(name="disable_access_log", kind="switch", spellings=("--disable-uvicorn-access-log",)),
        Flag(
            name="log_prompts",
            kind="switch",
            group=_LOGS,
            help="Write prompts and parameters of requests.",
            default=settings.log_prompts,
        ),
        Flag(
            name="metrics_prefix",
            kind="text",
            group=_LOGS,
            help="Stands before the engine's metrics; vllm: fits dashboards made for vLLM.",
            default=settings.metrics_prefix,
        ),
        Flag(
            name="open_metrics",
            kind="switch",
            group=_LOGS,
            help="Serve /metrics without a key.",
            default=settings.open_metrics,
        ),
        Flag(name="disable_page", kind="switch", group=_LOGS, help="No web page at /."),
        # Of vLLM, and true here in any case.
        Flag(name="disable_log_requests", kind="switch"),
        Flag(name="disable_frontend_multiprocessing", kind="switch"),
        Flag(name="enable_prompt_tokens_details", kind="switch"),
        Flag(name="disable_fastapi_docs", kind="switch"),
    ]


IGNORED = (
    "disable_log_requests",
    "disable_frontend_multiprocessing",
    "enable_prompt_tokens_details",
    "disable_fastapi_docs",
)
"""Switches of vLLM's server that change nothing, for things are as they ask for."""
