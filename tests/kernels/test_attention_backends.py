"""Attention by others: chosen by name, refused with what would work, and called as documented."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import quire.kernels.attention.own
from quire import LLM, SamplingParams
from quire.config.attention_backend import ATTENTION_BACKENDS, honour_attention_backend
from quire.errors import ConfigError
from quire.kernels import get_backend
from quire.kernels.attention import flash_attn, flashinfer
from quire.kernels.attention.choice import (
    ATTENTION,
    records_decode,
    usable_attention,
    why_not,
    with_attention,
)
from quire.kernels.attention.needs import AttentionNeeds, LayerNeeds
from quire.kernels.reference.backend import ReferenceBackend

CPU, GPU = torch.device("cpu"), torch.device("cuda:0")


def attend(query, keys, values, *, scale, left, softcap, slopes):
    """One sequence, as both packages document it: the mask is aligned to the last key."""
    num_queries, num_keys = len(query), len(keys)
    repeats = query.shape[1] // keys.shape[1]
    keys, values = (each.repeat_interleave(repeats, 1) for each in (keys, values))
    scores = torch.einsum("qhd,khd->hqk", query, keys) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    last = torch.arange(num_queries)[:, None] + num_keys - num_queries
    places = torch.arange(num_keys)
    if slopes is not None:
        scores = scores - slopes[:, None, None] * (last - places).abs()
    seen = places <= last
    if left >= 0:
        seen &= places >= last - left
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0.0)
    return torch.einsum("hqk,khd->qhd", weights, values)


def integers(tensor, *shape):
    assert tensor.dtype is torch.int32
    assert tensor.shape == shape


class FakeFlashAttn(ModuleType):
    """``flash_attn``, by its documentation."""

    def __init__(self):
        super().__init__("flash_attn")
        self.calls = []

    def flash_attn_varlen_func(
        self, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
        softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
        deterministic=False, return_attn_probs=False, block_table=None,
    ):  # fmt: skip
        self.calls.append("varlen")
        num_seqs = len(block_table)
        integers(cu_seqlens_q, num_seqs + 1)
        integers(cu_seqlens_k, num_seqs + 1)
        lens = cu_seqlens_k.diff()
        assert cu_seqlens_q[0] == cu_seqlens_k[0] == 0
        assert max_seqlen_q == cu_seqlens_q.diff().max()
        assert max_seqlen_k == lens.max()
        queries = q.split(cu_seqlens_q.diff().tolist())
        return torch.cat(
            self._attend(
                queries, k, v, lens, block_table, softmax_scale, causal, window_size, softcap,
                alibi_slopes,
            )
        )  # fmt: skip

    def flash_attn_with_kvcache(
        self, q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None,
        cache_seqlens=None, cache_batch_idx=None, cache_leftpad=None, block_table=None,
        softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
        rotary_interleaved=True, alibi_slopes=None, num_splits=0, return_softmax_lse=False,
    ):  # fmt: skip
        self.calls.append("kvcache")
        integers(cache_seqlens, q.shape[0])
        return torch.stack(
            self._attend(
                q.unbind(), k_cache, v_cache, cache_seqlens, block_table, softmax_scale, causal,
                window_size, softcap, alibi_slopes,
            )
        )  # fmt: skip

    def _attend(
        self, queries, k, v, lens, tables, scale, causal, window, softcap, slopes
    ):  # fmt: skip
        assert causal
        assert window[1] in (-1, 0)
        integers(tables, len(lens), tables.shape[1])
        block_size = k.shape[1]
        assert block_size % 256 == 0
        if slopes is not None:
            assert slopes.dtype is torch.float32
        results = []
        for query, length, table in zip(queries, lens.tolist(), tables.long(), strict=True):
            assert query.stride(-1) == 1
            keys, values = (each[table].flatten(0, 1)[:length] for each in (k, v))
            results.append(
                attend(query, keys, values, scale=scale, left=window[0], softcap=softcap,
                       slopes=slopes)
            )  # fmt: skip
        return results


class FakeFlashInfer(ModuleType):
    """``flashinfer``, by its documentation; it counts wrappers and plans."""

    def __init__(self):
        super().__init__("flashinfer")
        self.wrappers, self.plans = [], []
        fake = self

        class BatchPrefillWithPagedKVCacheWrapper:
            def __init__(self, float_workspace_buffer, kv_layout="NHD"):
                assert float_workspace_buffer.dtype is torch.uint8
                assert kv_layout == "NHD"
                fake.wrappers.append(self)

            def plan(
                self, qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len,
                num_qo_heads, num_kv_heads, head_dim_qk, page_size, *, causal=False,
                sm_scale=None, window_left=-1, logits_soft_cap=None, q_data_type="float16",
                kv_data_type=None,
            ):  # fmt: skip
                fake.plans.append(self)
                num_seqs = len(qo_indptr) - 1
                integers(qo_indptr, num_seqs + 1)
                integers(paged_kv_indptr, num_seqs + 1)
                integers(paged_kv_last_page_len, num_seqs)
                integers(paged_kv_indices, int(paged_kv_indptr[-1]))
                for on_host in (qo_indptr, paged_kv_indptr, paged_kv_last_page_len):
                    assert on_host.device.type == "cpu"
                assert paged_kv_last_page_len.min() >= 1
                assert paged_kv_last_page_len.max() <= page_size
                assert causal
                self.planned = (
                    qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len,
                )  # fmt: skip
                self.shape = (num_qo_heads, num_kv_heads, head_dim_qk, page_size)
                self.options = {"scale": sm_scale, "left": window_left, "softcap": logits_soft_cap}
                self.dtypes = (q_data_type, kv_data_type)

            def run(self, q, paged_kv_cache):
                keys, values = paged_kv_cache
                assert q.is_contiguous()
                assert (q.dtype, keys.dtype) == self.dtypes
                num_heads, num_kv_heads, head_dim, page_size = self.shape
                assert q.shape[1:] == (num_heads, head_dim)
                assert keys.shape[1:] == values.shape[1:] == (page_size, num_kv_heads, head_dim)
                starts, page_starts, pages, last = self.planned
                results = []
                for row, query in enumerate(q.split(starts.diff().tolist())):
                    own = pages[page_starts[row] : page_starts[row + 1]].long()
                    length = (len(own) - 1) * page_size + int(last[row])
                    both = (each[own].flatten(0, 1)[:length] for each in (keys, values))
                    results.append(attend(query, *both, slopes=None, **self.options))
                return torch.cat(results)

        self.BatchPrefillWithPagedKVCacheWrapper = BatchPrefillWithPagedKVCacheWrapper


@pytest.fixture
def flash(monkeypatch):
    module = FakeFlashAttn()
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    return module


@pytest.fixture
def infer(monkeypatch):
    module = FakeFlashInfer()
    monkeypatch.setitem(sys.modules, "flashinfer", module)
    monkeypatch.setattr(flashinfer, "_WORKSPACE_BYTES", 64)
    return module


@st.composite
def steps(draw, *, block_size):
    """Lengths of sequences: how many tokens each has in the step, and at its end."""
    counts = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    if draw(st.booleans()):
        counts = [1] * len(counts)
    return [(count, count + draw(st.integers(0, 2 * block_size))) for count in counts]


class Case:
    """A step's tensors, and what the reference makes of them."""

    def __init__(self, parts, block_size, *, head_dim=16, num_heads=4, num_kv_heads=2):
        generator = torch.Generator().manual_seed(1)
        width = max(-(-end // block_size) for _, end in parts)
        num_blocks = 1 + width * len(parts)
        order = torch.randperm(num_blocks - 1, generator=generator) + 1
        self.tables = order.view(len(parts), width).int()
        self.starts = torch.tensor([0, *[count for count, _ in parts]]).cumsum(0).int()
        self.lens = torch.tensor([end for _, end in parts], dtype=torch.int32)
        shape = (num_blocks, block_size, num_kv_heads, head_dim)
        self.caches = [torch.randn(shape, generator=generator) for _ in range(2)]
        for cache in self.caches:
            cache[0] = 0
        num_tokens = int(self.starts[-1])
        # As it comes from a projection: a view into a wider tensor.
        wide = torch.randn(num_tokens, num_heads + 3, head_dim, generator=generator)
        self.query = wide[:, :num_heads]
        self.block_size = block_size

    def plan(self, backend):
        return backend.plan_attention(self.starts, self.lens, self.tables, self.block_size)

    def check(self, backend, plan=None, **options):
        options = {"scale": 0.3, **options}
        plan = self.plan(backend) if plan is None else plan
        found = backend.paged_attention(self.query, *self.caches, plan, **options)
        expected = ReferenceBackend.paged_attention(
            self.query, *self.caches, self.plan(ReferenceBackend), **options
        )
        assert found.shape == expected.shape
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def composed(name):
    return with_attention(get_backend("cpu", "reference"), name, CPU)


@given(
    parts=steps(block_size=256),
    window=st.none() | st.integers(1, 300),
    softcap=st.none() | st.just(2.0),
    has_alibi=st.booleans(),
)
def test_flash_attn_is_called_as_it_is_documented(flash, parts, window, softcap, has_alibi):
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625]) if has_alibi else None
    flash.calls.clear()
    Case(parts, 256).check(
        composed("FLASH_ATTN"), sliding_window=window, softcap=softcap, alibi_slopes=slopes
    )
    is_decode = all(count == 1 for count, _ in parts)
    assert flash.calls == ["kvcache" if is_decode else "varlen"]


