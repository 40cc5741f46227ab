"""load_format="dummy": weights that no file has, for any family."""

from __future__ import annotations

import shutil
import zlib

import pytest
import torch
from checkpoints import CONFIGS

from quire import LLM, SamplingParams
from quire.errors import ConfigError, NotSupportedError
from quire.kernels import get_backend
from quire.models.hf_config import read_config
from quire.models.loader import load_model
from quire.parallel.place import Place

GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


def load(folder, dtype=torch.float32, **options):
    return load_model(
        folder, read_config(folder), device=torch.device("cpu"), dtype=dtype,
        kernels=get_backend("cpu", "reference"), load_format="dummy", **options,
    )  # fmt: skip


@pytest.fixture
def bare(tiny_checkpoint, tmp_path):
    """Return the folder of a checkpoint that has lost its weights."""

    def make(name):
        folder = tmp_path / name
        shutil.copytree(tiny_checkpoint(name), folder)
        (folder / "model.safetensors").unlink()
        return folder

    return make


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_every_family_is_filled_without_a_file(name, bare):
    """No parameter is left out, and all are finite and of a usual size."""
    decoder = load(bare(name))
    assert not decoder.weights.missing()
    for parameter in decoder.weights.names():
        tensor = decoder.weights[parameter]
        assert tensor.isfinite().all()
        if tensor.dim() == 1 and parameter.endswith(".weight"):
            assert (tensor == 1).all()
        else:
            assert 0 < tensor.abs().max() < 0.2


def test_the_same_numbers_come_each_time_and_each_tensor_has_its_own(bare):
    """They follow from the name of the tensor, as its checkpoint would call it."""
    folder = bare("llama")
    one, other = load(folder).weights, load(folder).weights
    assert all(torch.equal(one[name], other[name]) for name in one.names())
    assert not torch.equal(one["layers.0.mlp.down.weight"], one["layers.1.mlp.down.weight"])
    generator = torch.Generator().manual_seed(zlib.crc32(b"model.layers.1.mlp.down_proj.weight"))
    down = torch.randn(one.shape("layers.1.mlp.down.weight"), generator=generator) * 0.02
    assert torch.equal(one["layers.1.mlp.down.weight"], down)


def test_stages_have_their_layers_of_the_same_numbers(bare):
    """A rank draws what it has as the whole model would."""
    folder = bare("llama")
    whole = load(folder).weights
    for stage in range(2):
        part = load(folder, place=Place.of_rank(stage, 1, 2, False)).weights
        assert part.names()
        for name in part.names():
            assert torch.equal(part[name], whole[name])


@pytest.mark.parametrize("options", [{}, {"quantization": "int8"}, {"dtype": "bfloat16"}])
def test_an_engine_runs_on_them(options, bare):
    """Also where they are made into codes while they are drawn."""
    with LLM(bare("llama"), load_format="dummy", **options) as llm:
        outputs = llm.generate([[5, 6, 7], [8, 9]], GREEDY, use_tqdm=False)
    assert [len(each.outputs[0].token_ids) for each in outputs] == [6, 6]


def test_the_log_says_that_weights_are_random(bare, caplog):
    with caplog.at_level("WARNING", logger="quire"):
        load(bare("llama"))
    assert "random numbers" in caplog.text


def test_what_cannot_be_honoured_is_refused(bare, tiny_checkpoint):
    """Codes of a checkpoint are no plain weights; other formats are other programs' affair."""
    folder = bare("llama")
    config = {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": False, "sym": True}
    with pytest.raises(ConfigError, match="load_format='dummy' draws plain weights"):
        LLM(folder, load_format="dummy", hf_overrides={"quantization_config": config})
    with pytest.raises(ConfigError, match="has no weights that quantization_config"):
        LLM(
            folder, load_format="dummy", quantization="int4",
            quantization_config={"calibration": [[1, 2, 3]]},
        )  # fmt: skip
    with pytest.raises(NotSupportedError, match="load_format='tensorizer'"):
        LLM(tiny_checkpoint("llama"), load_format="tensorizer")
    with pytest.raises(ConfigError, match="load_format must be one of 'auto', 'hf', 'dummy'"):
        LLM(tiny_checkpoint("llama"), load_format=3)
