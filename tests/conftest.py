"""What every test stands on: no network, no foreign settings, repeatable property tests."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import hypothesis
import pytest

# Read by libraries when they are imported, so before any test module is.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
if not Path("/dev/nvidia0").exists() and not Path("/dev/kfd").exists():
    os.environ["TRITON_INTERPRET"] = "1"  # its kernels are then run on the CPU, step by step
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # its default, of which Triton 3.9 warns
os.environ["LANGSMITH_TRACING"] = os.environ["LANGCHAIN_TRACING_V2"] = "false"
for _name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "VLLM_USE_MODELSCOPE", "QUIRE_LOG_LEVEL"):
    os.environ.pop(_name, None)
if _workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    # Each process of `pytest -n`, and what it starts, computes with its share of the cores.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(len(os.sched_getaffinity(0)) // _workers, 1)))

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # Tests that run in a shell's background: what they start is to hear Ctrl-C all the same.
    signal.signal(signal.SIGINT, signal.default_int_handler)

pytest_plugins = [
    "browser",
    "checkpoints",
    "fake_openai",
    "isas",
    "servers",
]  # tests/helpers is on the path: see pyproject.toml

# A failure in the fast suite must repeat on the next run; the slow suite looks further each time.
_COMMON = {
    "deadline": None,  # the machine may be busy
    "suppress_health_check": [
        hypothesis.HealthCheck.too_slow,
        hypothesis.HealthCheck.function_scoped_fixture,
    ],
}
hypothesis.settings.register_profile("fast", derandomize=True, max_examples=50, **_COMMON)
hypothesis.settings.register_profile("slow", max_examples=1000, print_blob=True, **_COMMON)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fast"))


@pytest.fixture(scope="session")
def repo_root() -> Path:
    """Return the repository's top folder."""
    return Path(__file__).resolve().parents[1]