def test_flash_attn_has_plans_that_can_be_recorded(flash):
    """Tensors that stay, of which a step fills the first rows; the others are of length 0."""
    case = Case([(1, 300), (1, 7)], 256)
    plan = flash_attn.make_decode_plan(4, 3, 256, CPU)
    places = plan.seq_lens.data_ptr(), plan.block_tables.data_ptr()
    flash_attn.fill_decode_plan(plan, torch.ones(4, dtype=torch.int32), torch.ones(4, 3).int())
    flash_attn.fill_decode_plan(plan, case.lens, case.tables)
    assert (plan.seq_lens.data_ptr(), plan.block_tables.data_ptr()) == places
    assert plan.seq_lens.tolist() == [300, 7, 0, 0]
    padded = torch.cat((case.query, case.query))
    found = flash_attn.paged_attention(padded, *case.caches, plan, scale=0.3)
    assert not found[2:].any()
    case.check(composed("FLASH_ATTN"))
    expected = composed("FLASH_ATTN").paged_attention(
        case.query, *case.caches, case.plan(composed("FLASH_ATTN")), scale=0.3
    )
    torch.testing.assert_close(found[:2], expected)


@given(
    parts=steps(block_size=8),
    window=st.none() | st.integers(1, 20),
    softcap=st.none() | st.just(2.0),
)
def test_flashinfer_is_called_as_it_is_documented(infer, parts, window, softcap):
    operations = flashinfer.FlashInfer.operations(CPU)
    backend = type("Fake", (), {name: staticmethod(each) for name, each in operations.items()})
    Case(parts, 8).check(backend, sliding_window=window, softcap=softcap)


