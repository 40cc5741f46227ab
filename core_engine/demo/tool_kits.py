"""All kits, and how often each is drawn."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace

from quire.demo.kits import Kit
from quire.demo.kits_of_actions import (
    convert,
    customer,
    explicit,
    function,
    joke,
    person,
    switch,
    text_tool,
)
from quire.demo.kits_of_facts import arithmetic, lookup, weather

SHARES: tuple[tuple[float, Callable[[random.Random], Kit]], ...] = (
    (0.20, weather),
    (0.20, lookup),
    (0.13, arithmetic),
    (0.15, function),
    (0.10, explicit),
    (0.06, customer),
    (0.04, person),
    (0.06, text_tool),
    (0.02, switch),
    (0.02, convert),
    (0.02, joke),
)


def draw_kit(rng: random.Random) -> Kit:
    """Draw a tool of any kind."""
    (make,) = rng.choices([make for _, make in SHARES], [share for share, _ in SHARES])
    kit = make(rng)
    if not kit.tool.description or not kit.tool.parameters or rng.random() > 0.06:
        return kit
    # Many programs send a function's whole docstring.
    lines = [f"    {p.name}: The {p.name.replace('_', ' ')}." for p in kit.tool.parameters]
    described = "\n".join((kit.tool.description, "", "Args:", *lines))
    return replace(kit, tool=replace(kit.tool, description=described))


def draw_kits(rng: random.Random, count: int) -> Sequence[Kit]:
    """Draw tools of different purposes and names."""
    kits: list[Kit] = []
    while len(kits) < count:
        kit = draw_kit(rng)
        if all(kit.purpose != k.purpose and kit.tool.name != k.tool.name for k in kits):
            kits.append(kit)
    return kits
