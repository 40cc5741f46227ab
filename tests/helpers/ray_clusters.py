"""Ray clusters of two nodes on this machine."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

WHY = "ray is not installed"


@contextmanager
def two_nodes(cpus: int, **of_head: Any) -> Iterator[str]:
    """Run a cluster of two nodes, connected to; its address."""
    ray = pytest.importorskip("ray", reason=WHY)
    cluster_utils = pytest.importorskip("ray.cluster_utils", reason=WHY)
    common = {"num_cpus": cpus, "object_store_memory": 100 * 2**20}
    with warnings.catch_warnings(), _no_telemetry():
        warnings.simplefilter("ignore")  # of Ray's start, about its own future
        cluster = cluster_utils.Cluster(
            initialize_head=True,
            head_node_args={**common, "include_dashboard": False, **of_head},
        )
        try:
            cluster.add_node(**common)
            cluster.wait_for_nodes()
            ray.init(address=cluster.address, logging_level="warning")
            yield cluster.address
        finally:
            ray.shutdown()
            cluster.shutdown()


@contextmanager
def _no_telemetry() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.delenv("RAY_ADDRESS", raising=False)
        yield


def actor_pids(kind: str) -> list[int]:
    """Return the processes of a kind of actor that this process's Ray runs."""
    found = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdecimal():
            continue
        try:
            title = (folder / "cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if title.startswith(f"ray::{kind}") and os.getpid() in _ancestors(int(folder.name)):
            found.append(int(folder.name))
    return sorted(found)


def _ancestors(pid: int) -> Iterator[int]:
    while pid > 1:
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
        except OSError:
            return
        pid = int(stat.rpartition(")")[2].split()[1])
        yield pid


def wait_until(condition: Any, seconds: float) -> None:
    """Wait for something to be so."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.05)