def test_flashinfer_plans_once_for_all_layers_of_a_kind(infer):
    """By two wrappers in turn, so that a plan on its way is not written over."""
    operations = flashinfer.FlashInfer.operations(CPU)
    backend = type("Fake", (), {name: staticmethod(each) for name, each in operations.items()})
    case = Case([(1, 9), (3, 20)], 8)
    for step in range(4):
        plan = case.plan(backend)
        for window in (None, 5, None, 5):
            case.check(backend, plan, sliding_window=window)
        assert len(infer.plans) == 2 * (step + 1)
    assert len(infer.wrappers) == 4
    assert infer.plans[0] is not infer.plans[2]
    assert infer.plans[0] is infer.plans[4]
    with pytest.raises(ValueError, match="ALiBi"):
        case.check(backend, alibi_slopes=torch.ones(4))


# -- the choice ------------------------------------------------------------------------------------


def needs(dtype=torch.bfloat16, cache_dtype=None, block_size=256, **layer):
    layer = {"num_heads": 8, "num_kv_heads": 2, "head_dim": 128, **layer}
    return AttentionNeeds(
        dtype=dtype,
        cache_dtype=cache_dtype or dtype,
        block_size=block_size,
        layers=frozenset([LayerNeeds(**layer)]),
    )


@pytest.mark.parametrize(
    ("name", "asked", "words"),
    [
        ("FLASH_ATTN", {"block_size": 16}, "set block_size=256"),
        ("FLASH_ATTN", {"dtype": torch.float32}, "set dtype"),
        ("FLASH_ATTN", {"cache_dtype": torch.int8}, "kv_cache_dtype='auto'"),
        ("FLASH_ATTN", {"head_dim": 320}, "320 dimensions"),
        ("FLASHINFER", {"has_alibi": True}, "slopes of its own"),
        ("FLASHINFER", {"head_dim": 80}, "64, 128 and 256"),
        ("FLASHINFER", {"cache_dtype": torch.float8_e4m3fn}, "kv_cache_dtype='auto'"),
        ("FLASHINFER", {"dtype": torch.float32}, "set dtype"),
    ],
)
def test_what_somebody_cannot_do_is_refused_with_who_can(name, asked, words, flash, infer):
    reason = why_not(name, GPU, needs(**asked))
    assert words in reason
    assert "What can be used here: " in reason
    assert "SDPA" in reason.partition("What can be used here: ")[2]
    assert name not in reason.partition("What can be used here: ")[2]


def test_what_somebody_can_do_is_not_refused(flash, infer, monkeypatch):
    monkeypatch.setattr(quire.kernels.attention.own.triton, "why_missing", lambda: None)
    monkeypatch.setattr(
        quire.kernels.attention.own.triton.TritonBackend, "supports", lambda device: True
    )
    assert set(usable_attention(GPU)) == set(ATTENTION)
    plain = needs(sliding_window=7, softcap=30.0)
    assert all(why_not(name, GPU, plain) is None for name in ATTENTION)
    assert why_not("FLASH_ATTN", GPU, needs(has_alibi=True)) is None
    assert why_not("SDPA", CPU, needs(cache_dtype=torch.int8, block_size=3, head_dim=20)) is None


