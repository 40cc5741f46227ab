"""EngineConfig: every argument is honoured, refused, or known to have no effect; none is lost."""

from __future__ import annotations

import dataclasses
import inspect
import subprocess
import sys
from pathlib import Path
from typing import get_type_hints

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quire import LLM, AsyncLLM, LogitsProcessor, LoRARequest
from quire.arguments import EngineArguments
from quire.config import (
    NO_EFFECT,
    NOT_OFFERED,
    CacheConfig,
    EngineConfig,
    LoRAConfig,
    ModelConfig,
    ParallelConfig,
    SchedulerConfig,
    StructuredOutputsConfig,
    argument_names,
)
from quire.errors import ConfigError, NotSupportedError

PARTS = (
    ModelConfig,
    CacheConfig,
    SchedulerConfig,
    StructuredOutputsConfig,
    LoRAConfig,
    ParallelConfig,
)

FIELDS = [spec.name for part in PARTS for spec in dataclasses.fields(part)] + [
    "seed",
    "device",
    "batch_invariant",
    "attention_backend",
    "enforce_eager",
    "logits_processors",
]


LORA_FIELDS = {spec.name for spec in dataclasses.fields(LoRAConfig)} - {"enable_lora"}


class Nothing(LogitsProcessor):
    def update(self, change):
        pass

    def apply(self, logits):
        return logits


VALID = {
    "tensor_parallel_size": [1, 2, 8],
    "pipeline_parallel_size": [1, 3],
    "data_parallel_size": [1, 16],
    "data_parallel_backend": ["mp", "ray"],
    "distributed_executor_backend": ["mp", "ray", "external_launcher"],
    "tokenizer": ["other", Path("other")],
    "tokenizer_mode": ["auto", "slow"],
    "dtype": ["auto", "half", "float16", "bfloat16", "float", "float32", torch.float16],
    "load_format": ["auto", "hf", "dummy"],
    "revision": ["main"],
    "tokenizer_revision": ["main"],
    "max_model_len": [-1, 1, 4096],
    "download_dir": ["/tmp/somewhere"],
    "hf_token": [True, False, "secret"],
    "hf_overrides": [{}, {"rope_theta": 1.0}],
    "quantization": ["awq", "awq_marlin", "gptq", "compressed-tensors", "int8", "fp8"],
    "quantization_config": [{}, {"group_size": 64}],
    "generation_config": ["auto", "vllm", "folder"],
    "override_generation_config": [{}, {"temperature": 0.5, "max_new_tokens": 3}],
    "chat_template": ["{{ messages }}"],
    "block_size": [1, 16, 1024],
    "kv_cache_memory_bytes": [1, 1 << 40],
    "num_gpu_blocks_override": [2, 1000],
    "kv_cache_dtype": ["auto", "fp8", "fp8_e4m3", "int8", "bfloat16", torch.float32, torch.int8],
    "gpu_memory_utilization": [0.1, 1],
    "swap_space": [0, 0.5, 4],
    "max_num_seqs": [1, 65536],
    "max_waiting_requests": [0, 5],
    "async_scheduling": [True, False],
    "max_num_batched_tokens": [1, 1 << 20],
    "scheduling_policy": ["fcfs", "priority"],
    "structured_outputs_backend": ["llguidance", "outlines_core", "xgrammar"],
    "structured_outputs_deadline": [0.1, 10, 3600],
    "structured_outputs_forced_tokens": [True, False],
    "max_loras": [1, 8, 65536],
    "max_lora_rank": [1, 64],
    "max_cpu_loras": [1, 1000],
    "lora_dtype": ["auto", "half", "float32", torch.bfloat16],
    "lora_modules": [
        [],
        ["french=adapters/french", "b=p=q"],
        {"french": "adapters/french", "caps": Path("adapters/caps")},
        [{"name": "a", "path": "b", "base_model_name": "m"}, LoRARequest("c", lora_path="d")],
        ['{"name": "a", "path": "b"}'],
    ],
    "seed": [0, 2**64 - 1],
    "device": ["auto", "cpu", "cuda", "cuda:1", "xpu", "xpu:3", "npu:0", torch.device("cpu")],
    "attention_backend": ["TRITON", "sdpa", "FLASH_ATTN", "TORCH_SDPA", "flashinfer"],
    "logits_processors": [[], (), [Nothing], (Nothing(), Nothing)],
}
BOOLEANS = [
    "enable_expert_parallel",
    "skip_tokenizer_init",
    "trust_remote_code",
    "enable_prefix_caching",
    "enable_chunked_prefill",
    "batch_invariant",
    "enforce_eager",
    "enable_lora",
]
INVALID = {
    "tensor_parallel_size": [0, -1, True, 1.0, "2"],
    "pipeline_parallel_size": [0, True],
    "data_parallel_size": [0, 2000],
    "data_parallel_backend": ["uni", 1, True],
    "distributed_executor_backend": ["mpi", 1, True],
    "tokenizer": ["", 3],
    "tokenizer_mode": ["fast", True],
    "dtype": ["int8", "float64", torch.int8, 16],
    "load_format": ["", 1],
    "revision": ["", 1],
    "tokenizer_revision": [""],
    "max_model_len": [0, -2, 1.5, True, "8k"],
    "download_dir": [" "],
    "hf_token": ["", 3],
    "hf_overrides": ["{}", [1], {1: 2}],
    "quantization": ["", "gpqt", "int3", 8, True],
    "quantization_config": ["{}", [1], {1: 2}],
    "generation_config": ["", 1],
    "override_generation_config": ["{}", [1], {"temperatur": 1}, {"seed": 1}],
    "chat_template": [""],
    "block_size": [0, -16, 1025, 16.0, True],
    "kv_cache_memory_bytes": [0, -1, "4GiB"],
    "num_gpu_blocks_override": [0, 1],
    "kv_cache_dtype": ["int4", "float64", torch.float64, 8, True, ""],
    "gpu_memory_utilization": [0, -0.1, 1.01, float("nan"), "0.9", True],
    "swap_space": [-1, float("nan"), float("inf"), "4", True],
    "max_num_seqs": [0, 65537, 2.0],
    "max_waiting_requests": [-1, 0.5, True],
    "async_scheduling": [1, "yes"],
    "max_num_batched_tokens": [0, None.__class__],
    "scheduling_policy": ["lifo", 1],
    "structured_outputs_backend": ["outlines", 1],
    "structured_outputs_deadline": [0, -1, 3601, "10", True],
    "structured_outputs_forced_tokens": ["yes", 2],
    "max_loras": [0, -1, 65537, 1.5, True, "8"],
    "max_lora_rank": [0, 2.0, True, "16"],
    "max_cpu_loras": [0, -1, 0.5, True],
    "lora_dtype": ["int8", 16],
    "lora_modules": [
        "name=path",
        3,
        ["path"],
        ["=path"],
        ["name="],
        [3],
        [{"name": "a"}],
        [{"path": "a"}],
        [{"name": "a", "path": 3}],
        [{"name": "a", "path": "b", "rank": 3}],
        ['{"name": "a"'],
        [LoRARequest("no-path")],
        {"a": ""},
        {"": "a"},
    ],
    "seed": [-1, 2**64, 0.5, "0"],
    "device": ["tpu", "cuda:", "cuda:x", "cpu:0", "xpu:", "auto:1", "mps", 0],
    "attention_backend": ["", "FLASH", 3, True],
    "logits_processors": ["module:Class", ["module:Class"], [3], [len], [int], Nothing],
    "model": ["", "  ", 5, b"bytes"],
    **{name: ["yes", 1, 0] for name in BOOLEANS},
}


