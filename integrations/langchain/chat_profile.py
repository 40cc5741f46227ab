"""What LangChain wants to know of a chat model's abilities."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quire.chat import ChatFormat
    from quire.engine.processor import ModelLimits


def chat_profile(name: str, limits: ModelLimits, chat_format: ChatFormat) -> dict[str, Any]:
    """Return a model profile, with the keys of LangChain's ``ModelProfile``.

    Parameters
    ----------
    name : str
    limits : ModelLimits
    chat_format : ChatFormat
        What can be read from answers: tool calls, reasoning.
    """
    has_tools = chat_format.tool_parser is not None
    other_inputs = ("image", "image_url", "pdf", "audio", "video")
    return {
        "name": name,
        "max_input_tokens": limits.max_model_len,
        "max_output_tokens": limits.max_model_len,
        "text_inputs": True,
        **{f"{kind}_inputs": False for kind in other_inputs},
        "image_tool_message": False,
        "pdf_tool_message": False,
        "text_outputs": True,
        **{f"{kind}_outputs": False for kind in ("image", "audio", "video")},
        "reasoning_output": chat_format.reasoning_parser is not None,
        "tool_calling": has_tools,
        "tool_choice": has_tools,
        "tool_call_streaming": has_tools,
        "structured_output": True,
    }
