"""A Ray Serve application: ``serve run quire.server.ray_app:build model=quire/demo``."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from quire.config import EngineConfig, checks
from quire.errors import ConfigError
from quire.executor.ray_cluster import check_ray
from quire.server.command_line import CommandLine
from quire.server.config_file import to_words
from quire.server.plan import Plan, make_plan

if TYPE_CHECKING:
    from ray.serve import Application

_OF_RAY = frozenset(
    {
        "host", "port", "uds", "header_timeout", "keep_alive_timeout", "max_header_bytes",
        "max_connections", "drain_timeout", "ssl_keyfile", "ssl_certfile", "ssl_ca_certs",
        "ssl_cert_reqs", "ssl_ciphers", "ssl_keyfile_password", "config",
    }
)  # fmt: skip
"""Arguments of ``quire serve`` about connections, which are Ray Serve's here."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How many replicas there are, what each takes, and how Ray Serve treats them.

    Attributes
    ----------
    num_replicas : int
        As many at all times, unless `max_replicas` is given.
    min_replicas, initial_replicas, max_replicas : int or None
        Let Ray Serve start and end replicas by the number of requests that each has.
    target_ongoing_requests : int
        Of each replica, by which it does.
    max_ongoing_requests : int
        Of a replica, beyond which requests wait at the front.
    cpus_per_rank, gpus_per_rank : float or None
        What each process of a replica takes of a machine; GPUs None: one, where the device is one.
    health_check_period_s, health_check_timeout_s : float
        Of ``/health``; a replica that does not answer is replaced.
    graceful_shutdown_timeout_s : float
        That running requests have before a replica ends.
    num_fronts : int
        Processes that take requests for the replicas.
    prefix_slack : int
        Requests that a replica may have more than another because their prompts begin alike.
    """

    num_replicas: int = 1
    min_replicas: int | None = None
    initial_replicas: int | None = None
    max_replicas: int | None = None
    target_ongoing_requests: int = 32
    max_ongoing_requests: int = 256
    cpus_per_rank: float = 1
    gpus_per_rank: float | None = None
    health_check_period_s: float = 10
    health_check_timeout_s: float = 30
    graceful_shutdown_timeout_s: float = 30
    num_fronts: int = 1
    prefix_slack: int = 8

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if value is None:
                continue
            if "int" in str(each.type):
                least = 0 if each.name in ("prefix_slack", "min_replicas") else 1
                checks.integer(least, 10**6)(each.name, value)
            else:
                checks.number(0, 10**6)(each.name, value)
        beside = [self.min_replicas, self.initial_replicas]
        if self.max_replicas is None and any(each is not None for each in beside):
            raise ConfigError("min_replicas and initial_replicas need max_replicas beside them")

    @classmethod
    def take(cls, values: dict[str, Any]) -> Scale:
        """Take own values out of what was given; texts, as a command line has them, are read."""
        found = {}
        for each in fields(cls):
            if each.name not in values:
                continue
            value = values.pop(each.name)
            if isinstance(value, str):
                try:
                    value = int(value) if "int" in str(each.type) else float(value)
                except ValueError:
                    raise checks.refuse(each.name, value, "a number") from None
            found[each.name] = value
        return cls(**found)

    def of_replicas(self) -> dict[str, Any]:
        """Return the options of a deployment that say how many replicas it has."""
        if self.max_replicas is None:
            return {"num_replicas": self.num_replicas}
        least = 1 if self.min_replicas is None else self.min_replicas
        scaling: dict[str, Any] = {
            "min_replicas": least,
            "max_replicas": self.max_replicas,
            "target_ongoing_requests": self.target_ongoing_requests,
        }
        if self.initial_replicas is not None:
            scaling["initial_replicas"] = self.initial_replicas
        return {"autoscaling_config": scaling}


class Replica:
    """One engine, and the HTTP application over it.

    Parameters
    ----------
    given : dict
        Values by the names of the flags of ``quire serve``.
    """

    def __init__(self, given: dict[str, Any]) -> None:
        from quire.async_llm import AsyncLLM
        from quire.server.logs import set_up_logs

        plan = make_plan(given)
        set_up_logs(plan.log_level, plan.uvicorn_log_level)
        self._plan = plan
        self._llm = AsyncLLM(**plan.engine_args)
        self._app: Any = None
        self._making = asyncio.Lock()

    async def answer(self, asked: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """Answer a request of a front, by ASGI's messages."""
        from quire.server.ray_front import run_app

        async for message in run_app(await self._application(), asked):
            yield message

    async def _application(self) -> Any:
        from quire.server.app import build_app
        from quire.server.service import Service

        async with self._making:
            if self._app is None:
                tokenizer = await self._llm.get_tokenizer()
                self._app = build_app(Service(self._llm, self._plan.settings, tokenizer))
        return self._app

    async def check_health(self) -> None:
        """Raise where ``/health`` would be 503; Ray Serve then replaces this replica."""
        await self._llm.check_health()

    def __del__(self) -> None:
        llm = getattr(self, "_llm", None)
        if llm is not None:
            llm.close()


