"""Tokenizers and chat templates, as callers of vLLM have them: those of transformers."""

from __future__ import annotations

import os
from typing import Any

from quire.models import hub


def get_tokenizer(
    tokenizer_name: str | os.PathLike[str],
    *args: Any,
    tokenizer_mode: str = "auto",
    trust_remote_code: bool = False,
    revision: str | None = None,
    download_dir: str | None = None,
    truncation_side: str = "left",
    **kwargs: Any,
) -> Any:
    """Return a model's tokenizer as transformers makes it.

    Parameters
    ----------
    tokenizer_name : str or path
        A folder, a name on the hub, or ``"quire/demo"``.
    tokenizer_mode : str
        ``"slow"`` asks for the one in Python; all others are ``"auto"``.
    trust_remote_code : bool
        Whether code of the tokenizer's folder may run.
    revision, download_dir : str, optional
        Of a name on the hub.
    truncation_side : str
    **kwargs
        For ``AutoTokenizer.from_pretrained``.

    Returns
    -------
    transformers.PreTrainedTokenizerBase
    """
    from transformers import AutoTokenizer

    if tokenizer_mode == "slow":
        kwargs.setdefault("use_fast", False)
    where = hub.resolve(
        os.fspath(tokenizer_name),
        revision=revision,
        download_dir=download_dir,
        allow_patterns=hub.BESIDE_WEIGHTS,
        field="tokenizer_name",
    )
    return AutoTokenizer.from_pretrained(
        where,
        *args,
        trust_remote_code=trust_remote_code,
        truncation_side=truncation_side,
        **kwargs,
    )


def resolve_chat_template(
    tokenizer: Any,
    chat_template: str | None = None,
    tools: list[dict[str, Any]] | None = None,
    **_: Any,
) -> str | None:
    """Return the template by which conversations are written out; None: there is none.

    Parameters
    ----------
    tokenizer
        Of transformers' or of quire's.
    chat_template : str, optional
        Goes before the tokenizer's own; or the name of one of those it has.
    tools : list of dict, optional
        Functions: a tokenizer may have a template of its own for calls to them.
    """
    own: Any = getattr(tokenizer, "chat_template", None)
    if isinstance(own, dict):
        if chat_template in own:
            named: str = own[chat_template]
            return named
        own = (own.get("tool_use") if tools else None) or own.get("default")
    return chat_template if chat_template is not None else own
