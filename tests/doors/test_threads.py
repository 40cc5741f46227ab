"""Threads follow affinity, cgroup quota and OMP_NUM_THREADS, not the number of cores."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

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
    ("quota", "threads"),
    [("200000 100000", 2), ("150000 100000", 2), ("10000 100000", 1), ("max 100000", 8)],
)
def test_version_2_quota(tmp_path, quota, threads):
    """A part of a CPU counts as one; no quota is no limit."""
    group(tmp_path, "0::/a\n", a__cpu_DOT_max=quota)
    assert count_threads(tmp_path) == threads


def test_the_tightest_level_binds(tmp_path):
    group(
        tmp_path,
        "0::/a/b\n",
        a__b__cpu_DOT_max="400000 100000",
        a__cpu_DOT_max="300000 100000",
        cpu_DOT_max="max 100000",
    )
    assert cpu_quota(tmp_path) == 3.0


@pytest.mark.parametrize(("quota", "threads"), [("300000", 3), ("-1", 8)])
def test_version_1_quota(tmp_path, quota, threads):
    group(
        tmp_path,
        "3:cpu,cpuacct:/\n",
        **{
            "cpu,cpuacct__cpu_DOT_cfs_quota_us": quota,
            "cpu,cpuacct__cpu_DOT_cfs_period_us": "100000",
        },
    )
    assert count_threads(tmp_path) == threads


@pytest.mark.parametrize(
    ("value", "threads"), [("3", 3), ("5,2", 5), ("0", 8), ("many", 8), ("", 8)]
)
def test_omp_num_threads_wins_where_it_is_a_number(tmp_path, monkeypatch, value, threads):
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    assert count_threads(tmp_path) == threads


def test_torch_is_told_once_and_a_lower_number_of_the_programs_own_stays():
    """A program that has limited torch itself keeps its limit, before an engine and after."""
    code = (
        "import os, torch\n"
        "from quire.utils import threads\n"
        "torch.set_num_threads(2)\n"
        "threads.count_threads = lambda: 4\n"
        "assert threads.apply_thread_count() == 2\n"
        "threads._applied = False\n"
        "threads.count_threads = lambda: 1\n"
        "assert threads.apply_thread_count() == 1\n"
        "torch.set_num_threads(3)\n"
        "assert threads.apply_thread_count() == 3\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