@pytest.mark.parametrize("name", argument_names())
def test_none_is_the_default_of_every_argument(name):
    """An argument that is None is one that was not given."""
    if name == "model":
        with pytest.raises(ConfigError, match="model"):
            EngineConfig.create(None)
    else:
        assert EngineConfig.create("m", **{name: None}) == EngineConfig.create("m")


@given(
    st.fixed_dictionaries(
        {},
        optional={
            **{name: st.sampled_from(values) for name, values in VALID.items()},
            **{name: st.booleans() for name in BOOLEANS},
        },
    )
)
def test_every_valid_argument_is_kept_and_comes_back(kwargs):
    """`to_kwargs` gives arguments of an equal configuration: nothing is dropped on the way."""
    if kwargs.get("max_model_len", 0) > 1 and not kwargs.get("enable_chunked_prefill", True):
        kwargs.pop("max_num_batched_tokens", None)
    if LORA_FIELDS & kwargs.keys():
        kwargs["enable_lora"] = True
    config = EngineConfig.create("m", **kwargs)
    flat = config.to_kwargs()
    assert sorted(flat) == sorted(FIELDS)
    assert EngineConfig.create(**flat) == config
    same = {"revision", "chat_template", "block_size", "max_num_seqs", "seed", *BOOLEANS}
    same |= {"max_waiting_requests", "max_loras", "max_lora_rank", "max_cpu_loras"}
    for name in same & kwargs.keys():
        assert flat[name] == kwargs[name]


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in INVALID.items() for value in values]
)
def test_a_wrong_value_is_refused_by_name(name, value):
    """The message has the argument's name, and the value unless it is a secret."""
    with pytest.raises(ConfigError, match=name) as caught:
        EngineConfig.create(**{"model": "m", name: value})
    assert not isinstance(caught.value, NotSupportedError)
    if name == "lora_modules":  # the entry alone
        value = next(iter(value)) if isinstance(value, list) else value
    if name != "hf_token" and not isinstance(value, dict):
        assert repr(value) in str(caught.value)


