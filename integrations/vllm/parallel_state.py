"""What scripts of vLLM's call when they are done with an LLM."""

from __future__ import annotations

import gc


def destroy_model_parallel() -> None:
    """Do nothing: an engine's ranks end with it."""


def destroy_distributed_environment() -> None:
    """Do nothing: an engine's ranks end with it."""


def cleanup_dist_env_and_memory(shutdown_ray: bool = False) -> None:
    """Collect what nobody refers to any more, as an LLM whose last variable was deleted.

    Parameters
    ----------
    shutdown_ray : bool
        Also leave the Ray cluster that this process is in.
    """
    gc.collect()
    if shutdown_ray:
        import ray

        ray.shutdown()
