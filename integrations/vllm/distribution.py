"""The package ``vllm`` as `importlib.metadata` is told of it."""

from __future__ import annotations

from importlib.metadata import Distribution
from typing import Any

from quire.integrations.vllm.release import VERSION


class StandInDistribution(Distribution):
    """What :mod:`importlib.metadata` is told of the package ``vllm``."""

    def read_text(self, filename: str) -> str | None:
        """Return one of the files that describe a package; there is but one."""
        if filename != "METADATA":
            return None
        return (
            "Metadata-Version: 2.1\n"
            "Name: vllm\n"
            f"Version: {VERSION}\n"
            "Summary: quire, under the names of vLLM\n"
        )

    def locate_file(self, path: Any) -> Any:
        """Return where a file of the package is; none is anywhere."""
        raise FileNotFoundError(f"{path}: the package vllm is served by quire and has no files")
