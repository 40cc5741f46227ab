"""``quire bench quantization``: formats of weights side by side, and llama.cpp beside them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from quire.bench import gguf, report
from quire.bench.contest import Measurement
from quire.bench.formats import NAMES, Format, find_format
from quire.bench.options import (
    Checkpoint,
    Dtype,
    Json,
    Model,
    PeerEnv,
    PeerPython,
    Peers,
    Random,
    Seed,
    find_checkpoint,
)
from quire.bench.quantized_runs import (
    OF_LIMIT,
    RATE,
    STEP_BYTES,
    VS_BASE,
    Decoding,
    measure_decoding,
    measure_loading,
)
from quire.bench.record import Entry
from quire.bench.sides import quire_versions
from quire.bench.weight_bytes import layer_bytes
from quire.bench.workload import Workload, uniform
from quire.errors import QuireError
from quire.models.hf_config import max_length
from quire.utils.threads import count_threads

PARTS = ("decode", "load")
_USUAL = "plain,int8,w8a8,int4,int4-head,fp8,nf4,awq,gptq,ct-w4a16"
_PEER = "llama-cpp"
PAIRS = {"int8": "q8_0", "int4": "q4_0", "int4-head": "q4_0"}
"""Formats of a like number of bits: ours, and the type in llama.cpp's file."""


def quantization(
    model: Model = None,
    random: Random = "qwen2.5-0.5b",
    dtype: Dtype = "bfloat16",
    formats: Annotated[
        str, typer.Option(help=f"Some of {', '.join(NAMES)}; the first is what ratios are to.")
    ] = _USUAL,
    folder: Annotated[
        list[Path] | None,
        typer.Option(help="A quantized checkpoint to measure beside them; may be repeated."),
    ] = None,
    vs: Annotated[str, typer.Option(help=f"{_PEER}, or none.")] = _PEER,
    gguf_types: Annotated[
        str, typer.Option(help=f"Of llama-cpp's weights: {', '.join(gguf.KINDS)}, with commas.")
    ] = "q8_0,q4_0",
    parts: Annotated[
        str, typer.Option(help="What to measure, some of them with commas.")
    ] = ",".join(PARTS),
    batches: Annotated[str, typer.Option(help="Prompts at once, with commas.")] = "1,16,32",
    input_len: Annotated[int, typer.Option(min=1, help="Tokens of a prompt.")] = 32,
    output_len: Annotated[int, typer.Option(min=2, help="Tokens generated.")] = 64,
    seed: Seed = 0,
    peer_python: PeerPython = None,
    peer_env: PeerEnv = None,
    repeats: Annotated[int, typer.Option(min=1, help="Counted runs.")] = 5,
    json_file: Json = None,
) -> None:
    """Weights in fewer bits: tokens per second by format, beside memory's limit, and loads."""
    names = _some_of("--formats", formats, NAMES)
    wanted = _some_of("--parts", parts, PARTS)
    peers = Peers.parse(vs, peer_python, peer_env, None, dtype)
    if set(peers.names) - {_PEER}:
        raise typer.BadParameter(f"--vs {vs!r}: {_PEER}, or none")
    kinds = _some_of("--gguf-types", gguf_types, gguf.KINDS) if peers.names else []
    sizes = _numbers("--batches", batches)
    checkpoint = find_checkpoint(model, random, dtype)
    total, most = input_len + output_len, max_length(checkpoint.config)
    if total > most:
        raise typer.BadParameter(
            f"a prompt and its output have {total} tokens together, and {checkpoint.name} takes "
            f"{most}: lower --output-len"
        )
    typer.echo(f"{checkpoint.name}; {json.dumps(report.machine())}")
    try:
        chosen = [find_format(name, checkpoint.folder) for name in names]
        chosen += [Format(path.name, path) for path in folder or []]
        document: dict[str, Any] = {
            "model": checkpoint.name,
            "machine": report.machine(),
            "versions": quire_versions(),
            "formats": {f.name: {"folder": str(f.folder), **f.options} for f in chosen},
        }
        if "decode" in wanted:
            workloads = [
                uniform(n, input_len, output_len, vocab_size=checkpoint.vocab_size, seed=seed)
                for n in sizes
            ]
            others = _peer_entries(peers, checkpoint, kinds)
            document["decode"] = _decode(checkpoint, chosen, others, workloads, dtype, repeats)
        if "load" in wanted:
            document["load"] = _load(chosen, dtype, repeats)
    except QuireError as error:
        raise typer.BadParameter(str(error)) from error
    if json_file is not None:
        json_file.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def _some_of(option: str, text: str, known: Sequence[str]) -> list[str]:
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    for name in names:
        if name not in known:
            raise typer.BadParameter(f"{option} {name!r}: some of {', '.join(known)}")
    if not names:
        raise typer.BadParameter(f"{option} {text!r}: some of {', '.join(known)}")
    return names


def _numbers(option: str, text: str) -> list[int]:
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words or not all(word.isdecimal() and int(word) for word in words):
        raise typer.BadParameter(f"{option} {text!r}: numbers from 1 on, with commas between")
    return sorted({int(word) for word in words})


