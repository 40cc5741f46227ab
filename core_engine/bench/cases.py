"""Cases: constraints as applications have them, and texts that match each."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quire.structured_outputs import StructuredOutputsParams


@dataclass(frozen=True, slots=True)
class Case:
    """A constraint with its texts.

    Attributes
    ----------
    name : str
    constraint : dict
        Keyword arguments of ``StructuredOutputsParams``.
    draw : callable
        Takes a ``random.Random`` and returns a text that matches.
    """

    name: str
    constraint: dict[str, Any]
    draw: Callable[[random.Random], str]

    def params(self, backend: str | None = None) -> StructuredOutputsParams:
        """Return the constraint, for a backend."""
        from quire.structured_outputs import StructuredOutputsParams

        return StructuredOutputsParams(**self.constraint, backend=backend)


_TEXT = (
    "the a of and to in for with on at from by order invoice customer delivery was not is late "
    "early please check again tomorrow Monday quickly broken returned refund warehouse address "
    "payment received twice however although report summary temperature increased slightly "
    "über Straße façade naïve 東京 заказ доставка №5 5% (urgent) e-mail don't 'quoted' A/B"
)
_WORDS = _TEXT.split()
_NAMES = ("Ada Lovelace", "Zoë Müller", "Li Na", "Иван Петров", "O'Brien", "María José")
_PLACES = (
    "Argentina,Australia,Austria,Bangladesh,Belgium,Brazil,Bulgaria,Canada,Chile,China,Colombia,"
    "Croatia,Denmark,Egypt,Ethiopia,Finland,France,Germany,Ghana,Greece,Hungary,India,Indonesia,"
    "Ireland,Israel,Italy,Japan,Kenya,Latvia,Mexico,Morocco,Netherlands,New Zealand,Nigeria,Norway,"
    "Pakistan,Peru,Philippines,Poland,Portugal,Romania,Serbia,Singapore,South Africa,South Korea,"
    "Spain,Sweden,Switzerland,Thailand,Turkey,Ukraine,United Kingdom,United States,Vietnam"
)
_COUNTRIES = _PLACES.split(",")


def _sentence(rng: random.Random, least: int, most: int) -> str:
    return " ".join(rng.choices(_WORDS, k=rng.randint(least, most)))


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _object(**properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


_STRING, _NUMBER, _INTEGER, _BOOLEAN = (
    {"type": name} for name in ("string", "number", "integer", "boolean")
)


def _one_of(*values: str) -> dict[str, Any]:
    return {"type": "string", "enum": list(values)}


def _array(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items}


_PERSON = _object(
    name=_STRING, age=_INTEGER, email=_STRING, active=_BOOLEAN, interests=_array(_STRING)
)


def _person(rng: random.Random) -> str:
    person = {
        "name": rng.choice(_NAMES),
        "age": rng.randint(18, 90),
        "email": f"user{rng.randint(1, 9999)}@example.org",
        "active": rng.random() < 0.5,
        "interests": [_sentence(rng, 1, 3) for _ in range(rng.randint(1, 4))],
    }
    return _json(person)


_ORDER = {
    **_object(
        order_id=_INTEGER,
        status=_one_of("pending", "paid", "shipped", "delivered", "returned"),
        items=_array({"$ref": "#/$defs/item"}),
        total=_NUMBER,
        currency=_one_of("EUR", "USD", "JPY", "GBP"),
        note={"anyOf": [_STRING, {"type": "null"}]},
    ),
    "$defs": {"item": _object(product=_STRING, quantity=_INTEGER, unit_price=_NUMBER)},
}


def _order(rng: random.Random) -> str:
    items = [
        {
            "product": _sentence(rng, 1, 4),
            "quantity": rng.randint(1, 20),
            "unit_price": round(rng.uniform(1, 500), 2),
        }
        for _ in range(rng.randint(1, 4))
    ]
    order = {
        "order_id": rng.randint(1, 10**6),
        "status": rng.choice(["pending", "paid", "shipped", "delivered", "returned"]),
        "items": items,
        "total": round(rng.uniform(1, 5000), 2),
        "currency": rng.choice(["EUR", "USD", "JPY", "GBP"]),
        "note": rng.choice([None, _sentence(rng, 3, 20)]),
    }
    return _json(order)


_CALL = {
    "anyOf": [
        _object(
            tool={"const": "get_weather"},
            arguments=_object(city=_STRING, unit=_one_of("celsius", "fahrenheit")),
        ),
        _object(
            tool={"const": "search_documents"},
            arguments=_object(query=_STRING, limit=_INTEGER, exact=_BOOLEAN),
        ),
        _object(
            tool={"const": "send_message"},
            arguments=_object(recipients=_array(_STRING), body=_STRING),
        ),
    ]
}


def _call(rng: random.Random) -> str:
    calls: list[dict[str, Any]] = [
        {
            "tool": "get_weather",
            "arguments": {
                "city": rng.choice(["Paris", "São Paulo", "大阪"]),
                "unit": rng.choice(["celsius", "fahrenheit"]),
            },
        },
        {
            "tool": "search_documents",
            "arguments": {
                "query": _sentence(rng, 3, 12),
                "limit": rng.randint(1, 50),
                "exact": False,
            },
        },
        {
            "tool": "send_message",
            "arguments": {
                "recipients": rng.sample(_NAMES, 2),
                "body": _sentence(rng, 20, 60),
            },
        },
    ]
    return _json(rng.choice(calls))


_LABELS = ("billing", "technical", "account", "shipping", "other")
_TICKET = _object(
    date={"type": "string", "format": "date"},
    labels={"type": "array", "items": _one_of(*_LABELS), "minItems": 1, "maxItems": 3},
    summary={"type": "string", "minLength": 1, "maxLength": 200},
    priority={"type": "integer", "minimum": 1, "maximum": 5},
    confidence={"type": "number", "minimum": 0, "maximum": 1},
    code={"type": "string", "pattern": "^[A-Z]{2}-[0-9]{4}$"},
)


def _ticket(rng: random.Random) -> str:
    ticket = {
        "date": f"20{rng.randint(10, 40)}-{rng.randint(1, 12):02}-{rng.randint(1, 28):02}",
        "labels": rng.sample(_LABELS, rng.randint(1, 3)),
        "summary": _sentence(rng, 4, 25)[:200],
        "priority": rng.randint(1, 5),
        "confidence": round(rng.random(), 3),
        "code": f"{rng.choice('ABCXYZ')}{rng.choice('ABCXYZ')}-{rng.randint(0, 9999):04}",
    }
    return _json(ticket)


def _any_object(rng: random.Random) -> str:
    def value(depth: int) -> Any:
        kind = rng.randrange(6 if depth else 4)
        if kind == 4:
            return [value(depth - 1) for _ in range(rng.randint(0, 4))]
        if kind == 5:
            return {word: value(depth - 1) for word in rng.sample(_WORDS, rng.randint(1, 4))}
        return (_sentence(rng, 1, 10), rng.randint(-999, 9999), rng.random(), True)[kind]

    return _json({word: value(2) for word in rng.sample(_WORDS, rng.randint(1, 5))})


_LOG = r"[0-9]{4}-[0-9]{2}-[0-9]{2} (DEBUG|INFO|WARNING|ERROR) [a-z_]+(\.[a-z_]+)*: [^\n]+"


def _log(rng: random.Random) -> str:
    date = f"20{rng.randint(10, 40)}-{rng.randint(1, 12):02}-{rng.randint(1, 28):02}"
    level = rng.choice(["DEBUG", "INFO", "WARNING", "ERROR"])
    return f"{date} {level} app.{rng.choice(['db', 'web_server'])}: {_sentence(rng, 5, 30)}"


_GRAMMAR = r"""
start: "SELECT " columns " FROM " NAME [" WHERE " condition] [" LIMIT " INT]
columns: "*" | NAME (", " NAME)*
condition: comparison ((" AND " | " OR ") comparison)* | "(" condition ")"
comparison: NAME (" = " | " < " | " > " | " LIKE ") value
value: INT | STRING
NAME: /[a-z][a-z_]*/
INT: /[0-9]+/
STRING: /'[^'\n]*'/
"""


def _query(rng: random.Random) -> str:
    names = ("id", "customer_name", "price", "created", "stock_level")

    def comparison() -> str:
        word = rng.choice([word for word in _WORDS if "'" not in word])
        value = rng.choice([str(rng.randint(0, 9999)), f"'%{word}%'"])
        return f"{rng.choice(names)} {rng.choice(['=', '<', '>', 'LIKE'])} {value}"

    where = " AND ".join(comparison() for _ in range(rng.randint(1, 4)))
    columns = ", ".join(rng.sample(names, rng.randint(1, 4)))
    return f"SELECT {columns} FROM orders WHERE {where} LIMIT {rng.randint(1, 100)}"


CASES: tuple[Case, ...] = (
    Case("schema: person", {"json": _PERSON}, _person),
    Case("schema: order", {"json": _ORDER}, _order),
    Case("schema: tool call", {"json": _CALL}, _call),
    Case("schema: ticket, with bounds", {"json": _TICKET}, _ticket),
    Case("json_object", {"json_object": True}, _any_object),
    Case("regex: log line", {"regex": _LOG}, _log),
    Case("choice: countries", {"choice": _COUNTRIES}, lambda rng: rng.choice(_COUNTRIES)),
    Case("grammar: query", {"grammar": _GRAMMAR}, _query),
)
"""What masks and compilations are measured with."""


def draw_schemas(count: int, seed: int) -> list[Case]:
    """Return schemas of objects in objects, of such keywords as every library takes.

    Parameters
    ----------
    count : int
    seed : int
        Others are other schemas.
    """
    rng = random.Random(seed)
    words = [word.lower() for word in _WORDS if word.isascii() and word.isalpha()]

    def schema(depth: int) -> dict[str, Any]:
        kind = rng.randrange(8 if depth else 6)
        if kind < 4:
            return (_STRING, _INTEGER, _NUMBER, _BOOLEAN)[kind]
        if kind == 4:
            return _one_of(*rng.sample(words, rng.randint(2, 6)))
        if kind == 5:
            return {"anyOf": [_STRING, {"type": "null"}]}
        return _array(schema(depth - 1)) if kind == 6 else record(depth - 1)

    def record(depth: int) -> dict[str, Any]:
        return _object(**{name: schema(depth) for name in rng.sample(words, rng.randint(2, 6))})

    return [Case(f"drawn {i}", {"json": record(2)}, lambda rng: "") for i in range(count)]
