"""``quire serve --data-parallel-backend ray``: a Ray Serve application, until told to end."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Mapping
from typing import Any

from quire.config import EngineConfig
from quire.errors import ConfigError
from quire.executor.ray_cluster import RayCluster, check_ray
from quire.server.plan import make_plan
from quire.server.settings import Listening
from quire.server.sockets import is_local
from quire.utils.threads import count_threads

logger = logging.getLogger("quire")

NAME = "quire"
"""Of the application, of which a cluster has one."""

_HERE = (
    "host", "port", "drain_timeout", "keep_alive_timeout", "data_parallel_backend",
    "data_parallel_size",
)  # fmt: skip
_REFUSED = (
    "uds", "header_timeout", "max_header_bytes", "max_connections", "ssl_keyfile", "ssl_certfile",
    "ssl_ca_certs", "ssl_cert_reqs", "ssl_ciphers", "ssl_keyfile_password",
)  # fmt: skip


def launch_on_ray(given: Mapping[str, Any]) -> int:
    """Serve replicas until the process is told to end, and return the exit code.

    Parameters
    ----------
    given : mapping
        Values by the names of flags.

    Raises
    ------
    QuireError
        What keeps the server from starting.
    """
    check_ray("data_parallel_backend='ray'")
    for name in _REFUSED:
        if name in given:
            raise ConfigError(
                f"{name} is not offered with data_parallel_backend='ray', where Ray Serve listens"
            )
    plan = make_plan({**given, "data_parallel_size": 1})  # before anything is started
    from quire.server.logs import set_up_logs

    set_up_logs(plan.log_level, plan.uvicorn_log_level)
    cluster = RayCluster("data_parallel_backend='ray'")
    try:
        num_ranks = EngineConfig.create(**plan.engine_args).parallel.num_ranks
        replicas = given.get("data_parallel_size", 1)
        cpus = cluster.share_of_cpus(count_threads(), replicas * num_ranks)
        values = {**given, "num_replicas": replicas, "cpus_per_rank": cpus}
        return _serve(values, plan.listening, bool(plan.settings.api_keys))
    finally:
        cluster.close()


def _serve(values: dict[str, Any], listening: Listening, has_keys: bool) -> int:
    from ray import serve
    from ray.serve.schema import ApplicationStatus

    from quire.server.ray_app import build

    values["graceful_shutdown_timeout_s"] = listening.drain_timeout
    for name in _HERE:
        values.pop(name, None)
    application = build(values)
    others = set(serve.status().applications)
    if NAME in others:
        raise ConfigError(
            f"the Ray cluster serves an application called {NAME!r} already: end that one, or "
            "describe both in a file for `serve deploy`"
        )
    serve.start(
        http_options={
            "host": listening.host,
            "port": listening.port,
            "keep_alive_timeout_s": listening.keep_alive_timeout,
        }
    )
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    code = 0
    try:
        serve.run(application, name=NAME, route_prefix="/")
        address = f"http://{listening.host}:{listening.port}"
        logger.info("quire is running on %s by Ray Serve (Ctrl-C ends it)", address)
        if not is_local(listening) and not has_keys:
            logger.warning("anybody who reaches %s may use it: there is no --api-key", address)
        while not ended.wait(1.0):
            status = serve.status().applications[NAME].status
            if status == ApplicationStatus.DEPLOY_FAILED:
                logger.critical("Ray Serve could not keep the application up, and it ends")
                code = 1
                break
    finally:
        serve.delete(NAME)
        if not others:
            serve.shutdown()
    logger.info("the server has ended")
    return code
