"""ParallelConfig: how many processes and devices compute one model."""

from __future__ import annotations

from dataclasses import dataclass

from quire.config import checks
from quire.config.checked import Checked, argument
from quire.errors import ConfigError

DATA_BACKENDS = ("mp", "ray")
BACKENDS = ("uni", "mp", "ray", "external_launcher")


@dataclass(frozen=True, kw_only=True)
class ParallelConfig(Checked):
    """How a model is spread over processes, each with a device of its own.

    Attributes
    ----------
    tensor_parallel_size : int
        Ranks that compute each layer together, each with a share of its matrices and heads.
    pipeline_parallel_size : int
        Stages, each with a share of the layers.
    data_parallel_size : int
        Copies of all of it, among which requests are divided: see ``core_engine/replicas``.
    data_parallel_backend : {"mp", "ray"}
        What starts these copies: processes of this machine, or Ray, with ``quire serve``.
    enable_expert_parallel : bool
        Let each rank of a mixture of experts have whole experts, in place of a share of each.
    distributed_executor_backend : {"uni", "mp", "ray", "external_launcher"} or None
        What starts the other ranks: nothing, for there are none; processes of this machine; Ray;
        or a launcher such as torchrun, which has started them all. None: ``"mp"`` where there are
        several.
    """

    tensor_parallel_size: int = argument(1, checks.integer(1, 1024))
    pipeline_parallel_size: int = argument(1, checks.integer(1, 1024))
    data_parallel_size: int = argument(1, checks.integer(1, 1024))
    data_parallel_backend: str = argument("mp", checks.choice(*DATA_BACKENDS))
    enable_expert_parallel: bool = argument(False, checks.boolean)
    distributed_executor_backend: str | None = argument(None, checks.choice(*BACKENDS))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.distributed_executor_backend == "uni" and self.num_ranks > 1:
            raise ConfigError(
                "distributed_executor_backend='uni' is one process, and tensor_parallel_size="
                f"{self.tensor_parallel_size} times pipeline_parallel_size="
                f"{self.pipeline_parallel_size} are {self.num_ranks}: use 'mp', or leave it out"
            )

    @property
    def num_ranks(self) -> int:
        """Processes that compute one copy of the model."""
        return self.tensor_parallel_size * self.pipeline_parallel_size

    @property
    def backend(self) -> str:
        """What starts the other ranks, decided."""
        if self.distributed_executor_backend is not None:
            return self.distributed_executor_backend
        return "mp" if self.num_ranks > 1 else "uni"