def test_every_field_was_tried_with_wrong_values():
    """A new field without a check, or without a test of it, shows here."""
    assert set(INVALID) == set(FIELDS)
    assert set(VALID) | set(BOOLEANS) | {"model"} == set(FIELDS)


@pytest.mark.parametrize("name", sorted(NOT_OFFERED))
def test_what_is_not_offered_says_so_and_its_off_values_pass(name):
    """NotSupportedError names argument and value; a value that asks for nothing is no error."""
    for off in NOT_OFFERED[name]:
        assert EngineConfig.create("m", **{name: off}) == EngineConfig.create("m")
    with pytest.raises(NotSupportedError, match=f"{name}='in use' is not offered by this version"):
        EngineConfig.create("m", **{name: "in use"})


@pytest.mark.parametrize(
    "kwargs",
    [
        {"fully_sharded_loras": True},
        {"speculative_config": {"method": "ngram"}},
        {"cpu_offload_gb": 4},
        {"kv_cache_dtype": "fp8_e5m2"},
        {"attention_backend": "XFORMERS"},
        {"tokenizer_mode": "mistral"},
        {"hf_overrides": lambda config: config},
    ],
)
def test_values_of_later_versions_are_refused(kwargs):
    """What users of vLLM know and quire lacks is an error, never silently dropped."""
    [name] = kwargs
    with pytest.raises(NotSupportedError, match=name):
        EngineConfig.create("m", **kwargs)


@pytest.mark.parametrize("name", sorted(NO_EFFECT))
def test_arguments_without_effect_are_still_checked(name):
    """They change nothing, and nonsense in them is an error all the same."""
    good = {"prefix_caching_hash_algo": "sha256", "code_revision": "main"}
    value = good.get(name, 1 if "max_" in name else True)
    assert EngineConfig.create("m", **{name: value}) == EngineConfig.create("m")
    if name != "compilation_config":  # of any shape in vLLM
        with pytest.raises(ConfigError, match=name):
            EngineConfig.create("m", **{name: object()})


@pytest.mark.parametrize("name", [name for name in argument_names() if len(name) > 7])
def test_a_mistyped_name_is_a_type_error_with_the_right_one(name):
    """Leaving out a letter of any name leads back to that name."""
    typo = name[:3] + name[4:]
    with pytest.raises(TypeError, match=f"'{typo}': did you mean '{name}'\\?"):
        EngineConfig.create("m", **{typo: 1})


def test_a_name_like_no_other_gets_no_suggestion():
    with pytest.raises(TypeError, match=r"unexpected argument 'zzzz'$"):
        EngineConfig.create("m", zzzz=1)


@pytest.mark.parametrize("door", [LLM, AsyncLLM])
def test_the_doors_check_before_anything_is_loaded(door):
    """A wrong argument is reported for a model that does not even exist."""
    with pytest.raises(TypeError, match="did you mean 'max_num_seqs'"):
        door("no/such-model", max_num_seq=3)
    with pytest.raises(NotSupportedError):
        door("no/such-model", fully_sharded_loras=True)
    with pytest.raises(ConfigError, match=r"quantization must be one of .*did you mean 'gptq'"):
        door("no/such-model", quantization="gpqt")
    with pytest.raises(TypeError, match="model"):
        door()


def test_the_typed_dict_lists_the_arguments_there_are():
    """What editors and type checkers offer is what `create` takes."""
    import quire.arguments

    quire.arguments.torch = torch  # imported there for type checkers only
    try:
        hints = get_type_hints(EngineArguments)
    finally:
        del quire.arguments.torch
    assert {"model", *hints} == set(argument_names())


def test_the_signature_shows_arguments_and_defaults():
    """`help(LLM)` has every field with the default that the configuration gives it."""
    parameters = inspect.signature(LLM).parameters
    defaults = EngineConfig.create("m").to_kwargs()
    assert next(iter(parameters)) == "model"
    assert set(FIELDS) <= set(parameters)
    for name in set(FIELDS) - {"model"}:
        assert parameters[name].default == defaults[name]
        assert parameters[name].kind is inspect.Parameter.KEYWORD_ONLY
    assert inspect.signature(AsyncLLM) == inspect.signature(LLM)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_loras", 4),
        ("max_lora_rank", 8),
        ("max_cpu_loras", 9),
        ("lora_dtype", "float32"),
        ("lora_modules", ["a=b"]),
    ],
)
def test_an_argument_about_adapters_needs_adapters(name, value):
    """Nothing that was asked for is dropped: the error says which argument it needs."""
    with pytest.raises(ConfigError, match=f"{name}=.*enable_lora=True"):
        EngineConfig.create("m", **{name: value})
    EngineConfig.create("m", **{name: value}, enable_lora=True)


