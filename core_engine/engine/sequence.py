"""A sequence: one line of tokens that grows, and the blocks that hold its keys and values."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from quire.models.adapter import PreparedAdapter
    from quire.structured.constraint import Constraint


class SequenceStatus(enum.Enum):
    """Where a sequence stands with the scheduler."""

    WAITING = enum.auto()
    RUNNING = enum.auto()
    PARKED = enum.auto()
    """Nothing to compute until its owner gives it another token; its blocks may be taken."""
    FINISHED = enum.auto()


class Sequence:
    """One of the lines of tokens that a request is made of.

    Attributes
    ----------
    request_id : str
    index : int
        Its number within the request.
    prompt_token_ids : list of int
        Shared with the other sequences of the request. ``num_prompt_tokens`` is their number.
    output_token_ids : list of int
    num_computed_tokens : int
        Tokens whose keys and values lie in the blocks. A step lets it catch up with
        ``num_tokens``; that is all the scheduler knows of prefill and decode.
    block_ids : list of int
    block_keys : list of bytes
        Keys of the full blocks of its tokens, as far as they were needed yet.
    root_key : bytes
        What its keys start from, see :func:`quire.engine.block_pool.root_key`.
    order : tuple of int
        Rank among all sequences: lower is served first and preempted last.
    row : int
        Its row in the step's tables while it runs, else -1.
    draft_token_ids : list of int
        What may well follow: a step computes it along, and keeps what the sequence is given.
    constraint : Constraint or None
        What its output has to match; it stands behind the last output token.
    reads_prompt : bool
        Whether somebody wants to see the hidden states of its prompt.
    skip_cached_prefix : bool
        Whether every token must be computed, as prompt logprobs demand.
    adapter : PreparedAdapter or None
        What it is computed with besides the model, until it has ended.
    adapter_slot : int
        The model's slot in which the adapter lies while it runs, else -1.
    num_passed : int
        Sequences with adapters that went before it while it was the first to wait for a slot.
    max_tokens : int or None
        Output tokens after which it ends for certain.
    num_pending_tokens : int
        1 while a step in flight gives it a token that only the device knows yet, else 0.
    host_block_ids : list of int
        The blocks of host memory that keep its first ``num_saved_tokens`` since it was preempted.
    """

    __slots__ = (
        "adapter",
        "adapter_slot",
        "block_ids",
        "block_keys",
        "constraint",
        "draft_token_ids",
        "host_block_ids",
        "index",
        "max_tokens",
        "num_cached_tokens",
        "num_computed_tokens",
        "num_passed",
        "num_pending_tokens",
        "num_prompt_tokens",
        "num_saved_tokens",
        "order",
        "output_token_ids",
        "prompt_token_ids",
        "publish",
        "reads_prompt",
        "request_id",
        "root_key",
        "row",
        "skip_cached_prefix",
        "status",
    )

    def __init__(
        self,
        request_id: str,
        index: int,
        prompt_token_ids: list[int],
        *,
        order: tuple[int, ...],
        root_key: bytes,
        publish: bool = True,
        reads_prompt: bool = False,
        skip_cached_prefix: bool = False,
        adapter: PreparedAdapter | None = None,
        max_tokens: int | None = None,
    ) -> None:
        self.request_id = request_id
        self.index = index
        self.prompt_token_ids = prompt_token_ids
        self.num_prompt_tokens = len(prompt_token_ids)
        self.output_token_ids: list[int] = []
        self.order = order
        self.root_key = root_key
        self.publish = publish
        self.reads_prompt = reads_prompt
        self.skip_cached_prefix = skip_cached_prefix
        self.num_computed_tokens = 0
        self.num_cached_tokens = -1
        self.block_ids: list[int] = []
        self.block_keys: list[bytes] = []
        self.row = -1
        self.draft_token_ids: list[int] = []
        self.constraint: Constraint | None = None
        self.adapter = adapter
        self.adapter_slot = -1
        self.num_passed = 0
        self.max_tokens = max_tokens
        self.num_pending_tokens = 0
        self.host_block_ids: list[int] = []
        self.num_saved_tokens = 0
        self.status = SequenceStatus.WAITING

    @property
    def num_tokens(self) -> int:
        """Prompt and output tokens, one that only the device knows included."""
        return self.num_prompt_tokens + len(self.output_token_ids) + self.num_pending_tokens

    @property
    def is_ending(self) -> bool:
        """Whether it ends for certain with the token that only the device knows."""
        if not self.num_pending_tokens or self.max_tokens is None:
            return False
        return len(self.output_token_ids) + 1 >= self.max_tokens

    @property
    def has_begun(self) -> bool:
        """Whether it, or the sequence that it goes on from, ever ran."""
        return self.num_cached_tokens >= 0

    def tokens(self, start: int, stop: int) -> list[int]:
        """Return the tokens ``start:stop``, over prompt and output."""
        num_prompt = self.num_prompt_tokens
        if stop <= num_prompt:
            return self.prompt_token_ids[start:stop]
        if start >= num_prompt:
            return self.output_token_ids[start - num_prompt : stop - num_prompt]
        return self.prompt_token_ids[start:] + self.output_token_ids[: stop - num_prompt]

    def fork(self, index: int, token_id: int) -> Sequence:
        """Return a sequence of its tokens and one more, which holds no blocks yet."""
        child = Sequence(
            self.request_id,
            index,
            self.prompt_token_ids,
            order=(*self.order[:-1], index),
            root_key=self.root_key,
            publish=self.publish,
            adapter=self.adapter,
            max_tokens=self.max_tokens,
        )
        child.num_cached_tokens = self.num_cached_tokens  # the request has begun with its parent
        child.output_token_ids = [*self.output_token_ids, token_id]
        child.block_keys = list(self.block_keys)
        if self.constraint is not None:
            child.constraint = self.constraint.copy()
            child.constraint.accept([token_id])
        return child

    def __lt__(self, other: Sequence) -> bool:
        return self.order < other.order

    def __repr__(self) -> str:
        return (
            f"Sequence({self.request_id!r}#{self.index}, {self.status.name}, "
            f"{self.num_computed_tokens}/{self.num_tokens} tokens, {len(self.block_ids)} blocks)"
        )
