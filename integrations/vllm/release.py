"""Which release of vLLM the stand-in follows."""

from __future__ import annotations

from quire import __version__

FOLLOWED = "0.33.0"
"""The release whose names and behaviour are followed."""

VERSION = f"{FOLLOWED}+quire.{__version__}"
"""What ``vllm.__version__`` says: greater than the release itself, and whose it is."""

VERSION_TUPLE = (*map(int, FOLLOWED.split(".")), f"quire.{__version__}")
