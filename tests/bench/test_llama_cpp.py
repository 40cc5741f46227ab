"""llama.cpp's side puts batches together as llama.cpp wants them, and asks for nothing more."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.bench.llama_cpp import LlamaCppSide
from quire.bench.workload import Workload

VOCAB_SIZE = 50


class FakeLibrary:
    """The functions that are called, on sequences whose next token is a sum of all before."""

    __version__ = "0"

    def __init__(self) -> None:
        self.sequences: dict[int, list[int]] = {}
        self.batches: list[int] = []
        self.contexts: list[SimpleNamespace] = []
        simple = {
            "llama_log_callback": lambda function: function,
            "llama_log_set": lambda function, data: None,
            "llama_backend_init": lambda: None,
            "llama_model_default_params": SimpleNamespace,
            "llama_context_default_params": SimpleNamespace,
            "llama_model_load_from_file": lambda path, params: path != b"missing",
            "llama_model_get_vocab": lambda model: model,
            "llama_vocab_n_tokens": lambda vocab: VOCAB_SIZE,
            "llama_get_memory": lambda context: context,
            "llama_memory_clear": lambda memory, data: self.sequences.clear(),
            "llama_memory_seq_rm": lambda memory, slot, low, high: self.sequences.pop(slot),
            "llama_free": lambda context: None,
            "llama_print_system_info": lambda: b"CPU : AVX2 = 1 | AVX512 = 0 | FMA = 1 |",
        }
        vars(self).update(simple)

    def llama_init_from_model(self, model, params):
        self.contexts.append(params)
        return params

    def llama_batch_init(self, size, width, num_seqs):
        columns = {name: [None] * size for name in ("token", "pos", "n_seq_id", "logits")}
        return SimpleNamespace(**columns, seq_id=[[None] for _ in range(size)], n_tokens=0)

    def llama_decode(self, context, batch):
        self.outputs = {}
        self.batches.append(batch.n_tokens)
        for i in range(batch.n_tokens):
            assert batch.n_seq_id[i] == 1
            slot = batch.seq_id[i][0]
            assert 0 <= slot < context.n_seq_max
            sequence = self.sequences.setdefault(slot, [])
            assert batch.pos[i] == len(sequence), "positions follow each other"
            sequence.append(batch.token[i])
            assert len(sequence) <= context.n_ctx // context.n_seq_max
            if batch.logits[i]:
                self.outputs[i] = sum(sequence) % VOCAB_SIZE
        return 0

    def llama_get_logits_ith(self, context, index):
        return numpy.eye(VOCAB_SIZE)[self.outputs[index]]


@pytest.fixture
def library(monkeypatch):
    fake = FakeLibrary()
    monkeypatch.setitem(sys.modules, "llama_cpp", fake)
    return fake


@given(
    requests=st.lists(
        st.tuples(st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=30),
                  st.integers(1, 6)),
        min_size=1, max_size=9,
    ),
    max_num_seqs=st.integers(1, 4),
    batch_size=st.integers(1, 20),
)  # fmt: skip
def test_every_token_is_computed_once_and_in_order(library, requests, max_num_seqs, batch_size):
    """Whatever the room in a batch and the number of sequences at once; a second run, too."""
    prompts, lens = [p for p, _ in requests], [n for _, n in requests]
    library.batches.clear()
    side = LlamaCppSide("m", num_threads=1, max_num_seqs=max_num_seqs, batch_size=batch_size)
    for _ in range(2):
        figures = side.run(Workload("w", prompts, lens))
        assert 0 < figures["first_token_seconds"] <= figures["seconds"]
    # The last token of each is not computed: nothing comes after it.
    assert sum(library.batches) == 2 * sum(len(p) + n - 1 for p, n in requests)
    assert max(library.batches) <= batch_size
    assert min(library.batches) >= 1


def test_a_larger_workload_gets_a_larger_context(library):
    """And a smaller one runs in what there is."""
    side = LlamaCppSide("m", num_threads=3)
    for count, length in ((2, 10), (3, 300), (1, 20)):
        side.run(Workload("w", [[1] * length] * count, [2] * count))
    assert [(c.n_seq_max, c.n_ctx) for c in library.contexts] == [(2, 512), (3, 1536)]
    assert {c.n_threads for c in library.contexts} == {3}


def test_it_says_what_it_is(library):
    """The build's features matter as much as the version does."""
    versions = LlamaCppSide("m", num_threads=1).versions()
    assert versions == {"llama-cpp-python": "0", "ggml": "AVX2 FMA"}
    with pytest.raises(RuntimeError, match="cannot load missing"):
        LlamaCppSide("missing", num_threads=1)
