"""What ranks do in tests of whole models; see rank_processes.py."""

from __future__ import annotations

import hashlib
import os
import random
import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from coded_decoders import CPU, load_decoder
from paged import PagedRunner
from random_adapters import random_adapter

from quire.kernels import get_backend
from quire.kernels.cpu.library import load_library
from quire.models.decoder import Decoder
from quire.parallel.shared_memory import SharedMemory


class StagedDecoder:
    """One rank's decoder, which takes what the stage before sends and sends what it makes.

    To a `PagedRunner` it is a whole one: the first rank of the first stage returns all logits, and
    the others nothing of use. Logits are gathered in the last stage and sent on to the first.
    """

    def __init__(self, decoder: Decoder, memory: SharedMemory) -> None:
        self.decoder, self.memory, self.weights = decoder, memory, decoder.weights
        self.group, self.link = memory.group(), memory.link()
        self.digest = hashlib.sha256()

    def kv_cache_layers(self) -> list[tuple[int, int]]:
        return self.decoder.kv_cache_layers()

    def forward(self, batch: Any, kv_caches: Any) -> torch.Tensor:
        place, hidden = self.decoder.place, None
        shape = (len(batch.input_ids), self.decoder.spec.hidden_size)
        if not place.is_first_stage:
            hidden = self.link.receive(shape, torch.float32)
        made = self.decoder.forward(batch, kv_caches, hidden)
        self.digest.update(made.float().numpy().tobytes())
        if not place.is_last_stage:
            self.link.send(made)
        return made

    def compute_logits(
        self, hidden: torch.Tensor, slots: torch.Tensor | None = None
    ) -> torch.Tensor:
        place, vocab = self.decoder.place, self.decoder.spec.vocab_size
        shape = (len(hidden), vocab)
        if place.is_last_stage:
            own = self.decoder.compute_logits(hidden, slots)
            rows = self.decoder.vocab_rows
            all_rows = torch.zeros(shape)
            all_rows[:, rows.start : rows.stop] = own
            logits = self.group.reduce(all_rows)
            check_likeliest(self.decoder, hidden, slots, own)
            if place.num_stages > 1:
                self.link.send(logits)
        if place.is_first_stage and not place.is_last_stage:
            logits = self.link.receive(shape, torch.float32)
        elif not place.is_last_stage:
            logits = torch.zeros(shape)
        return logits


def check_likeliest(
    decoder: Decoder, hidden: torch.Tensor, slots: torch.Tensor | None, own: torch.Tensor
) -> None:
    """See that the likeliest of a rank's own tokens are numbered as those of the whole model."""
    assert decoder.native is not None
    ids, highest = decoder.native.likeliest(hidden, torch.arange(len(hidden)), slots)
    best, where = own.max(dim=1)
    assert torch.equal(highest, best)
    assert torch.equal(ids, where + decoder.vocab_rows.start)


def run_models(
    memory: SharedMemory, *, cases: list[dict[str, Any]], prompts: list[list[int]]
) -> list[str]:
    """Compute prompts with each model, and return a hash of its hidden states."""
    return [_run_model(memory, prompts, **case) for case in cases]


def _run_model(
    memory: SharedMemory,
    prompts: list[list[int]],
    *,
    folder: str,
    out: str,
    dtype: str = "float32",
    isa: str = "",
    threads: int = 1,
    expert_parallel: bool = False,
    slots: Sequence[int] | None = None,
) -> str:
    """Leave the logits in a file. The first prompt is computed once more, alone: the same bits."""
    torch.set_num_threads(threads)
    library = load_library()
    isa = isa or library.quire_isas().decode().split()[0]
    assert library.quire_choose_isa(isa.encode()) == 0
    place = replace(memory.place, expert_parallel=expert_parallel)
    options: dict[str, Any] = {} if slots is None else {"max_adapters": 2}
    decoder = load_decoder(
        Path(folder),
        "cpu",
        dtype=getattr(torch, dtype),
        place=place,
        group=memory.group(),
        **options,
    )
    assert decoder.native is not None
    if slots is not None:
        put_adapters(decoder, Path(folder))
    staged = StagedDecoder(decoder, memory)
    logits = compute(staged, prompts, slots)
    alone = compute(staged, prompts[:1], None if slots is None else slots[:1])
    if place.rank == 0:
        assert torch.equal(alone[0], logits[0])
        torch.save(logits, out)
    return staged.digest.hexdigest()


def step_for_ever(memory: SharedMemory, *, folder: str, lost: int) -> None:
    """Compute one step after another, until a rank ends by signal 9."""
    place = memory.place
    decoder = load_decoder(Path(folder), "cpu", place=place, group=memory.group())
    runner = PagedRunner(decoder, get_backend(CPU), num_seqs=1, max_len=300)
    for number in range(300):
        if number == 100 and place.rank == lost:
            os.kill(os.getpid(), signal.SIGKILL)
        runner.step([(0, [number])])


def put_adapters(decoder: Decoder, folder: Path) -> None:
    """Two that change everything that an adapter may change."""
    whole = load_decoder(folder)
    for slot, seed in enumerate((3, 11)):
        adapter = random_adapter(whole, seed)
        decoder.set_adapter(slot, decoder.prepare_adapter(adapter))


def compute(
    decoder: Any, prompts: list[list[int]], slots: Sequence[int] | None
) -> list[torch.Tensor]:
    """Logits at every position."""
    runner = PagedRunner(
        decoder,
        get_backend(CPU),
        num_seqs=len(prompts),
        max_len=max(map(len, prompts)),
        adapters=slots,
    )
    return runner.prefill(prompts, seed=random.Random(len(prompts)).randrange(100))