def build(args: Mapping[str, Any]) -> Application:
    """Return the application; ``serve run`` and a Serve config file name it ``...:build``.

    Parameters
    ----------
    args
        The arguments of ``quire serve`` by name, and those of `Scale`.

    Raises
    ------
    ConfigError
        One of them is wrong, or Ray Serve's own.
    """
    check_ray("quire.server.ray_app")
    from ray import serve
    from ray.serve.config import RequestRouterConfig

    values = {name.replace("-", "_"): value for name, value in args.items()}
    scale = Scale.take(values)
    given, plan = _plan(values)
    config = EngineConfig.create(**plan.engine_args)
    replica = serve.deployment(
        Replica,
        name="Replica",
        max_ongoing_requests=scale.max_ongoing_requests,
        health_check_period_s=scale.health_check_period_s,
        health_check_timeout_s=scale.health_check_timeout_s,
        graceful_shutdown_timeout_s=scale.graceful_shutdown_timeout_s,
        request_router_config=RequestRouterConfig(
            request_router_class="quire.server.ray_router:PrefixRouter",
            request_router_kwargs={"slack": scale.prefix_slack},
        ),
        **scale.of_replicas(),
        **_takes(config, scale),
    )
    front = serve.deployment(
        serve.ingress()(_FrontDeployment),
        name="Front",
        num_replicas=scale.num_fronts,
        max_ongoing_requests=100_000,
        ray_actor_options={"num_cpus": 0},
    )
    return front.bind(replica.bind(given), plan.settings.max_body_bytes)


class _FrontDeployment:
    """Makes the front where it runs, since its way to the replicas is known there."""

    def __init__(self, replicas: Any, max_body_bytes: int) -> None:
        self._arguments = (replicas, max_body_bytes)

    def __serve_build_asgi_app__(self) -> Any:
        from quire.server.ray_front import Front

        return Front(*self._arguments)


def _plan(values: dict[str, Any]) -> tuple[dict[str, Any], Plan]:
    """Return arguments of ``quire serve``, checked, and the plan of a replica that they make."""
    for name in values:
        if name in _OF_RAY:
            raise ConfigError(
                f"{name} is about connections, which Ray Serve has: see its http_options, or "
                "`serve run --help`"
            )
    line = CommandLine("quire.server.ray_app:build")
    words = to_words("the application's arguments", _read_texts(values), line.flags)
    try:
        given = line.read(words)
    except SystemExit:
        raise ConfigError("the application's arguments are wrong: see above") from None
    if given.get("allow_runtime_lora_updating"):
        raise ConfigError(
            "allow_runtime_lora_updating loads adapters into one replica of several: name them by "
            "lora_modules"
        )
    if given.pop("data_parallel_size", 1) != 1:
        raise ConfigError("data_parallel_size is num_replicas here: give that")
    plan = make_plan(given)
    if plan.settings.api_keys:
        given["api_key"] = list(plan.settings.api_keys)  # also where those of this shell are not
    if EngineConfig.create(**plan.engine_args).parallel.num_ranks > 1:
        given.setdefault("distributed_executor_backend", "ray")
    return given, make_plan(given)


def _read_texts(values: dict[str, Any]) -> dict[str, Any]:
    """Return values with switches as such, which a command line has as texts."""
    words = {"true": True, "false": False}
    return {
        name: words.get(value.lower(), value) if isinstance(value, str) else value
        for name, value in values.items()
    }


def _takes(config: EngineConfig, scale: Scale) -> dict[str, Any]:
    """Return the options of a deployment that say what each replica takes of the cluster."""
    each = {"CPU": scale.cpus_per_rank}
    gpus = scale.gpus_per_rank
    if gpus is None:
        gpus = 1 if _wants_gpu(config.device) else 0
    if gpus:
        each["GPU"] = gpus
    num_ranks = config.parallel.num_ranks
    own = {"num_cpus": each["CPU"], "num_gpus": each.get("GPU", 0)}
    if config.parallel.backend == "ray" and num_ranks > 1:
        # The first is the replica's own; see quire.executor.ray_cluster.Bundles.
        bundles = [each] * num_ranks
        return {
            "ray_actor_options": own,
            "placement_group_bundles": bundles,
            "placement_group_strategy": "PACK",
        }
    return {"ray_actor_options": {name: count * num_ranks for name, count in own.items()}}


def _wants_gpu(device: str) -> bool:
    if device != "auto":
        return not device.startswith("cpu")
    import ray

    return bool(ray.is_initialized() and ray.cluster_resources().get("GPU", 0) >= 1)
