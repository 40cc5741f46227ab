"""The comparisons that run on GPUs: right backends pass them, and wrong ones do not."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import CASES, operation
from kernel_draw import Draw, Mismatch

from quire.kernels.reference.backend import ReferenceBackend

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Where a wrong result must be found at the latest: seeds that are tried one after the other.
TRIED = range(40)


@pytest.mark.parametrize("name", CASES)
@settings(max_examples=8)
@given(seed=st.integers(0, 2**31), dtype=st.sampled_from(DTYPES))
def test_a_right_backend_passes(backend, name, seed, dtype):
    """Whatever is drawn: a case that fails now and then would say nothing on a GPU."""
    if not hasattr(backend, operation(name)):
        pytest.skip(f"{backend.name} has no {operation(name)}")
    CASES[name](Draw(seed, CPU, dtype), backend)


def try_seeds(name, backend):
    """Compare with one seed after the other."""
    for seed in TRIED:
        CASES[name](Draw(seed, CPU, torch.float32), backend)


def _spoiled(found):
    """Change one number of a result a little: the last of the largest."""
    if isinstance(found, tuple):
        return (_spoiled(found[0]), *found[1:])
    found = torch.as_tensor(found)
    if not found.numel():
        return found
    spoiled = found.clone()
    flat = spoiled.reshape(-1)
    if found.is_floating_point():
        sizes = flat.float().nan_to_num(0, 0, 0).abs()
        at = len(flat) - 1 - int(sizes.flip(0).argmax())
        flat[at] += 0.1 + 0.2 * flat[at].abs()
    else:
        flat[-1] += 1
    return spoiled


RETURNING = [
    name for name in CASES if operation(name) not in ("write_kv", "apply_penalties",
    "apply_bitmask", "lora_expand", "make_decode_plan", "sample_tokens")
]  # fmt: skip


@pytest.mark.parametrize("name", RETURNING)
def test_one_wrong_number_is_found(name):
    """Among all that come out, in one of the first seeds."""
    if not hasattr(ReferenceBackend, operation(name)):
        pytest.skip(f"the reference has no {operation(name)}")

    class Wrong(ReferenceBackend):
        pass

    right = getattr(ReferenceBackend, operation(name))
    setattr(Wrong, operation(name), staticmethod(lambda *a, **k: _spoiled(right(*a, **k))))
    with pytest.raises(Mismatch):
        try_seeds(name, Wrong())


@pytest.mark.parametrize(
    ("name", "changed"),
    [("write_kv", 2), ("apply_penalties", 0), ("apply_bitmask", 0), ("lora_expand", 0)],
)
def test_one_wrong_number_that_is_written_is_found(name, changed):
    """Of what an operation writes in place."""

    class Wrong(ReferenceBackend):
        pass

    def wrong(*arguments):
        right(*arguments)
        target = arguments[changed]
        if target.dtype.itemsize == 1:
            target.view(torch.uint8).reshape(-1)[-5:].bitwise_xor_(255)
        else:
            target.reshape(-1)[-1] = 77.0

    right = getattr(ReferenceBackend, name)
    setattr(Wrong, name, staticmethod(wrong))
    with pytest.raises(Mismatch):
        try_seeds(name, Wrong())


def test_a_draw_that_ignores_its_limits_is_found():
    """Of tokens that are dropped, or from another place of the distribution."""

    class Unlimited(ReferenceBackend):
        @staticmethod
        def sample_tokens(logits, temperature, top_k, top_p, min_p, uniform):
            return ReferenceBackend.sample_tokens(
                logits, temperature, 0 * top_k, 0 * top_p + 1, 0 * min_p, uniform
            )

    class Elsewhere(ReferenceBackend):
        @staticmethod
        def sample_tokens(logits, temperature, top_k, top_p, min_p, uniform):
            return ReferenceBackend.sample_tokens(
                logits, temperature, top_k, top_p, min_p, 0.9 * uniform
            )

    for wrong in (Unlimited, Elsewhere):
        Wrong = type("Wrong", (wrong,), {"sample_tokens": _as_reference(wrong)})
        with pytest.raises(Mismatch, match="sample_tokens"):
            try_seeds("sample_tokens", Wrong())


def _as_reference(backend):
    """Take limits as the reference takes them: the cases look at its annotations."""
    call = backend.sample_tokens
    call.__annotations__ = dict(ReferenceBackend.sample_tokens.__annotations__)
    return staticmethod(call)
