"""Rotary frequencies against transformers, and the tables against their definition."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quire.models.hf_config import _rope_parameters
from quire.models.rotary import RotaryTable, rotary_spec
from quire.models.spec import RotarySpec

HEAD_DIM = 32


def scalings() -> st.SearchStrategy[dict[str, Any]]:
    factor = st.floats(1.5, 32)
    length = st.integers(16, 200)
    factors = st.lists(st.floats(1, 60), min_size=HEAD_DIM // 2, max_size=HEAD_DIM // 2)
    base = {"rope_theta": st.floats(100, 1e6)}
    return st.one_of(
        st.fixed_dictionaries({"rope_type": st.just("default"), **base}),
        st.fixed_dictionaries({"rope_type": st.just("linear"), "factor": factor, **base}),
        st.fixed_dictionaries({"rope_type": st.just("dynamic"), "factor": factor, **base}),
        st.fixed_dictionaries(
            {
                "rope_type": st.just("llama3"),
                "factor": factor,
                "low_freq_factor": st.floats(0.5, 2),
                "high_freq_factor": st.floats(3, 8),
                "original_max_position_embeddings": length,
                **base,
            }
        ),
        st.fixed_dictionaries(
            {
                "rope_type": st.just("yarn"),
                "factor": factor,
                "original_max_position_embeddings": length,
                **base,
            },
            optional={
                "attention_factor": st.floats(0.5, 2),
                "beta_fast": st.floats(8, 40),
                "beta_slow": st.floats(0.5, 4),
                "mscale": st.floats(0.5, 2),
                "mscale_all_dim": st.floats(0.5, 2),
                "truncate": st.booleans(),
            },
        ),
        st.fixed_dictionaries(
            {
                "rope_type": st.just("longrope"),
                "short_factor": factors,
                "long_factor": factors,
                "original_max_position_embeddings": length,
                **base,
            },
            optional={"attention_factor": st.floats(0.5, 2), "factor": factor},
        ),
    )


@given(parameters=scalings(), length=st.integers(201, 4000))
def test_frequencies_are_those_of_transformers(parameters: dict[str, Any], length: int) -> None:
    """For every type and any values, at the trained length and at a longer one."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig(
        hidden_size=4 * HEAD_DIM,
        num_attention_heads=4,
        max_position_embeddings=201,
        rope_parameters=dict(parameters),
    )
    kind = parameters["rope_type"]
    if kind == "default":
        inv_freq, magnitude = LlamaRotaryEmbedding.compute_default_rope_parameters(config)
    else:
        inv_freq, magnitude = ROPE_INIT_FUNCTIONS[kind](config, "cpu", seq_len=length)
    spec = rotary_spec(parameters, head_dim=HEAD_DIM, max_position=201, max_model_len=length)
    torch.testing.assert_close(torch.tensor(spec.inv_freq), inv_freq, rtol=1e-5, atol=0)
    assert spec.magnitude == pytest.approx(magnitude)


@given(
    lengths=st.lists(st.integers(1, 9000), min_size=1, max_size=4),
    magnitude=st.floats(0.5, 2),
    seed=st.integers(0, 100),
)
def test_a_table_grows_without_changing(lengths: list[int], magnitude: float, seed: int) -> None:
    """Whatever lengths came before, a row is the cosine and sine of its position's angles."""
    spec = RotarySpec((1.0, 0.1, 0.003), magnitude)
    table = RotaryTable(spec, torch.device("cpu"))
    generator = torch.Generator().manual_seed(seed)
    for length in lengths:
        positions = torch.randint(0, length, (5,), generator=generator)
        positions[0] = length - 1
        cos, sin = table.lookup(positions, length)
        angles = positions[:, None].float() * torch.tensor(spec.inv_freq)
        assert torch.equal(cos, angles.cos() * magnitude)
        assert torch.equal(sin, angles.sin() * magnitude)


def test_layers_of_the_same_frequencies_share_a_table() -> None:
    """Equal specs are equal keys, so that a decoder makes one table of them."""
    parameters = {"rope_theta": 1e4}
    one = rotary_spec(parameters, head_dim=16, max_position=10)
    assert one == rotary_spec(parameters, head_dim=16, max_position=10)
    assert len({one, dataclasses.replace(one, magnitude=2.0), one}) == 2


def test_old_names_of_rotary_settings() -> None:
    """rope_scaling's "type", "su", and GPT-NeoX's own names are today's names."""
    assert _rope_parameters({"rope_scaling": {"type": "su"}, "rotary_pct": 0.5}) == {
        "rope_type": "longrope",
        "partial_rotary_factor": 0.5,
    }
    assert _rope_parameters({"rotary_emb_base": 7, "rope_scaling": None}) == {"rope_theta": 7}
