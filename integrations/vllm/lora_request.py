"""vLLM's LoRARequest: equal ones have equal names."""

from __future__ import annotations

from dataclasses import dataclass

from quire.lora_request import LoRARequest as QuireLoRARequest


@dataclass(frozen=True, eq=False)
class LoRARequest(QuireLoRARequest):
    """An adapter by its name and its place, see :class:`quire.LoRARequest`.

    Parameters
    ----------
    is_3d_lora_weight : bool
        Taken as it is: a checkpoint's own layout says so here.
    """

    is_3d_lora_weight: bool = False

    def __eq__(self, other: object) -> bool:
        return isinstance(other, QuireLoRARequest) and self.lora_name == other.lora_name

    def __hash__(self) -> int:
        return hash(self.lora_name)
