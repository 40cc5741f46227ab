"""ServerSettings and Listening: what a server is told besides the engine's arguments."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """How a server behaves.

    Attributes
    ----------
    served_model_names : tuple of str
        The names that clients may ask for; the first one stands in answers.
    api_keys : tuple of str
        Of which a client has to send one; none are asked for where it is empty.
    chat_template : str or None
        A template, instead of the model's own.
    trust_request_chat_template : bool
        Take templates that come with requests: a template is a program, which may hold up the
        server and fill its memory.
    tool_call_parser, reasoning_parser : str or None
        How answers are read; None guesses by the model's chat template.
    strict_fields : bool
        Refuse a request with a field that nobody knows; otherwise a header of the answer names it.
    root_path : str
        What a proxy in front puts before every path.
    allowed_origins, allowed_methods, allowed_headers : tuple of str
        What pages of other origins may do (CORS); nothing where there are no origins.
    allow_credentials : bool
        Whether such pages may send cookies.
    max_body_bytes : int
        Longest body of a request; a longer one is not read.
    body_timeout : float
        Most seconds in which a body has to arrive.
    request_timeout : float or None
        Most seconds of a request, from its first line to the last byte of its answer.
    retry_after : float
        Seconds after which a client is asked to come again when the server shuts down.
    open_metrics : bool
        Serve ``/metrics`` without a key.
    metrics_prefix : str
        Stands before the name of every metric of the engine.
    page : bool
        Serve the web page at ``/``.
    access_log : bool
        Write a line for each request.
    log_prompts : bool
        Write prompts and parameters, too.
    allow_runtime_lora_updating : bool
        Let clients load and unload adapters.
    allowed_lora_dirs : tuple of str
        The directories from which they may load them.
    """

    served_model_names: tuple[str, ...]
    api_keys: tuple[str, ...] = ()
    chat_template: str | None = None
    trust_request_chat_template: bool = False
    tool_call_parser: str | None = None
    reasoning_parser: str | None = None
    strict_fields: bool = False
    root_path: str = ""
    allowed_origins: tuple[str, ...] = ()
    allowed_methods: tuple[str, ...] = ("*",)
    allowed_headers: tuple[str, ...] = ("*",)
    allow_credentials: bool = False
    max_body_bytes: int = 32 * 2**20
    body_timeout: float = 60.0
    request_timeout: float | None = None
    retry_after: float = 5.0
    open_metrics: bool = False
    metrics_prefix: str = "quire:"
    page: bool = True
    access_log: bool = False
    log_prompts: bool = False
    allow_runtime_lora_updating: bool = False
    allowed_lora_dirs: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Listening:
    """Where a server listens, and what it bears from those who connect.

    Attributes
    ----------
    host : str
    port : int
        0 takes a free one.
    uds : str or None
        The path of a Unix socket, instead of host and port.
    ssl_keyfile, ssl_certfile, ssl_ca_certs, ssl_ciphers, ssl_keyfile_password : str or None
        Files in PEM, and OpenSSL's words for ciphers; with a certificate the server speaks HTTPS.
    ssl_cert_reqs : int
        Whether clients show a certificate: 0 no, 1 if they like, 2 they have to.
    header_timeout : float
        Most seconds in which the head of a request has to arrive.
    keep_alive_timeout : int
        Seconds that an idle connection stays open.
    max_header_bytes : int
        Longest head of a request.
    max_connections : int
        Connections at once; one more is told that the server is busy.
    drain_timeout : float
        Seconds that running requests have to finish when the process is asked to end.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    uds: str | None = None
    ssl_keyfile: str | None = None
    ssl_certfile: str | None = None
    ssl_ca_certs: str | None = None
    ssl_cert_reqs: int = 0
    ssl_ciphers: str | None = None
    ssl_keyfile_password: str | None = None
    header_timeout: float = 10.0
    keep_alive_timeout: int = 30
    max_header_bytes: int = 64 * 2**10
    max_connections: int = 4096
    drain_timeout: float = 30.0