def test_adapters_to_begin_with_come_in_many_forms():
    """Each form gives the same LoRARequest objects; a name is there once."""
    wanted = (LoRARequest("a", lora_path="x/a"), LoRARequest("b", lora_path="y=b"))
    forms = [
        ["a=x/a", "b=y=b"],
        {"a": "x/a", "b": Path("y=b")},
        [{"name": "a", "path": "x/a"}, '{"name": "b", "path": "y=b"}'],
        wanted,
    ]
    for form in forms:
        config = EngineConfig.create("m", enable_lora=True, lora_modules=form)
        assert config.lora.lora_modules == wanted
    with pytest.raises(ConfigError, match=r"lora_modules\[2\] has the name 'a', which .*\[0\]"):
        EngineConfig.create("m", enable_lora=True, lora_modules=["a=x", "b=x", "a=y"])
    with pytest.raises(ConfigError, match=r"lora_modules\[1\] .* unknown key 'pth'.*'path'"):
        EngineConfig.create("m", enable_lora=True, lora_modules=["a=x", {"name": "b", "pth": "x"}])


def test_a_budget_below_the_longest_prompt_needs_chunks():
    """Without chunked prefill an asked-for budget must hold max_model_len; a default one grows."""
    with pytest.raises(ConfigError, match="max_num_batched_tokens=100 is less than max_model_len"):
        EngineConfig.create(
            "m", max_num_batched_tokens=100, max_model_len=200, enable_chunked_prefill=False
        )
    EngineConfig.create("m", max_num_batched_tokens=100, max_model_len=200)
    scheduler = EngineConfig.create("m", enable_chunked_prefill=False).scheduler
    assert scheduler.token_budget(9000) == 9000
    assert scheduler.token_budget(9) == scheduler.max_num_batched_tokens
    assert EngineConfig.create("m").scheduler.token_budget(9000) == 512


def test_a_token_is_not_shown():
    config = EngineConfig.create("m", hf_token="secret")
    assert "secret" not in repr(config)
    assert config.model.hf_token == "secret"


def test_configurations_are_frozen():
    config = EngineConfig.create("m")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 1
    with pytest.raises(ConfigError, match="block_size"):
        dataclasses.replace(config.cache, block_size=0)


def test_light_modules_do_not_import_torch():
    """Reading options must not cost seconds."""
    code = (
        "import sys, quire.config, quire.prompts, quire.arguments, quire.llm, quire.async_llm\n"
        "import quire.utils.memory, quire.utils.threads\n"
        "print([m for m in ('torch', 'transformers', 'tqdm', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]", done


@pytest.mark.parametrize("name", argument_names())
@pytest.mark.parametrize("value", [-(10**5000), 10**5000, torch.tensor([1, 2])], ids=type)
def test_a_refusal_can_always_be_shown(name, value):
    """Integers too long to print and tensors are refused as any other wrong value is."""
    try:
        EngineConfig.create(**{"model": "quire/demo", name: value})
    except ConfigError as error:
        message = str(error)
    else:
        message = name  # taken
    assert name in message


@pytest.mark.parametrize("device", ["cuda:99999999999999999999", "cuda:\u0663", "cuda:-1"])
def test_a_device_number_that_torch_cannot_read_is_refused(device):
    with pytest.raises(ConfigError, match="device"):
        EngineConfig.create("quire/demo", device=device)


PROMISED = {
    "tokenizer": None,
    "tokenizer_mode": "auto",
    "skip_tokenizer_init": False,
    "trust_remote_code": False,
    "tensor_parallel_size": 1,
    "dtype": "auto",
    "quantization": None,
    "revision": None,
    "tokenizer_revision": None,
    "seed": 0,
    "gpu_memory_utilization": 0.9,
    "kv_cache_memory_bytes": None,
    "num_gpu_blocks_override": None,
    "max_model_len": None,
    "enable_prefix_caching": True,
    "enable_chunked_prefill": True,
    "enforce_eager": False,
    "enable_lora": False,
    "device": "auto",
    "download_dir": None,
    "generation_config": "auto",
}


def test_arguments_and_defaults_are_those_that_users_of_vllm_know():
    """Each may be written out with the default it has there, alone or with all others."""
    plain = EngineConfig.create("m")
    assert EngineConfig.create("m", **PROMISED) == plain
    for name in ("max_num_seqs", "max_num_batched_tokens", "block_size"):
        assert name in argument_names()
    signature = inspect.signature(LLM).parameters
    for name, value in PROMISED.items():
        assert EngineConfig.create("m", **{name: value}) == plain, name
        assert name not in signature or signature[name].default == value, name
