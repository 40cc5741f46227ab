"""Triton's attention compiles for GPUs that are not here."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="triton is in the extra 'gpu'")

_COMPILE = """
import itertools

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from quire.kernels.triton.attention_kernel import attend, merge_parts
from quire.kernels.triton.attention_plan import LayerKind
from quire.kernels.triton.attention_tiles import choose_tiles
from quire.kernels.triton.kv_cache_kernel import write_rows

MEMORY = {80: 163 * 1024, 90: 227 * 1024}
ADDRESSES = ("query", "key_cache", "value_cache", "key_scales", "value_scales", "out")
STRIDES = ("query_stride", "query_head_stride", "block_stride")


def build(kernel, capability, pointers, numbers, constants, **options):
    signature = dict(pointers)
    signature |= {name: "fp32" if name in ("factor", "cap") else "i32" for name in numbers}
    signature |= dict.fromkeys(constants, "constexpr")
    names = list(signature)
    aligned = [(names.index(name),) for name in (*ADDRESSES, *STRIDES) if name in names]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs=constants,
        attrs={place: [["tt.divisibility", 16]] for place in aligned},
    )
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options=options)


for capability, (cache, dtype), (dim, window) in itertools.product(
    (80, 90),
    (("bf16", "bf16"), ("fp16", "fp16"), ("i8", "bf16"), ("u8", "fp16"), ("fp32", "fp32")),
    ((64, True), (80, False), (128, False), (256, True)),
):
    kind = {"i8": "int8", "u8": "fp8"}.get(cache, "float")
    heads = {"KV_HEADS": 8, "SHARED_BY": 4}
    width = LayerKind(8, 4, dim, 2, False, None).width
    itemsize = 4 if dtype == "fp32" else 2
    row_width = dim if kind == "float" else dim + 4
    parts = dict.fromkeys(("part_values", "part_highest", "part_total"), "*fp32")
    for tiles in choose_tiles(width, itemsize, kind != "float", MEMORY[capability]):
        tile = {"HEADS": 4, "SHARES": 1, "KEPT_ROWS": tiles.rows, "DIM": dim, "WIDTH": width}
        built = build(
            attend,
            capability,
            {
                "query": f"*{dtype}",
                **dict.fromkeys(("key_cache", "value_cache"), f"*{cache}"),
                **dict.fromkeys(("key_scales", "value_scales", "slopes"), "*fp32"),
                "out": f"*{dtype}",
                **parts,
                **dict.fromkeys(("block_tables", "items"), "*i32"),
            },
            ("num_items", "table_stride", *STRIDES, "factor", "cap", "window"),
            {
                "KIND": kind,
                "FOLDS": kind == "float" and not window,
                "HAS_WINDOW": window,
                "HAS_CAP": window,
                "HAS_SLOPES": window,
                "BLOCK_SIZE": 16,
                "ROW_WIDTH": row_width,
                **heads,
                **tile,
                "ROWS": tiles.rows,
                "KEYS": tiles.keys,
            },
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
        )
        case = (capability, cache, dim, tiles, built.metadata.shared)
        assert "mma" in built.asm["ptx"] or dtype == "fp32", case
        assert "cp.async" in built.asm["ptx"], case
        assert built.metadata.shared <= MEMORY[capability], case
    build(
        merge_parts,
        capability,
        {"out": f"*{dtype}", **parts, "merges": "*i32"},
        ("num_merges",),
        {**heads, **tile, "PARTS": 8},
    )
    strides = ("key", "key_head", "value", "value_head", "key_block", "value_block")
    build(
        write_rows,
        capability,
        {
            **dict.fromkeys(("key", "value"), f"*{dtype}"),
            "key_cache": f"*{dtype}" if kind == "float" else "*u8",
            "value_cache": f"*{dtype}" if kind == "float" else "*u8",
            "slots": "*i64",
        },
        ("num_rows", *(f"{name}_stride" for name in strides)),
        {
            "KIND": kind,
            "BLOCK_SIZE": 16,
            "KV_HEADS": 8,
            "ROW_WIDTH": row_width,
            "DIM": dim,
            "WIDTH": width,
            "ROWS": 16,
        },
    )
    print(capability, cache, dim, window, flush=True)
"""


@pytest.mark.slow
def test_attention_compiles_for_gpus_that_are_not_here(tmp_path):
    """For two generations, of all types and tiles: by tensor cores, in their memory."""
    environ = {
        **os.environ,
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(tmp_path),
        "PYTHONWARNINGS": "ignore",
    }
    done = subprocess.run(
        [sys.executable, "-c", _COMPILE], env=environ, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(done.stdout.splitlines()) == 40
