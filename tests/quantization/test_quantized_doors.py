"""Quantized models through every door: arguments, answers, memory, and what is refused."""

from __future__ import annotations

import gc
import json
import logging
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from folders import configure, copy_of, rewrite
from quantized_checkpoints import QuantizedPair, write_quantized

from quire import LLM, SamplingParams
from quire.errors import ConfigError, ModelLoadError, NotSupportedError, UnsupportedModelError
from quire.kernels import available_backends

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
PROMPTS = ["hello world", "the quick brown fox jumps over", "What is the capital of France ?", "a"]
OPTIONS: dict[str, Any] = {"dtype": "float32", "block_size": 4, "kv_cache_memory_bytes": 1 << 20}


@pytest.fixture(scope="module")
def awq(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> QuantizedPair:
    folder = tmp_path_factory.mktemp("awq")
    return write_quantized(tiny_llama, folder, "awq", dtype=torch.float16)


def tokens(outputs: list[Any]) -> list[list[int]]:
    return [list(each.token_ids) for output in outputs for each in output.outputs]


# -- answers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantization", [None, "awq", "awq_marlin"])
def test_a_quantized_folder_answers_as_its_values_do(
    awq: QuantizedPair, quantization: str | None
) -> None:
    """With its name, with another name for it, and without; greedily, token by token."""
    with (
        LLM(awq.quantized, quantization=quantization, **OPTIONS) as llm,
        LLM(awq.plain, **OPTIONS) as plain,
    ):
        assert tokens(llm.generate(PROMPTS, GREEDY)) == tokens(plain.generate(PROMPTS, GREEDY))


@pytest.mark.parametrize("quantization", ["int8", "w8a8", "int4", "fp8", "nf4"])
def test_an_answer_depends_on_nothing_but_its_request(
    quantization: str, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alone and in a batch, chunked and whole, cached and cold: the same tokens."""
    params = [GREEDY, SamplingParams(temperature=0.9, seed=5, n=2, max_tokens=8, ignore_eos=True)]
    with LLM(tiny_llama, quantization=quantization, **OPTIONS) as llm:
        alone = [tokens(llm.generate([p], each)) for p in PROMPTS for each in params]
        for _ in range(2):  # the second time from the prefix cache
            mixed = llm.generate([p for p in PROMPTS for _ in params], params * len(PROMPTS))
            assert [tokens([output]) for output in mixed] == alone
    with LLM(tiny_llama, quantization=quantization, max_num_batched_tokens=5, **OPTIONS) as chunked:
        mixed = chunked.generate([p for p in PROMPTS for _ in params], params * len(PROMPTS))
        assert [tokens([output]) for output in mixed] == alone


@pytest.mark.skipif("cpu" not in available_backends(), reason="the native kernels were not built")
@pytest.mark.parametrize("quantization", ["int8", "w8a8", "int4", "fp8", "nf4"])
def test_native_kernels_keep_their_promise(quantization: str, tiny_llama: Path) -> None:
    """batch_invariant=True is taken, and log-probabilities have the same bits in any company."""
    params = SamplingParams(temperature=0, max_tokens=6, logprobs=1, ignore_eos=True)
    with LLM(tiny_llama, quantization=quantization, batch_invariant=True, **OPTIONS) as llm:
        alone = [llm.generate([p], params)[0].outputs[0] for p in PROMPTS]
        together = [output.outputs[0] for output in llm.generate(PROMPTS, params)]
        assert [each.cumulative_logprob for each in alone] == [
            each.cumulative_logprob for each in together
        ]


def test_options_of_quantizing_reach_the_weights(
    tiny_llama: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Calibration prompts are texts or ids; the start line says what came of it."""
    options = {"group_size": 16, "lm_head": None, "calibration": ["hello world", [5, 6, 7]]}
    with (
        caplog.at_level(logging.INFO, "quire"),
        LLM(tiny_llama, quantization="int4", quantization_config=options, **OPTIONS) as llm,
    ):
        assert len(tokens(llm.generate(PROMPTS, GREEDY))) == len(PROMPTS)
    assert any("weights in int4, " in record.getMessage() for record in caplog.records)


def test_what_has_no_effect_is_said(tiny_llama: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Names to ignore that no module has, and a configuration of codes where there are none."""
    ignored = {"ignore": ["model.layers.0", "layers.1", "lm_head"]}
    with LLM(tiny_llama, quantization="int4", quantization_config=ignored, **OPTIONS):
        pass
    assert any("ignore'] has 'model.layers.0', by" in each.getMessage() for each in caplog.records)
    assert not any("all weights are plain" in each.getMessage() for each in caplog.records)
    said = {"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 16}}
    with LLM(tiny_llama, hf_overrides=said, **OPTIONS):
        pass
    assert any("'awq': all weights are plain" in each.getMessage() for each in caplog.records)


def test_float16_checkpoints_keep_the_rest_in_bfloat16_on_a_cpu(
    awq: QuantizedPair, caplog: pytest.LogCaptureFixture
) -> None:
    """By dtype="auto", and it is said; an explicit dtype stands."""
    configure(awq.quantized, dtype="float16")
    with caplog.at_level(logging.INFO, "quire"), LLM(awq.quantized, **{**OPTIONS, "dtype": "auto"}):
        pass
    lines = [record.getMessage() for record in caplog.records]
    assert any("kept in bfloat16, not in float16" in line for line in lines)
    assert any(": bfloat16 (stored as float16), weights in awq (int4), " in line for line in lines)
    caplog.clear()
    with (
        caplog.at_level(logging.INFO, "quire"),
        LLM(awq.quantized, **{**OPTIONS, "dtype": "float16"}) as llm,
    ):
        assert llm.generate(PROMPTS, GREEDY)
    assert any(": float16, weights in awq" in record.getMessage() for record in caplog.records)


def test_closing_lets_go_of_the_codes(awq: QuantizedPair) -> None:
    """As of any other weights."""
    from quire.models.coded import CodedWeight

    def codes() -> list[CodedWeight]:
        return [each for each in gc.get_objects() if type(each) is CodedWeight]

    of_others = {id(each) for each in codes()}  # engines of other files may live on
    llm = LLM(awq.quantized, **OPTIONS)
    llm.generate(PROMPTS[:1], GREEDY)
    found = [weakref.ref(each) for each in codes() if id(each) not in of_others]
    assert found
    llm.close()
    del llm
    gc.collect()
    assert not [each for each in found if each() is not None]


# -- the other doors -------------------------------------------------------------------------------


def test_langchain_serves_an_awq_folder(awq: QuantizedPair) -> None:
    """As the community class is told to: vllm_kwargs={"quantization": "awq"}."""
    from quire.integrations.langchain import VLLM

    llm = VLLM(
        model=str(awq.quantized),
        temperature=0,
        max_new_tokens=8,
        dtype="float32",
        vllm_kwargs={"quantization": "awq", "kv_cache_memory_bytes": 1 << 20},
    )
    with LLM(awq.plain, **OPTIONS) as plain:
        params = SamplingParams(temperature=0, max_tokens=8)
        expected = plain.generate(PROMPTS[:1], params)[0].outputs[0].text
    assert llm.invoke(PROMPTS[0]) == expected


def test_outlines_has_quantized_models(awq: QuantizedPair) -> None:
    """By the folder and the engine's arguments."""
    from quire.integrations.outlines import models

    model = models.vllm(str(awq.quantized), quantization="awq", **OPTIONS)
    assert model("hello", Literal["fox", "dog"], max_tokens=8) in ("fox", "dog")


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gptq", "int8", "fp8", "bitsandbytes"])
def test_a_mismatch_names_both(awq: QuantizedPair, name: str) -> None:
    """What was asked for, what the checkpoint is, and what would work."""
    with pytest.raises(ConfigError, match=f"quantization='{name}'.*'awq'.*quantization='awq'"):
        LLM(awq.quantized, quantization=name, **OPTIONS)


def test_a_plain_folder_is_in_no_format(tiny_llama: Path) -> None:
    """The message says what it can be quantized to, and where a configuration was looked for."""
    with pytest.raises(ConfigError, match=r"quantization='awq'.*quantize_config\.json.*'int4'"):
        LLM(tiny_llama, quantization="awq", **OPTIONS)


def test_options_without_a_quantizer_are_refused(awq: QuantizedPair, tiny_llama: Path) -> None:
    """Of a checkpoint in codes, and of one that is to stay plain."""
    with pytest.raises(ConfigError, match="quantized as 'awq' already"):
        LLM(awq.quantized, quantization_config={"group_size": 64}, **OPTIONS)
    with pytest.raises(ConfigError, match="quantization=, which is not given"):
        LLM(tiny_llama, quantization_config={"group_size": 64}, **OPTIONS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group_size": 48}, "group_size.*48.*does not divide"),
        ({"bits": 3}, "bits"),
        ({"lm_head": "int2"}, "lm_head"),
        ({"calibration": []}, "calibration"),
        ({"ignore": "lm_head"}, "ignore"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str, tiny_llama: Path) -> None:
    """Each by its name."""
    with pytest.raises(ConfigError, match=message):
        LLM(tiny_llama, quantization="int4", quantization_config=options, **OPTIONS)


Change = Callable[[dict[str, torch.Tensor]], Any]
UP = "model.layers.1.mlp.up_proj"


def _nan_scale(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{UP}.scales"][1, 2] = torch.nan


def _without_codes(tensors: dict[str, torch.Tensor]) -> None:
    for kind in ("qweight", "qzeros", "scales"):
        del tensors[f"{UP}.{kind}"]


def _put(kind: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    return lambda tensors: tensors.update({f"{UP}.{kind}": change(tensors[f"{UP}.qweight"])})


DAMAGED: list[tuple[Change, str]] = [
    (lambda tensors: tensors.pop(f"{UP}.scales"), rf"1 missing: {UP}\.scales"),
    (_without_codes, rf"3 missing.*{UP}\.qweight"),
    (_nan_scale, rf"model\.safetensors in .*'{UP}'.*scales has 1 of"),
    (_put("qweight", lambda words: words[1:]), rf"'{UP}'.*qweight has the shape \[63, 14\]"),
    (_put("qweight", lambda words: words.float()), rf"'{UP}'.*qweight is of type float32"),
    (_put("extra", lambda _: torch.ones(1)), rf"1 unexpected: {UP}\.extra"),
    (_put("bias", lambda _: torch.ones(112)), rf"1 unexpected: {UP}\.bias"),
]


@pytest.mark.parametrize(("change", "message"), DAMAGED)
def test_damaged_tensors_are_named(
    change: Change, message: str, awq: QuantizedPair, tmp_path: Path
) -> None:
    """File, module and kind, what it is, and what it must be."""
    folder = copy_of(awq.quantized, tmp_path)
    rewrite(folder, change)
    with pytest.raises(ModelLoadError, match=message):
        LLM(folder, **OPTIONS)


def test_a_bias_of_zeros_and_scales_of_a_cache_are_left_out(
    awq: QuantizedPair, tmp_path: Path
) -> None:
    """Tools write the first for each module, and the second for a KV cache in codes."""
    folder = copy_of(awq.quantized, tmp_path)
    rewrite(
        folder,
        lambda ts: ts.update(
            {
                f"{UP}.bias": torch.zeros(112),
                "model.layers.0.self_attn.k_scale": torch.ones(1),
                "model.layers.1.self_attn.rotary_emb.inv_freq": torch.ones(8),
            }
        ),
    )
    with LLM(folder, **OPTIONS) as llm, LLM(awq.quantized, **OPTIONS) as other:
        assert tokens(llm.generate(PROMPTS, GREEDY)) == tokens(other.generate(PROMPTS, GREEDY))


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"quant_method": "exl2"}, UnsupportedModelError, "'exl2'.*awq.*gptq"),
        ({"bits": 3}, NotSupportedError, "bits"),
        ({"group_size": 24}, ModelLoadError, "group_size 24 does not divide"),
        ({"quant_method": None}, ModelLoadError, "quant_method"),
    ],
)
def test_configurations_that_cannot_be_read_are_named(
    values: dict[str, Any], error: type[Exception], message: str, awq: QuantizedPair, tmp_path: Path
) -> None:
    """By field, value, and what would be right."""
    folder = copy_of(awq.quantized, tmp_path)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    configure(folder, quantization_config={**config, **values})
    with pytest.raises(error, match=message):
        LLM(folder, **OPTIONS)


def test_kernels_without_products_of_codes_say_so(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A backend of another package, made for an older version: before anything is read."""
    from quire.kernels.reference.backend import ReferenceBackend

    class Old(ReferenceBackend):
        name = "old"
        quantized_linear = None

    monkeypatch.setattr("quire.assembly.get_backend", lambda _device: Old())
    with pytest.raises(ConfigError, match=r"the old kernels .* cannot multiply"):
        LLM(tiny_llama, quantization="int8", **OPTIONS)


def test_older_tools_files_beside_the_configuration_count(
    awq: QuantizedPair, tmp_path: Path
) -> None:
    """quant_config.json, by AutoAWQ's first versions, with its old names."""
    folder = copy_of(awq.quantized, tmp_path)
    file = folder / "config.json"
    config = json.loads(file.read_text())
    del config["quantization_config"]
    file.write_text(json.dumps(config))
    old = {"zero_point": True, "q_group_size": 16, "w_bit": 4, "version": "GEMM"}
    (folder / "quant_config.json").write_text(json.dumps(old))
    shutil.move(folder / "model.safetensors", folder / "awq_model_w4_g16.safetensors")
    with LLM(folder, quantization="awq", **OPTIONS) as llm, LLM(awq.plain, **OPTIONS) as plain:
        assert tokens(llm.generate(PROMPTS, GREEDY)) == tokens(plain.generate(PROMPTS, GREEDY))
