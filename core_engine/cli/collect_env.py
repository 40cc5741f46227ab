"""``quire collect-env``: what a bug report should say of the machine and its software."""

from __future__ import annotations

import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import typer

from quire import __version__

PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "huggingface-hub",
    "numpy",
    "jinja2",
    "sentencepiece",
    "triton",
    "langchain-core",
    "langchain",
    "langchain-classic",
    "langchain-community",
    "outlines",
)
CPU_FEATURES = (
    "avx2",
    "avx512f",
    "avx512_bf16",
    "avx512_vnni",
    "amx_tile",
    "amx_bf16",
    "asimd",
    "asimdhp",
    "bf16",
    "i8mm",
    "sve",
)
VARIABLES = (
    "QUIRE_LOG_LEVEL",
    "QUIRE_REQUIRE_NATIVE",
    "OMP_NUM_THREADS",
    "HF_HOME",
    "HF_HUB_OFFLINE",
    "VLLM_USE_MODELSCOPE",
    "CUDA_VISIBLE_DEVICES",
    "HIP_VISIBLE_DEVICES",
)
SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")


def describe_environment() -> dict[str, Any]:
    """Return versions, processor, memory, devices and settings by name, without secrets.

    Returns
    -------
    dict
        Of strings, numbers, lists and dicts, as JSON has them.
    """
    return {
        "quire": __version__,
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "platform": platform.platform(),
        "packages": _packages(),
        "cpu": _cpu(),
        "memory": _memory(),
        "torch": _torch(),
        "variables": _variables(),
    }


def collect_env(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print what a bug report should say of this machine and its software."""
    facts = describe_environment()
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    for name, value in facts.items():
        if isinstance(value, dict):
            typer.echo(f"{name}:")
            for key, part in value.items():
                text = (" ".join(map(str, part)) or "none") if isinstance(part, list) else part
                typer.echo(f"  {key}: {text}")
        else:
            typer.echo(f"{name}: {value}")


def _packages() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def _cpu() -> dict[str, Any]:
    from quire.utils.threads import count_threads, cpu_quota

    fields = _cpuinfo()
    flags = set(fields.get("flags", fields.get("Features", "")).split())
    return {
        "model": fields.get("model name", platform.processor() or platform.machine()),
        "features": [feature for feature in CPU_FEATURES if feature in flags],
        "usable": len(os.sched_getaffinity(0)),
        "quota": cpu_quota(),
        "threads": count_threads(),
    }


def _cpuinfo() -> dict[str, str]:
    """Return the first processor's fields of /proc/cpuinfo."""
    fields: dict[str, str] = {}
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return fields
    for line in lines:
        name, colon, value = line.partition(":")
        if colon:
            fields.setdefault(name.strip(), value.strip())
    return fields


def _memory() -> dict[str, str]:
    from quire.utils.memory import available_memory, format_bytes

    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {"total": format_bytes(total), "available": format_bytes(available_memory())}


def _torch() -> dict[str, Any]:
    import torch

    from quire.kernels import available_backends
    from quire.kernels.attention.choice import usable_attention
    from quire.kernels.cpu.backend import why_missing
    from quire.kernels.cpu.library import load_library
    from quire.utils.device import device_names, found_accelerator

    missing = why_missing()
    return {
        "cuda build": torch.version.cuda or "none",
        "gpus": device_names(),
        "kernel backends": available_backends(),
        "attention backends": usable_attention(torch.device(found_accelerator() or "cpu")),
        "native kernels": missing or f"for {load_library().quire_isa().decode()}",
    }


def _variables() -> dict[str, str]:
    shown = {name: os.environ[name] for name in VARIABLES if name in os.environ}
    return shown | {name: "set" for name in SECRETS if os.environ.get(name)}
