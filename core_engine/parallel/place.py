"""Place: where one rank of a model stands among the others."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """Where one rank of a model stands.

    The ranks of a stage compute each of its layers together, every one a share; the stages have a
    stretch of the layers each. Rank 0 is the engine's own process.

    Attributes
    ----------
    tensor_rank, tensor_size
        Which of the stage's ranks it is, and how many there are.
    stage, num_stages
        Which stretch of the layers it has, and how many there are.
    expert_parallel
        Whether the ranks of a stage share out the experts of a mixture, each whole, in stead of
        having a share of every one.
    """

    tensor_rank: int = 0
    tensor_size: int = 1
    stage: int = 0
    num_stages: int = 1
    expert_parallel: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.tensor_rank < self.tensor_size:
            raise ValueError(f"tensor_rank is {self.tensor_rank} of {self.tensor_size}")
        if not 0 <= self.stage < self.num_stages:
            raise ValueError(f"stage is {self.stage} of {self.num_stages}")

    @classmethod
    def of_rank(
        cls, rank: int, tensor_size: int = 1, num_stages: int = 1, expert_parallel: bool = False
    ) -> Place:
        """Return the place of a rank: those of a stage have consecutive numbers."""
        stage, tensor_rank = divmod(rank, tensor_size)
        return cls(tensor_rank, tensor_size, stage, num_stages, expert_parallel)

    @property
    def rank(self) -> int:
        """Its number among all ranks of the model."""
        return self.stage * self.tensor_size + self.tensor_rank

    @property
    def size(self) -> int:
        """Ranks that the model has."""
        return self.tensor_size * self.num_stages

    @property
    def is_whole(self) -> bool:
        """Whether it is the only one."""
        return self.size == 1

    @property
    def is_first_stage(self) -> bool:
        """Whether it looks tokens up."""
        return self.stage == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether it makes logits."""
        return self.stage == self.num_stages - 1

    def layers(self, num_layers: int) -> range:
        """Return the layers of its stage.

        The stages have equally many, or, where that cannot be, the first ones one more.
        """
        each, more = divmod(num_layers, self.num_stages)
        first = self.stage * each + min(self.stage, more)
        return range(first, first + each + (self.stage < more))


WHOLE = Place()
"""Of the only rank that a model has."""