def _peer_entries(
    peers: Peers, checkpoint: Checkpoint, kinds: list[str]
) -> dict[str, tuple[Entry, int]]:
    """Return llama.cpp's sides by type, with the bytes that each reads; none if it is not there."""
    if not peers.names:
        return {}
    python = peers.pythons[_PEER]
    find = "import importlib.util as u, sys; sys.exit(u.find_spec('llama_cpp') is None)"
    if subprocess.run([python, "-c", find], check=False).returncode != 0:
        typer.echo(f"{_PEER} is left out: {python} has no llama-cpp-python (see --peer-python)")
        return {}
    made = {}
    for kind in kinds:
        [entry] = replace(peers, gguf_type=kind).entries(checkpoint, kind)
        made[kind] = entry, gguf.step_bytes(checkpoint.folder, kind)
    return made


def _decode(
    checkpoint: Checkpoint,
    formats: list[Format],
    peers: dict[str, tuple[Entry, int]],
    workloads: list[Workload],
    dtype: str,
    repeats: int,
) -> dict[str, Any]:
    """Measure, print the tables, and return the figures."""
    longest = max(
        len(prompt) + n
        for work in workloads
        for prompt, n in zip(work.prompts, work.output_lens, strict=True)
    )
    common = {
        "dtype": dtype,
        "max_model_len": longest,
        "max_num_seqs": max(len(work.prompts) for work in workloads),
    }
    entries = [
        Entry(f.name, "quire", str(f.folder), {**common, **f.options}, sys.executable)
        for f in formats
    ]
    entries += [entry for entry, _ in peers.values()]
    done, versions = measure_decoding(
        entries,
        workloads,
        known_bytes={entry.label: num_bytes for entry, num_bytes in peers.values()},
        repeats=repeats,
        num_threads=count_threads(),
        say=typer.echo,
    )
    for each in done:
        typer.echo(f"\n{each.workload.name}\n{decode_table(each)}")
        for line in peer_lines(each, {kind: entry.label for kind, (entry, _) in peers.items()}):
            typer.echo(line)
    bandwidth = Measurement("", {"read": [rate for each in done for rate in each.bandwidth]})
    typer.echo(f"\nmemory, GB/s read: {report.spread(bandwidth, 'read', 1, 1e-9)}")
    return {
        "sides": {
            entry.label: {"versions": version, "options": entry.options, "model": entry.model}
            for entry, version in zip(entries, versions, strict=True)
        },
        "workloads": {
            each.workload.name: {
                "bytes_per_second": each.bandwidth,
                "runs": {measured.label: measured.runs for measured in each.measurements},
            }
            for each in done
        },
    }


def decode_table(done: Decoding) -> str:
    """Return a workload's table: a row for each side."""
    base = done.measurements[0].label
    rows = [["weights", "MB per step", "decode tok/s: median (range)", f"vs {base}"]]
    is_alone = len(done.workload.prompts) == 1
    if is_alone:
        rows[0].append("of memory's limit")
    for measured in done.measurements:
        row = [
            measured.label,
            f"{measured.median(STEP_BYTES) / 1e6:.1f}" if STEP_BYTES in measured.runs else "-",
            report.spread(measured, RATE, 1),
            report.spread(measured, VS_BASE),
        ]
        if is_alone:
            row.append(report.spread(measured, OF_LIMIT, 0, 100.0))
        rows.append(row)
    if is_alone:
        rows[0][-1] += ", %"
    return report.table(rows)


def peer_lines(done: Decoding, labels: dict[str, str]) -> list[str]:
    """Say how formats compare with llama.cpp's of as many bits, each turn with itself.

    Parameters
    ----------
    done : Decoding
    labels : dict of str to str
        By the type of llama.cpp's weights, what its side is called.
    """
    sides = {each.label: each for each in done.measurements}
    lines = []
    for ours, kind in PAIRS.items():
        if ours not in sides or kind not in labels:
            continue
        other = sides[labels[kind]].runs[RATE]
        ratios = [a / b for a, b in zip(sides[ours].runs[RATE], other, strict=True)]
        told = report.spread(Measurement("", {"ratio": ratios}), "ratio")
        lines.append(f"{ours} vs {labels[kind]}: {told}")
    return lines


def _load(formats: list[Format], dtype: str, repeats: int) -> dict[str, Any]:
    """Measure, print the table, and return the figures."""
    done = measure_loading(formats, dtype, repeats=repeats, say=typer.echo)
    layers = [layer_bytes(each.folder) for each in formats]
    typer.echo("\nload: files that the operating system has in memory\n" + load_table(done, layers))
    return {
        each.label: {"layer_bytes": layer, "runs": each.runs}
        for each, layer in zip(done, layers, strict=True)
    }


def load_table(done: Sequence[Measurement], layers: Sequence[int]) -> str:
    """Return the table of loads.

    Parameters
    ----------
    done : sequence of Measurement
    layers : sequence of int
        The bytes of a layer as each folder stores it: what may be in memory besides the weights.
    """
    rows = [["weights", "load, s", "weights, MB", "peak, MB", "peak over weights, of a layer"]]
    for measured, layer in zip(done, layers, strict=True):
        held = measured.median("weight_bytes")
        over = "-"
        if "peak_bytes" in measured.runs and layer:
            over = f"{(measured.median('peak_bytes') - held) / layer:.2f}"
        rows.append(
            [
                measured.label,
                report.spread(measured, "load_seconds"),
                f"{held / 1e6:.1f}",
                report.spread(measured, "peak_bytes", 1, 1e-6),
                over,
            ]
        )
    return report.table(rows)
