"""EngineArgs of the stand-in, as scripts write, read and parse them."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from typing import Any

import pytest

from quire.integrations.vllm.engine_args import EngineArgs, FlexibleArgumentParser, as_quire


# What vLLM's own defaults are, where they are neither None nor False: scripts pass them on.
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("all2all_backend", "allgather_reducescatter"),
        ("cpu_offload_params", set()),
        ("data_parallel_multi_port_external_lb", False),
        ("dbo_decode_token_threshold", 32),
        ("dbo_prefill_token_threshold", 512),
        ("dp_sync_interval", 16),
        ("gdn_prefill_backend", None),
        ("kda_decode_backend", None),
        ("kda_prefill_backend", None),
        ("kv_offloading_backend", "native"),
        ("mamba_cache_philox_rounds", 0),
        ("master_addr", "127.0.0.1"),
        ("master_port", 29501),
        ("mm_device_do_normalize", True),
        ("mm_encoder_fp8_scale_path", None),
        ("mm_encoder_fp8_scale_save_margin", 1.5),
        ("mm_encoder_fp8_scale_save_path", None),
        ("mm_ipc_gpu_memory_gb", 0),
        ("mm_tensor_ipc", "direct_rpc"),
        ("replayssm_buffer_len", 16),
        ("sparse_indexer_topk_backend", "auto"),
        ("swa_bounded_replay", True),
        ("use_fp64_gumbel", False),
        ("video_pruning_method", "evs"),
    ],
)
def test_defaults_of_vllm_ask_for_nothing(name: str, value: Any) -> None:
    assert as_quire({name: value}) == {}


def test_arguments_are_attributes_and_a_dataclass() -> None:
    args = EngineArgs("m", max_model_len=64)
    args.max_model_len = 99
    args.seed = 3
    assert vars(args) == dataclasses.asdict(args) == args.arguments()
    assert args.arguments() == {"model": "m", "max_model_len": 99, "seed": 3}
    assert dataclasses.replace(args, seed=4).arguments()["seed"] == 4
    assert dataclasses.is_dataclass(EngineArgs)
    assert {"max_model_len", "moe_backend"} <= {
        each.name for each in dataclasses.fields(EngineArgs)
    }
    assert args.tensor_parallel_size == 1
    with pytest.raises(TypeError, match="max_model_len"):
        args.max_model_lenn = 5
    for copied in (copy.deepcopy(args), pickle.loads(pickle.dumps(args))):
        assert copied == args
        assert copied != EngineArgs("m")


def test_switches_leave_what_follows_to_the_script() -> None:
    parser = FlexibleArgumentParser()
    parser.add_argument("file")
    EngineArgs.add_cli_args(parser)
    words = ["--enforce-eager", "--no-enable-prefix-caching", "--trust_remote_code", "input.txt"]
    found = parser.parse_args(words)
    assert found.file == "input.txt"
    arguments = EngineArgs.from_cli_args(found).arguments()
    assert arguments.pop("model") == "quire/demo"
    assert arguments == {
        "enforce_eager": True,
        "enable_prefix_caching": False,
        "trust_remote_code": True,
    }
