"""What an environment in which the stand-in is enabled imports when Python starts."""

from __future__ import annotations

import sys

from quire.integrations.vllm.finder import Finder, installed

if installed() is None:
    # Last, so that a real vLLM that is installed later is found first.
    sys.meta_path.append(Finder())
