"""Threads follow affinity, cgroup quota and OMP_NUM_THREADS, not the number of cores."""

from __future__ import annotations

import os

import pytest
import torch

from quire.utils import threads
from quire.utils.threads import count_threads, cpu_quota


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """A machine of 8 usable CPUs."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)


def group(root, text, **files):
    (root / "proc/self").mkdir(parents=True, exist_ok=True)
    (root / "proc/self/cgroup").write_text(text)
    for name, content in files.items():
        path = root / "sys/fs/cgroup" / name.replace("__", "/").replace("_DOT_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)


def test_affinity_alone(tmp_path):
    assert cpu_quota(tmp_path) is None
    assert count_threads(tmp_path) == 8


@pytest.mark.parametrize(
    ("quota", "count"),
    [("200000 100000", 2), ("150000 100000", 2), ("10000 100000", 1), ("max 100000", 8)],
)
def test_version_2_quota(tmp_path, quota, count):
    """A part of a CPU counts as one; no quota is no limit."""
    group(tmp_path, "0::/a\n", a__cpu_DOT_max=quota)
    assert count_threads(tmp_path) == count


def test_the_tightest_level_binds(tmp_path):
    group(
        tmp_path,
        "0::/a/b\n",
        a__b__cpu_DOT_max="400000 100000",
        a__cpu_DOT_max="300000 100000",
        cpu_DOT_max="max 100000",
    )
    assert cpu_quota(tmp_path) == 3.0


@pytest.mark.parametrize(("quota", "count"), [("300000", 3), ("-1", 8)])
def test_version_1_quota(tmp_path, quota, count):
    group(
        tmp_path,
        "3:cpu,cpuacct:/\n",
        **{
            "cpu,cpuacct__cpu_DOT_cfs_quota_us": quota,
            "cpu,cpuacct__cpu_DOT_cfs_period_us": "100000",
        },
    )
    assert count_threads(tmp_path) == count


@pytest.mark.parametrize(("value", "count"), [("3", 3), ("5,2", 5), ("0", 8), ("many", 8), ("", 8)])
def test_omp_num_threads_wins_where_it_is_a_number(tmp_path, monkeypatch, value, count):
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    assert count_threads(tmp_path) == count


def test_torch_is_told_once_and_a_lower_number_of_the_programs_own_stays(monkeypatch):
    """A program that has limited torch itself keeps its limit, before an engine and after."""
    now = [6]
    monkeypatch.setattr(torch, "get_num_threads", lambda: now[0])
    monkeypatch.setattr(torch, "set_num_threads", lambda count: now.__setitem__(0, count))
    monkeypatch.setattr(threads, "_applied", False)
    assert threads.apply_thread_count() == 6  # of 8 usable CPUs
    monkeypatch.setattr(threads, "_applied", False)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert threads.apply_thread_count() == 2
    torch.set_num_threads(3)
    assert threads.apply_thread_count() == 3
