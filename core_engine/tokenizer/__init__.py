"""Text to token ids and back."""

from __future__ import annotations

from quire.tokenizer.detokenizer import Detokenizer
from quire.tokenizer.loader import TOKENIZER_MODES, load_tokenizer
from quire.tokenizer.tokenizer import Tokenizer

__all__ = ["TOKENIZER_MODES", "Detokenizer", "Tokenizer", "load_tokenizer"]
