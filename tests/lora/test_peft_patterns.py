"""Patterns and lists of module names against peft's own matching, and which are refused."""

from __future__ import annotations

import re
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.errors import AdapterError
from quire.lora.config import AdapterConfig
from quire.utils.patterns import compiled

NAMES = [
    *(
        f"model.layers.{index}.{part}"
        for index in (0, 1, 10, 11)
        for part in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj")
    ),
    "transformer.h.3.attn.c_attn",
    "model.embed_tokens",
    "lm_head",
]
WORDS = st.sampled_from(
    ["q_proj", "self_attn.q_proj", "layers.1.mlp.up_proj", "proj", "1", "lm_head", "layers"]
)
REGEXES = st.sampled_from(
    [
        r".*\.q_proj",
        r"model\.layers\.1\..*",
        r"(q|k)_proj",
        r"layers\.[01]\.self_attn\.\w+",
        "^model.layers.1.self_attn.q_proj",
        r".*(embed_tokens|lm_head)",
        r"\d",
    ]
)


def config_of(**fields: Any) -> AdapterConfig:
    return AdapterConfig({"peft_type": "LORA", **fields}, Path("adapter"))


@given(
    ranks=st.dictionaries(WORDS | REGEXES, st.integers(1, 64), max_size=4),
    alphas=st.dictionaries(WORDS | REGEXES, st.integers(1, 64), max_size=4),
    rslora=st.booleans(),
)
def test_ranks_and_scales_are_those_of_peft(
    ranks: dict[str, int], alphas: dict[str, int], rslora: bool
) -> None:
    """The first pattern that matches decides, of ranks and of alphas separately."""
    other = pytest.importorskip("peft.utils.other")
    config = config_of(
        r=7, lora_alpha=12, rank_pattern=ranks, alpha_pattern=alphas, use_rslora=rslora
    )
    for name in NAMES:
        rank = ranks.get(other.get_pattern_key(ranks, name), 7)
        alpha = alphas.get(other.get_pattern_key(alphas, name), 12)
        assert config.rank(name) == rank
        assert config.scale(name) == pytest.approx(alpha / (rank**0.5 if rslora else rank))


@given(
    targets=st.lists(WORDS, min_size=1) | REGEXES,
    excluded=st.none() | st.lists(WORDS) | REGEXES,
    saved=st.none() | st.lists(st.sampled_from(["lm_head", "embed_tokens", "mlp"])),
    layers=st.none() | st.integers(0, 11) | st.lists(st.integers(0, 11)),
    pattern=st.none() | st.sampled_from(["layers", "h", ["h", "layers"], [], r"layers|h"]),
)
def test_targets_are_those_of_peft(
    targets: Any, excluded: Any, saved: Any, layers: Any, pattern: Any
) -> None:
    """Lists of endings, expressions, exclusions, and layers by number."""
    utils = pytest.importorskip("peft.tuners.tuners_utils")
    fields = {
        "target_modules": targets,
        "exclude_modules": excluded,
        "modules_to_save": saved,
        "layers_to_transform": layers if isinstance(targets, list) else None,
        "layers_pattern": pattern if pattern != r"layers|h" else None,
    }
    config = config_of(**fields)
    oracle = SimpleNamespace(**fields, target_parameters=None)
    for name in NAMES:
        try:
            found = utils.check_target_module_exists(oracle, name)
        except UnboundLocalError:  # in peft, where no layer's number is in the name
            continue
        # An excluded module is an object that is false.
        assert bool(config.targets(name)) == bool(found)


@pytest.mark.parametrize(
    "pattern",
    [
        r"(a+)+",
        r"(a|a)*b",
        r"((?:\w+\.)*)*",
        r"(?:x{1,9}){2,9}",
        r"(.*)(?=q)",
        r"(\w+)\1",
        r".*.*.*.*.*.*.*q",
        r".?" * 40 + "@",
        r"(?:.?){20}(?:.?){20}@",
        r"(?:.|.)" * 30 + "@",
        r".*.*.*.*.*.*(?:.|.)(?:.|.)(?:.|.)(?:.|.)@",
        "(?x)(a+#)(\n)+",
        r"(a+(?#()(b)?)+",
        "x" * 5000 + "|y",
    ],
)
def test_a_pattern_that_may_take_forever_is_refused(pattern: str) -> None:
    """It says so at once, without having tried."""
    before = time.perf_counter()
    with pytest.raises(AdapterError, match="plainer"):
        compiled("{}", pattern, "target_modules in adapter_config.json", AdapterError)
    assert time.perf_counter() - before < 1


@pytest.mark.parametrize(
    "pattern",
    [
        r"(?:.*?(?:language|text).*?(?:self_attn|attention|mlp).*?(?:q_proj|k_proj|v_proj).*?)|"
        r"(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:q_proj|k_proj|v_proj)))",
        r".*decoder.*(SelfAttention|EncDecAttention).*(q|v)$",
        r"model\.layers\.([0-9]|1[0-5])\..*(q|v)_proj",
        r"[]*+]\.q_proj",
        r"(?:.*\.)?[qkv]_proj",
        r"(?:.*?(?:vision|image|visual|patch|language|text).*?(?:self_attn|attention|attn|mlp|"
        r"feed_forward|ffn|dense).*?(?:k_proj|v_proj|q_proj|o_proj|gate_proj|up_proj|down_proj).*?)|"
        r"(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)\."
        r"(?:(?:k_proj|v_proj|q_proj|o_proj|gate_proj|up_proj|down_proj)))",
        r"model(\.language_model)?\.layers\.\d+\.(self_attn|mlp)\.\w+?_proj",
    ],
)
def test_usual_patterns_pass(pattern: str) -> None:
    """Those that training tools write."""
    assert compiled("{}", pattern, "target_modules", AdapterError) == re.compile(pattern)


def test_many_patterns_may_take_no_longer_than_one() -> None:
    """Of plain names there may be any number, as of patterns that are soon matched."""
    plain = {f"model.layers.{i}.self_attn.q_proj": 4 for i in range(5_000)}
    soon = {rf".*\.layers\.{i}\.self_attn\..*": 4 for i in range(500)}
    assert config_of(rank_pattern=plain, alpha_pattern=soon).rank("model.layers.7.mlp.up_proj") == 8
    slow = {".*.*.*.*.*" + str(i): 4 for i in range(100)}
    with pytest.raises(AdapterError, match=r"too many expressions .* rank_pattern"):
        config_of(rank_pattern=slow)
