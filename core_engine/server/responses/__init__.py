"""OpenAI's Responses API in terms of a chat: items in, items and events out."""
