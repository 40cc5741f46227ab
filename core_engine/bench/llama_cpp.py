"""LlamaCppSide: llama.cpp, through the functions that ``llama-cpp-python`` binds.

The binding's own class ``Llama`` runs one sequence at a time, so batches are put together here:
as its server does, every call computes the next token of each sequence that generates and as much
of waiting prompts as the batch has room for.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from quire.bench.workload import Workload

_CELLS = 256  # llama.cpp rounds a sequence's cells up to a multiple of this


@dataclass(slots=True)
class _Sequence:
    number: int  # of the prompt
    slot: int  # llama.cpp's id of the sequence
    waiting: list[int]  # tokens that are not computed yet
    left: int  # tokens to generate
    position: int = 0
    output_index: int = -1  # where the batch has its last token, if that was reached


class LlamaCppSide:
    """llama.cpp on a GGUF file.

    Parameters
    ----------
    model : str
        The file.
    num_threads : int
    max_num_seqs : int, default 64
        Sequences that run at once at most.
    batch_size : int, default 2048
        Tokens of one call at most.
    """

    def __init__(
        self, model: str, *, num_threads: int, max_num_seqs: int = 64, batch_size: int = 2048
    ) -> None:
        self._numpy: Any = import_module("numpy")  # Any: of another environment
        self._lib: Any = import_module("llama_cpp")
        self._quiet = self._lib.llama_log_callback(lambda *_: None)
        self._lib.llama_log_set(self._quiet, None)
        self._lib.llama_backend_init()
        params = self._lib.llama_model_default_params()
        self._model = self._lib.llama_model_load_from_file(model.encode(), params)
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {model}")
        self._vocab_size = self._lib.llama_vocab_n_tokens(
            self._lib.llama_model_get_vocab(self._model)
        )
        self._num_threads, self._max_num_seqs = num_threads, max_num_seqs
        self._batch_size = batch_size
        self._batch = self._lib.llama_batch_init(batch_size, 0, 1)
        self._context: Any = None
        self._size = (0, 0)  # sequences and tokens of each that the context has room for

    def run(self, workload: Workload) -> dict[str, float]:
        """Generate, greedily; the cache starts empty."""
        self._make_room(workload)
        memory = self._lib.llama_get_memory(self._context)
        self._lib.llama_memory_clear(memory, True)
        pairs = zip(workload.prompts, workload.output_lens, strict=True)
        queue = deque(_Sequence(i, -1, list(p), n) for i, (p, n) in enumerate(pairs))
        free = list(reversed(range(self._size[0])))
        running: list[_Sequence] = []
        firsts: dict[int, float] = {}
        generated = [0] * len(workload.prompts)
        started = time.perf_counter()
        while queue or running:
            while queue and free:
                running.append(queue.popleft())
                running[-1].slot = free.pop()
            self._fill(running)
            if status := self._lib.llama_decode(self._context, self._batch):
                raise RuntimeError(f"llama_decode returned {status}")
            for sequence in running:
                if sequence.output_index < 0:
                    continue
                sequence.waiting = [self._best(sequence.output_index)]
                firsts.setdefault(sequence.number, time.perf_counter() - started)
                generated[sequence.number] += 1
                sequence.left -= 1
                if not sequence.left:
                    self._lib.llama_memory_seq_rm(memory, sequence.slot, -1, -1)
                    free.append(sequence.slot)
            running = [sequence for sequence in running if sequence.left]
        seconds = time.perf_counter() - started
        if generated != workload.output_lens:
            raise RuntimeError(f"{generated} tokens were generated, not {workload.output_lens}")
        return {"seconds": seconds, "first_token_seconds": sum(firsts.values()) / len(firsts)}

    def _make_room(self, workload: Workload) -> None:
        """Have a context with room for a workload; a larger one takes a smaller one's place."""
        pairs = zip(workload.prompts, workload.output_lens, strict=True)
        length = max(len(prompt) + count for prompt, count in pairs)
        size = min(len(workload.prompts), self._max_num_seqs), -(-length // _CELLS) * _CELLS
        if size[0] <= self._size[0] and size[1] <= self._size[1]:
            return
        if self._context is not None:
            self._lib.llama_free(self._context)
        params = self._lib.llama_context_default_params()
        params.n_seq_max, params.n_ctx = size[0], size[0] * size[1]
        params.n_batch = self._batch_size
        params.n_threads = params.n_threads_batch = self._num_threads
        self._context = self._lib.llama_init_from_model(self._model, params)
        if not self._context:
            raise RuntimeError(f"llama.cpp has no context of {size[0]} x {size[1]} tokens")
        self._size = size

    def _fill(self, running: list[_Sequence]) -> None:
        """Put waiting tokens into the batch, the oldest sequences' first."""
        batch, count = self._batch, 0
        for sequence in running:
            taken = sequence.waiting[: self._batch_size - count]
            for token in taken:
                batch.token[count] = token
                batch.pos[count] = sequence.position
                batch.n_seq_id[count] = 1
                batch.seq_id[count][0] = sequence.slot
                batch.logits[count] = 0
                sequence.position += 1
                count += 1
            del sequence.waiting[: len(taken)]
            sequence.output_index = -1
            if taken and not sequence.waiting:
                sequence.output_index = count - 1
                batch.logits[count - 1] = 1
        batch.n_tokens = count

    def _best(self, index: int) -> int:
        logits = self._lib.llama_get_logits_ith(self._context, index)
        return int(self._numpy.ctypeslib.as_array(logits, (self._vocab_size,)).argmax())

    def versions(self) -> dict[str, str]:
        """Return the binding's version, and what llama.cpp was compiled for."""
        info = self._lib.llama_print_system_info().decode()
        parts = (part.partition("=") for part in info.replace(":", "|").split("|"))
        features = [name.strip() for name, _, value in parts if value.strip() == "1"]
        return {"llama-cpp-python": self._lib.__version__, "ggml": " ".join(features)}
