"""Comparisons of what makes tokens of logits."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from kernel_draw import Draw, Mismatch, agree

from quire.kernels.reference.backend import ReferenceBackend

REFERENCE = ReferenceBackend()
_BORDER = 2e-4
"""How far rounding may move the place in a distribution that is drawn from."""


def _logits(draw: Draw, rows: int | None = None) -> torch.Tensor:
    """Draw float32 logits, of which some are equal, and some infinitely low."""
    rows = draw.size(1, 6, 20) if rows is None else rows
    vocab = draw.size(2, 300, draw.rng.choice([32_000, 128_256, 151_937]))
    logits = draw.noise(rows, vocab, dtype=torch.float32) * draw.rng.choice([0.5, 3.0, 10.0])
    if draw.rng.random() < 0.3:
        logits = (logits * 4).round() / 4
    if draw.rng.random() < 0.3:
        masked = draw.uniform(rows, vocab) < 0.7
        masked[:, draw.rng.randrange(vocab)] = False
        logits = logits.masked_fill(masked, -torch.inf)
    return logits


def _tensor(found: Any) -> torch.Tensor:
    return torch.as_tensor(found).cpu()


def argmax(draw: Draw, backend: Any) -> None:
    """The first of the highest; of the other float types too."""
    logits = _logits(draw)
    if draw.rng.random() < 0.4:
        logits = logits.to(draw.dtype)
    ids, highest = backend.argmax(draw.here(logits))
    agree("argmax: the token", _tensor(ids), logits.float().argmax(1), draw.dtype)
    agree("argmax: its logit", _tensor(highest), logits.float().amax(1), torch.float32, factor=0)


def log_softmax(draw: Draw, backend: Any) -> None:
    """Of float32 logits."""
    logits = _logits(draw)
    got = backend.log_softmax(draw.here(logits))
    agree("log_softmax", got, logits.double().log_softmax(1), torch.float32)


def apply_penalties(draw: Draw, backend: Any) -> None:
    """Entries of any rows, in any order."""
    logits = _logits(draw)
    rows, vocab = logits.shape
    count = draw.size(0, 40, 5000)
    places = torch.randperm(rows * vocab, generator=draw.generator)[:count]
    count = len(places)
    at = (places // vocab, places % vocab)
    counts = draw.integers(0, 4, count).float()
    limits = [draw.uniform(count).float() * 2 - 0.5, draw.uniform(count).float() * 2 - 0.5]
    limits.append(0.5 + draw.uniform(count).float())
    expected = logits.clone()
    REFERENCE.apply_penalties(expected, *at, counts, *limits)
    got = draw.here(logits)
    backend.apply_penalties(got, *(draw.here(each) for each in (*at, counts, *limits)))
    agree("apply_penalties", got, expected, torch.float32, factor=0.1)


def apply_bitmask(draw: Draw, backend: Any) -> None:
    """Some rows, also by masks that are shorter than the vocabulary."""
    logits = _logits(draw)
    rows, vocab = logits.shape
    chosen = torch.randperm(rows, generator=draw.generator)[: draw.rng.randint(0, rows)]
    words = -(-vocab // 32) - (draw.rng.random() < 0.3 and vocab > 64)
    masks = draw.integers(-(1 << 31), 1 << 31, len(chosen), words).int()
    expected = logits.clone()
    REFERENCE.apply_bitmask(expected, chosen, masks)
    got = draw.here(logits)
    backend.apply_bitmask(got, draw.here(chosen), draw.here(masks))
    agree("apply_bitmask", got, expected, torch.float32, factor=0)


def top_logits(draw: Draw, backend: Any) -> None:
    """In descending order, equal ones in that of their ids."""
    logits = _logits(draw, rows=draw.size(1, 5, 12))
    k = draw.rng.randint(1, min(logits.shape[1], 60))
    got = backend.top_logits(draw.here(logits), k)
    expected = REFERENCE.top_logits(logits, k)
    agree("top_logits: logits", _tensor(got[0]), expected[0], torch.float32, factor=0)
    agree("top_logits: tokens", _tensor(got[1]), expected[1], torch.float32)


def gather_logprobs(draw: Draw, backend: Any) -> None:
    """Of given tokens and of the likeliest."""
    logits = _logits(draw, rows=draw.size(1, 5, 12))
    rows, vocab = logits.shape
    k = draw.rng.choice([0, 1, min(5, vocab)])
    given = draw.integers(0, vocab, rows)
    got = [
        _tensor(each) for each in backend.gather_logprobs(draw.here(logits), draw.here(given), k)
    ]
    expected = REFERENCE.gather_logprobs(logits, given, k)
    agree("gather_logprobs: tokens", got[0], expected[0], torch.float32)
    agree("gather_logprobs: logprobs", got[1], expected[1], torch.float32)
    agree("gather_logprobs: ranks", got[2], expected[2], torch.float32)


def sample_tokens(draw: Draw, backend: Any) -> None:
    """A token that is kept, at the place of the distribution that the uniform number names."""
    logits = _logits(draw, rows=draw.size(1, 6, 12))
    rows, vocab = logits.shape
    columns = {
        "temperature": _each(draw, rows, [1e-40, 0.3, 1.0, 2.0]),
        "top_k": _each(draw, rows, [0, 0, 1, 5, 50, vocab]).long(),
        "top_p": _each(draw, rows, [1.0, 1.0, 0.1, 0.9, 0.999]),
        "min_p": _each(draw, rows, [0.0, 0.0, 0.05, 0.5, 1.0]),
        "uniform": draw.uniform(rows),
    }
    if draw.rng.random() < 0.3:  # a batch of which nothing is dropped
        columns["top_k"].zero_()
        columns["top_p"].fill_(1.0)
        columns["min_p"].zero_()
    annotation = inspect.signature(backend.sample_tokens).parameters["temperature"].annotation
    given: dict[str, Any]
    if "Tensor" in str(annotation):
        given = {name: draw.here(each) for name, each in columns.items()}
    else:
        given = {name: each.numpy() for name, each in columns.items()}
    got = _tensor(backend.sample_tokens(draw.here(logits), **given)).long()
    if got.shape != (rows,) or ((got < 0) | (got >= vocab)).any():
        raise Mismatch(f"sample_tokens: {got.shape[0]} ids for {rows} rows, or none of the tokens")
    for row in range(rows):
        limits = {name: each[row].item() for name, each in columns.items()}
        _check_draw(logits[row].double(), int(got[row]), limits)


def _each(draw: Draw, rows: int, choices: list[float]) -> torch.Tensor:
    return torch.tensor([draw.rng.choice(choices) for _ in range(rows)], dtype=torch.float64)


def _check_draw(logits: torch.Tensor, token: int, limits: dict[str, float]) -> None:
    """Check one draw by its definition, in float64, with room for rounding at every border."""
    scaled = (logits - logits.max()) / max(limits["temperature"], 1e-30)
    weights = scaled.exp()
    order = torch.sort(logits, descending=True, stable=True).indices
    place = int((order == token).nonzero())
    told = f"sample_tokens: token {token}, the {place + 1}th likeliest, by {limits}"
    sorted_weights = weights[order]
    kept = torch.ones(len(order), dtype=torch.bool)
    if 0 < limits["top_k"] < len(order):
        kept[int(limits["top_k"]) :] = False
    # Likelihoods that lie within rounding of a border may be on either side of it.
    kept &= sorted_weights >= limits["min_p"] * (1 - _BORDER)
    kept[0] = True
    if limits["top_p"] < 1:
        mass = (sorted_weights * kept).cumsum(0)
        kept[1:] &= (mass[:-1] < limits["top_p"] * mass[-1] * (1 + _BORDER)).logical_and(kept[1:])
    if not kept[place]:
        # One that is as likely, to rounding, as one that is kept.
        least = float(sorted_weights[kept].min())
        if not float(sorted_weights[place]) >= least * (1 - _BORDER):
            raise Mismatch(f"{told}: it should have been dropped")
    sets = [kept]
    for name in ("top_p", "min_p"):  # what is at a border may also have been dropped
        tight = kept.clone()
        if name == "top_p" and limits["top_p"] < 1:
            mass = (sorted_weights * tight).cumsum(0)
            tight[1:] &= mass[:-1] < limits["top_p"] * mass[-1] * (1 - _BORDER)
        if name == "min_p":
            tight &= sorted_weights >= limits["min_p"] * (1 + _BORDER)
        tight[0] = True
        sets.append(tight)
    for chosen in sets:
        by_rank = sorted_weights * chosen
        by_id = torch.zeros_like(by_rank)
        by_id[order] = by_rank
        for shares, at in ((by_rank, place), (by_id, token)):
            total = shares.cumsum(0)
            low = float(total[at] - shares[at]) / float(total[-1])
            high = float(total[at]) / float(total[-1])
            if low - _BORDER <= limits["uniform"] <= high + _BORDER:
                return
    raise Mismatch(f"{told}: it does not lie where the uniform number does")


SAMPLING = {
    "argmax": argmax,
    "log_softmax": log_softmax,
    "apply_penalties": apply_penalties,
    "apply_bitmask": apply_bitmask,
    "top_logits": top_logits,
    "gather_logprobs": gather_logprobs,
    "sample_tokens": sample_tokens,
}
