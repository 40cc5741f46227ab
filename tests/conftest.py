"""What every test stands on: no network, no foreign settings, repeatable property tests."""

from __future__ import annotations

import os
from pathlib import Path

import hypothesis
import pytest

# Read by libraries when they are imported, so before any test module is.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
if not Path("/dev/nvidia0").exists() and not Path("/dev/kfd").exists():
    os.environ["TRITON_INTERPRET"] = "1"  # its kernels are then run on the CPU, step by step
os.environ["LANGSMITH_TRACING"] = os.environ["LANGCHAIN_TRACING_V2"] = "false"
for _name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "VLLM_USE_MODELSCOPE", "QUIRE_LOG_LEVEL"):
    os.environ.pop(_name, None)

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
