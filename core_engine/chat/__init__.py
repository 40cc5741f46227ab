"""quire.chat: conversations and tools to what templates take, and answers to messages.

It knows neither HTTP nor an engine: the server and the chat models of other libraries stand on it.
"""

from quire.chat.format import ChatFormat
from quire.chat.message import ChatDelta, ChatMessage, ToolCall, ToolCallDelta
from quire.chat.messages import template_messages
from quire.chat.reader import ChatReader
from quire.chat.registry import reasoning_parser_names, tool_parser_names
from quire.chat.tools import template_tools

__all__ = [
    "ChatDelta",
    "ChatFormat",
    "ChatMessage",
    "ChatReader",
    "ToolCall",
    "ToolCallDelta",
    "reasoning_parser_names",
    "template_messages",
    "template_tools",
    "tool_parser_names",
]