@pytest.mark.parametrize("module", ["flash_attn", "flashinfer"])
def test_a_package_that_is_not_there_is_named_with_how_to_get_it(module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    name = {"flash_attn": "FLASH_ATTN", "flashinfer": "FLASHINFER"}[module]
    assert f"pip install {module.replace('_', '-')}" in why_not(name, GPU, needs())
    assert "it is for devices of type 'cuda'" in why_not(name, CPU, needs())
    monkeypatch.setitem(sys.modules, module, ModuleType(module))
    assert "install" in why_not(name, GPU, needs())


def test_every_name_of_the_argument_is_one_of_the_kernels():
    assert set(ATTENTION_BACKENDS.values()) == set(ATTENTION)
    for name in ATTENTION:
        assert ATTENTION_BACKENDS[name] == name


def test_a_backend_is_as_it_was_but_for_its_attention(flash):
    base = get_backend("cpu")
    kernels = with_attention(base, "SDPA", CPU)
    assert kernels is with_attention(base, "SDPA", CPU)
    assert kernels.name == f"{base.name} with SDPA"
    assert kernels.rms_norm == base.rms_norm
    assert kernels.paged_attention is ReferenceBackend.paged_attention
    assert not hasattr(kernels, "library"), "the native model computes its own"
    assert not records_decode(kernels)
    # Whose writing into the cache leaves nothing out is not recorded, whatever attention can do.
    assert not records_decode(with_attention(base, "FLASH_ATTN", CPU))
    own = {"make_decode_plan": print, "fill_decode_plan": print}
    recorded = type("Recorded", (ReferenceBackend,), own)()
    assert (
        with_attention(recorded, "FLASH_ATTN", CPU).make_decode_plan is flash_attn.make_decode_plan
    )
    assert not records_decode(with_attention(recorded, "SDPA", CPU))
    assert with_attention(get_backend("cpu", "reference"), "SDPA", CPU) is get_backend(
        "cpu", "reference"
    )


def test_a_model_runs_with_torchs_attention(tiny_llama, monkeypatch):
    """On a CPU as well, and by the argument as by the environment."""
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    found = []
    for options, env in (({}, ""), ({"attention_backend": "torch_sdpa"}, ""), ({}, "sdpa")):
        monkeypatch.setenv("QUIRE_ATTENTION_BACKEND", env)
        with LLM(str(tiny_llama), dtype="float32", **options) as llm:
            has_native = llm.llm_engine._runner.model.native is not None
            assert has_native is (not options and not env and get_backend("cpu").name == "cpu")
            [output] = llm.generate([[5, 6, 7, 8]], params, use_tqdm=False)
        found.append(list(output.outputs[0].token_ids))
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("name", ["TRITON", "FLASH_ATTN", "FLASHINFER"])
def test_an_engine_refuses_attention_that_cannot_be_had(name, tiny_llama):
    with pytest.raises(
        ConfigError, match=rf"attention_backend='{name}': .*What can be used here: SDPA"
    ):
        LLM(str(tiny_llama), attention_backend=name, device="cpu")


def test_what_the_environment_asks_for_in_vain_is_said_so(tiny_llama, monkeypatch):
    """By the name that the user has given it, and without names that would be of no use."""
    monkeypatch.setenv("QUIRE_ATTENTION_BACKEND", "flashinfer")
    with pytest.raises(ConfigError, match=r"^QUIRE_ATTENTION_BACKEND='FLASHINFER': it is for"):
        LLM(str(tiny_llama), dtype="float32")
    with pytest.raises(ConfigError) as caught:
        honour_attention_backend({"QUIRE_ATTENTION_BACKEND": "xformer"})
    assert "did you mean" not in str(caught.value)


def test_the_environment_names_attention_or_kernels(monkeypatch, caplog):
    monkeypatch.delenv("QUIRE_KERNELS", raising=False)
    assert honour_attention_backend({}) is None
    assert honour_attention_backend({"QUIRE_ATTENTION_BACKEND": "flash_attn"}) == "FLASH_ATTN"
    assert honour_attention_backend({"VLLM_ATTENTION_BACKEND": "nonsense"}) is None
    assert not caplog.records
    vllm = {"VLLM_ATTENTION_BACKEND": "FLASHINFER"}
    assert honour_attention_backend(vllm, of_vllm=True) is None
    assert "has no effect; attention_backend= or QUIRE_ATTENTION_BACKEND" in caplog.text
    with pytest.raises(ConfigError, match="did you mean FLASH_ATTN"):
        honour_attention_backend({"QUIRE_ATTENTION_BACKEND": "FLASH_ATN"})
