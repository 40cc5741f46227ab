"""Validator: finished texts held against the schema of which a grammar enforces only a part."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final

from quire.errors import InvalidRequestError
from quire.structured.subschemas import subschemas

if TYPE_CHECKING:
    import llguidance

    from quire.structured.vocabulary import Vocabulary

_MOST_WORK = 200_000
"""Values and keywords that a validation looks at: it is done between two steps of the engine."""

_UNBOUNDED: Final = ("patternProperties", "unevaluatedItems", "unevaluatedProperties")
"""Keywords whose validation nothing would bound."""


class InvalidTextError(ValueError):
    """A finished text that does not hold to its schema; the message says where."""


class Validator:
    """A schema, as ``jsonschema`` validates it, but in bounded time and without the net.

    ``pattern`` is matched by llguidance, in linear time; the values and keywords looked at are
    counted; references lead nowhere but into the schema and to the published dialects.

    Parameters
    ----------
    schema : dict or bool
    dropped : list of str
        What the grammar does not enforce.
    vocabulary : Vocabulary

    Raises
    ------
    InvalidRequestError
        It is no valid schema, or cannot be validated so; or jsonschema is missing.
    """

    def __init__(self, schema: Any, dropped: Sequence[str], vocabulary: Vocabulary) -> None:
        require_jsonschema()
        import jsonschema
        import jsonschema_specifications

        self._vocabulary = vocabulary
        self.dropped = list(dropped)
        for inner in subschemas(schema):
            if unbounded := next((word for word in _UNBOUNDED if word in inner), None):
                raise self._refusal(f"{unbounded!r} is in it, whose validation nothing bounds")
        if isinstance(schema, dict) and not isinstance(schema.get("$schema", ""), str):
            raise self._refusal("it is no schema: $['$schema'] is no string")
        base = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
        try:
            base.check_schema(schema)
        except jsonschema.SchemaError as error:
            raise self._refusal(
                f"it is no schema: {error.json_path}: {error.message[:200]}"
            ) from None
        self._matchers: dict[str, llguidance.LLMatcher] = {}
        for inner in subschemas(schema):
            if isinstance(pattern := inner.get("pattern"), str):
                self._matchers[pattern] = matcher = _matcher(pattern)
                if matcher.is_error():
                    raise self._refusal(f"the pattern {pattern!r} is none that can be matched fast")
        own = {**base.VALIDATORS, "uniqueItems": _unique_items, "pattern": self._pattern}
        counted = {word: self._counted(check) for word, check in own.items()}
        self._validator = jsonschema.validators.extend(base, counted)(
            schema,
            registry=jsonschema_specifications.REGISTRY,
            format_checker=base.FORMAT_CHECKER,
        )
        self._work = 0

    def check(self, token_ids: Sequence[int], *, may_be_cut: bool = False) -> None:
        """Hold the text of some tokens against the schema.

        Parameters
        ----------
        token_ids : sequence of int
        may_be_cut : bool, default False
            Pass over what is no JSON: a token that stops the text came before its end.

        Raises
        ------
        InvalidTextError
            It is not valid, or that cannot be told.
        """
        tokens = self._vocabulary.tokens
        raw = b"".join(tokens[id_] for id_ in token_ids if id_ < len(tokens))
        reason = None
        self._work = 0
        try:
            try:
                value = json.loads(raw.decode())
            except (json.JSONDecodeError, UnicodeDecodeError):
                if may_be_cut:
                    return
                raise
            error = next(self._validator.iter_errors(value), None)
            if error is not None:
                reason = f"{error.json_path} does not hold to {error.validator!r}: {error.message}"
        except InvalidTextError as raised:
            reason = str(raised)
        except Exception as raised:  # such as a reference that leads nowhere, or to itself
            reason = f"it cannot be validated: {type(raised).__name__}: {raised}"
        if reason is not None:
            text = raw.decode(errors="replace")
            raise InvalidTextError(
                f"the text is not valid by its schema, of which drop_unsupported=True let "
                f"{', '.join(self.dropped)} go unenforced: {reason[:500]}; the text: {text[:500]!r}"
            )

    def _counted(self, check: Callable[..., Any]) -> Callable[..., Iterable[Any]]:
        def counted(validator: Any, value: Any, instance: Any, schema: Any) -> Iterable[Any]:
            self._work += 1 + sum(
                len(each) for each in (value, instance) if isinstance(each, (dict, list, str))
            )
            if self._work > _MOST_WORK:
                raise InvalidTextError("it cannot be validated: it takes too long")
            # A reference may lead to what is no subschema by its place, and was not looked at.
            if unbounded := next((word for word in _UNBOUNDED if word in schema), None):
                raise InvalidTextError(f"it cannot be validated: nothing bounds {unbounded!r}")
            return check(validator, value, instance, schema) or ()

        return counted

    def _pattern(self, validator: Any, pattern: str, instance: Any, schema: Any) -> Iterable[Any]:
        if isinstance(instance, str):
            matcher = self._matchers[pattern].deep_copy()
            written = list(json.dumps(instance, ensure_ascii=False).encode())
            if not (matcher.consume_tokens(written) and matcher.is_accepting()):
                from jsonschema import ValidationError

                yield ValidationError(f"{instance!r} does not match {pattern!r}")

    def _refusal(self, reason: str) -> InvalidRequestError:
        return InvalidRequestError(
            f"json cannot be enforced with drop_unsupported=True, which drops "
            f"{', '.join(self.dropped)}: {reason}"
        )


def require_jsonschema() -> None:
    """Refuse to go on without the library that validates.

    Raises
    ------
    InvalidRequestError
        It is not installed.
    """
    try:
        import jsonschema  # noqa: F401
        import jsonschema_specifications  # noqa: F401
    except ImportError as error:
        raise InvalidRequestError(
            f"drop_unsupported must be False without the package jsonschema, which validates the "
            f"texts and cannot be imported ({error}): pip install 'jsonschema>=4.20'"
        ) from error


class _Bytes:
    """A vocabulary of single bytes, for matching."""

    bos_token_id = None
    eos_token_id = 256
    special_token_ids = (256,)

    def __init__(self) -> None:
        self.tokens = [*(bytes([i]) for i in range(256)), b"<end of the text>"]

    def __call__(self, text: str) -> list[int]:
        return list(text.encode())


@functools.lru_cache(1)
def _byte_tokenizer() -> llguidance.LLTokenizer:
    import llguidance

    return llguidance.LLTokenizer(llguidance.TokenizerWrapper(_Bytes()), eos_token=256)


def _matcher(pattern: str) -> llguidance.LLMatcher:
    import llguidance

    schema = json.dumps({"type": "string", "pattern": pattern})
    grammar = llguidance.LLMatcher.grammar_from_json_schema(schema, overrides={"lenient": False})
    return llguidance.LLMatcher(_byte_tokenizer(), grammar, log_level=0)


def _unique_items(validator: Any, unique: Any, instance: Any, schema: Any) -> Iterable[Any]:
    """Find equal items by what they say, not each by each."""
    if unique and isinstance(instance, list):
        from jsonschema import ValidationError

        if len({_canonical(item) for item in instance}) < len(instance):
            yield ValidationError("its items are not all different")


def _canonical(value: Any) -> str:
    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: plain(item) for name, item in value.items()}
        if isinstance(value, list):
            return [plain(item) for item in value]
        return int(value) if isinstance(value, float) and value.is_integer() else value

    return json.dumps(plain(value), sort_keys=True)
