"""RequestConstraints: the requests that wait for their grammar, and the masks of those that run."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Row
from concurrent.futures import Future
from typing import TYPE_CHECKING

from quire.errors import InvalidRequestError
from quire.structured.compiler import Compilation, ConstraintCompiler
from quire.structured.masks import MaskFiller, MaskRequest, Masks
from quire.structured.validator import require_jsonschema
from quire.structured.vocabulary import Vocabulary

if TYPE_CHECKING:
    import torch

    from quire.config import EngineConfig
    from quire.engine.live_request import LiveRequest
    from quire.engine.sequence import Sequence
    from quire.sampling_params import SamplingParams
    from quire.tokenizer.tokenizer import Tokenizer

_PAUSE_SECONDS = 0.01
"""How long a step without work waits for a grammar before it looks for new requests."""

_MOST_DRAFTS = 32
"""Forced tokens that one step computes of a sequence."""

_MOST_FORCED_READ = 1 << 16
"""Forced tokens that a library may look at for a step's drafts: for each it reads all that follow,
and everyone in the batch waits for it."""


class RequestConstraints:
    """What an engine does about ``structured_outputs``.

    Parameters
    ----------
    config : EngineConfig
    tokenizer : Tokenizer or None
    vocab_size : int
    device : torch.device
        Where the logits are.
    """

    def __init__(
        self,
        config: EngineConfig,
        tokenizer: Tokenizer | None,
        *,
        vocab_size: int,
        device: torch.device,
    ) -> None:
        settings = config.structured
        self._backend = settings.structured_outputs_backend
        self._drafts_forced = settings.structured_outputs_forced_tokens
        self._compiler = ConstraintCompiler(
            lambda: Vocabulary(tokenizer, vocab_size),
            deadline=settings.structured_outputs_deadline,
        )
        self._vocab_size = vocab_size
        self._max_num_seqs = config.scheduler.max_num_seqs
        self._device = device
        self._filler: MaskFiller | None = None
        self._waiting: dict[str, tuple[LiveRequest, Compilation]] = {}

    def check(self, params: SamplingParams, eos_token_ids: frozenset[int]) -> None:
        """Refuse what no constraint can give.

        Raises
        ------
        InvalidRequestError
        """
        wanted = params.structured_outputs
        if wanted is None:
            return
        if params.use_beam_search and not eos_token_ids and not params.stop_token_ids:
            raise InvalidRequestError(
                "use_beam_search must be False with structured_outputs where no token ends a "
                "text (the model has none, or ignore_eos=True): hypotheses end with one"
            )
        if wanted.drop_unsupported:
            require_jsonschema()

    def add(self, live: LiveRequest) -> None:
        """Let a request, whose sequences are all deferred, wait for its grammar."""
        params = live.request.params
        wanted = params.structured_outputs
        assert wanted is not None
        compilation = self._compiler.submit(wanted.backend or self._backend, wanted.spec)
        self._waiting[live.request.request_id] = live, compilation

    def forget(self, live: LiveRequest) -> None:
        """Let a request go that may be waiting."""
        self._waiting.pop(live.request.request_id, None)

    def take_ready(
        self, *, wait_for_all: bool = False
    ) -> list[tuple[LiveRequest, BaseException | None]]:
        """Return the requests that need wait no longer, with what went wrong.

        Parameters
        ----------
        wait_for_all
            Let none wait any longer, so that when a request begins is no matter of time.
        """
        if not self._waiting:
            return []
        self._compiler.expire()
        while wait_for_all and not all(each.done for _, each in self._waiting.values()):
            self.wait()
            self._compiler.expire()
        ready: list[tuple[LiveRequest, BaseException | None]] = []
        for live, compilation in list(self._waiting.values()):
            if not compilation.done:
                continue
            self.forget(live)
            error = compilation.error
            try:
                live.validator = compilation.validator
                if compilation.compiled is not None:
                    for sequence in live.deferred:
                        sequence.constraint = compilation.compiled.start()
            except Exception as raised:
                error = raised
            ready.append((live, error))
        return ready

    def wait(self) -> None:
        """Wait for a grammar, but not for long: other requests may come."""
        self._compiler.wait(_PAUSE_SECONDS)

    def propose(self, live: LiveRequest, sequence: Sequence) -> None:
        """Make drafts of what a sequence's grammar forces, now that it has a new last token."""
        constraint = sequence.constraint
        if constraint is None or live.beam is not None or not self._drafts_forced:
            return
        assert live.request.params.max_tokens is not None
        # One token more than its drafts is what a step can give a sequence.
        room = live.request.params.max_tokens - len(sequence.output_token_ids) - 1
        forced = constraint.forced_tokens()
        count = min(room, _MOST_DRAFTS, _MOST_FORCED_READ // max(len(forced), 1))
        sequence.draft_token_ids = forced[: max(0, count)]

    def start_masks(
        self, sequences: Row[Sequence], num_drafts: Row[int], requests: Mapping[str, LiveRequest]
    ) -> Future[Masks] | None:
        """Begin to fill the masks of the sequences that are to be given a token, if any has one.

        The logits have a row for each of the sequences, and one more for each of its drafts.
        """
        wanted: list[MaskRequest] = []
        place = 0
        for sequence, count in zip(sequences, num_drafts, strict=True):
            if sequence.constraint is not None:
                live = requests[sequence.request_id]
                drafts = sequence.draft_token_ids[:count]
                ends = live.eos_token_ids, live.stop_token_ids
                wanted.append(MaskRequest(place, sequence.constraint, drafts, *ends))
            place += 1 + count
        if not wanted:
            return None
        if self._filler is None:
            self._filler = MaskFiller(
                vocab_size=self._vocab_size, max_num_seqs=self._max_num_seqs, device=self._device
            )
        return self._filler.start(wanted)

    def close(self) -> None:
        """End the threads."""
        self._waiting.clear()
        self._compiler.close()
        if self._filler is not None:
            self._filler.close()
            self._filler = None
