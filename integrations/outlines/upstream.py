"""What is used of Outlines beyond its manual: this file is to be looked at when it changes.

Outlines decides by the class of a model how it is called: a class of its own that is not among
those it knows is refused. The sync model is therefore a subclass of its class for vLLM in the same
process, and the async one of that for a vLLM server, which are called with output types as users
wrote them; their constructors and methods are all replaced. What an output type means to Outlines
is said by its terms.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import get_args

try:
    from outlines.inputs import Audio, Chat, Image, Video
    from outlines.models import (
        AsyncBlackBoxModel,
        BlackBoxModel,
        VLLMOffline,
    )
    from outlines.models import AsyncVLLM as AsyncServerModel
    from outlines.models.base import ModelTypeAdapter
    from outlines.types.dsl import (
        CFG,
        Alternatives,
        Choice,
        JsonSchema,
        KleenePlus,
        KleeneStar,
        Optional,
        QuantifyBetween,
        QuantifyExact,
        QuantifyMaximum,
        QuantifyMinimum,
        Regex,
        Sequence,
        String,
        Term,
        python_types_to_terms,
        to_regex,
    )
except ModuleNotFoundError as error:
    if error.name != "outlines":
        raise
    raise ImportError(
        "quire.integrations.outlines needs Outlines: pip install 'quire[outlines]'"
    ) from error
except ImportError as error:
    raise ImportError(
        f"quire.integrations.outlines is written for Outlines 1.3, and {version('outlines')} is "
        f"installed, which is another: {error}; pip install 'quire[outlines]'"
    ) from error

if VLLMOffline not in get_args(BlackBoxModel) or AsyncServerModel not in get_args(
    AsyncBlackBoxModel
):
    raise ImportError(
        f"quire.integrations.outlines is written for Outlines 1.3, and {version('outlines')} is "
        "installed, which knows other models; pip install 'quire[outlines]'"
    )

__all__ = [
    "CFG",
    "Alternatives",
    "AsyncServerModel",
    "Audio",
    "Chat",
    "Choice",
    "Image",
    "JsonSchema",
    "KleenePlus",
    "KleeneStar",
    "ModelTypeAdapter",
    "Optional",
    "QuantifyBetween",
    "QuantifyExact",
    "QuantifyMaximum",
    "QuantifyMinimum",
    "Regex",
    "Sequence",
    "String",
    "Term",
    "VLLMOffline",
    "Video",
    "python_types_to_terms",
    "to_regex",
]
