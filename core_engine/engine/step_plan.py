"""StepPlan: what one step computes, and what has to be done for it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from quire.engine.sequence import Sequence


@dataclass(slots=True)
class StepPlan:
    """What one step computes.

    Attributes
    ----------
    sequences : list of Sequence
        Those with at least one token to compute.
    num_new_tokens : list of int
        How many tokens each of them computes.
    admitted : list of Sequence
        Those among them that did not run before this step.
    preempted : list of Sequence
        Those that lost their blocks in favour of others; released before ``admitted`` enter.
    grown : list of Sequence
        Those among ``sequences`` that hold blocks they did not hold before.
    num_drafts : list of int
        How many of the tokens that each of them computes are drafts.
    num_tokens : int
        Tokens computed in this step, drafts included; ``num_draft_tokens`` of them are.
    reads_prompts : bool
        Whether hidden states of the prompt are wanted of any of the sequences.
    swap_out, swap_in : list of (int, int)
        Blocks whose content goes to the host's memory, or comes back from there, each with its
        host block: first out, then in, and all before anything is computed.
    restored : list of (Sequence, int, int)
        Whose blocks, from which to before which, are then full without being computed.
    """

    sequences: list[Sequence] = field(default_factory=list)
    num_new_tokens: list[int] = field(default_factory=list)
    admitted: list[Sequence] = field(default_factory=list)
    preempted: list[Sequence] = field(default_factory=list)
    grown: list[Sequence] = field(default_factory=list)
    num_drafts: list[int] = field(default_factory=list)
    num_tokens: int = 0
    num_draft_tokens: int = 0
    reads_prompts: bool = False
    swap_out: list[tuple[int, int]] = field(default_factory=list)
    swap_in: list[tuple[int, int]] = field(default_factory=list)
    restored: list[tuple[Sequence, int, int]] = field(default_factory=list)

    def add(self, sequence: Sequence, num_new_tokens: int) -> None:
        """Let a sequence compute its next tokens."""
        self.sequences.append(sequence)
        self.num_new_tokens.append(num_new_tokens)
        self.num_drafts.append(0)
        self.num_tokens += num_new_tokens
        if sequence.reads_prompt:
            self.reads_prompts = True

    def add_drafts(self, place: int, count: int) -> None:
        """Let the sequence at a place compute some drafts besides."""
        self.num_drafts[place] = count
        self.num_new_tokens[place] += count
        self.num_tokens += count
        self.num_draft_tokens += count
