"""Messages between processes: what goes in comes out, and nothing else is ever taken."""

from __future__ import annotations

import contextlib
import pickle
import threading
from collections.abc import Iterator

import msgpack
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quire.executor.channel import Channel, ChannelClosedError, ChannelSilentError
from quire.executor.messages import MessageError, pack, unpack

plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@given(st.dictionaries(st.text(), plain, max_size=4))
def test_plain_values_come_out_as_they_went_in(message):
    assert unpack(pack(message)) == message


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.float8_e4m3fn]
)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 5), (4, 6)])
def test_tensors_keep_type_shape_and_bytes(dtype, shape):
    """Also where they are views, and of no elements."""
    tensor = torch.randint(0, 2, shape).to(dtype)
    tensor = tensor.transpose(0, -1) if tensor.dim() > 1 else tensor
    (found,) = unpack(pack({"x": tensor})).values()
    assert found.dtype == dtype
    assert found.shape == tensor.shape
    assert torch.equal(found.float(), tensor.float())


def tensor_bytes(name: object, shape: object, content: bytes) -> bytes:
    inner = msgpack.packb((name, shape, content))
    return msgpack.packb({"x": msgpack.ExtType(1, inner)})


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        pack({"x": 1})[:-1],
        msgpack.packb([1, 2]),
        msgpack.packb({"x": msgpack.ExtType(7, b"")}),
        msgpack.packb({"x": msgpack.ExtType(1, b"\x01")}),
        tensor_bytes("float32", [2], b"1234567"),
        tensor_bytes("float32", [-1], b""),
        tensor_bytes("float32", [2**62, 4], b""),
        tensor_bytes("load", [1], b"1"),
        tensor_bytes("storage", [], b""),
        tensor_bytes(["float32"], [1], b"1234"),
        tensor_bytes("float32", "ab", b""),
        pickle.dumps({"x": 1}),
    ],
)
def test_what_is_no_message_is_refused(data):
    with pytest.raises(MessageError):
        unpack(data)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_message_or_refused(data):
    with contextlib.suppress(MessageError):
        assert isinstance(unpack(data), dict)


def test_objects_do_not_travel():
    with pytest.raises(TypeError, match="object is nothing that goes into a message"):
        pack({"x": object()})


@pytest.fixture
def ends() -> Iterator[tuple[Channel, Channel]]:
    one, other = Channel.pair()
    both = one, Channel(other)
    yield both
    for each in both:
        each.close()


def test_messages_of_several_threads_arrive_whole(ends):
    """Longer ones than a socket holds, too."""
    one, other = ends
    payload = torch.arange(1 << 18)
    threads = [
        threading.Thread(target=one.send, args=({"from": i, "x": payload + i},)) for i in range(4)
    ]
    for thread in threads:
        thread.start()
    found = [other.receive(10) for _ in threads]
    for thread in threads:
        thread.join()
    assert sorted(message["from"] for message in found) == [0, 1, 2, 3]
    assert all(torch.equal(message["x"], payload + message["from"]) for message in found)


def test_silence_and_the_end_are_told_apart(ends):
    one, other = ends
    with pytest.raises(ChannelSilentError):
        other.receive(0.05)
    one.send({"a": 1})
    one.close()
    assert other.receive(1) == {"a": 1}
    with pytest.raises(ChannelClosedError):
        other.receive(1)
    with pytest.raises(ChannelClosedError):
        other.send({"a": 1})
    with pytest.raises(ChannelClosedError):
        one.receive(1)
