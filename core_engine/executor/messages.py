"""What goes between the processes of an engine: plain values and tensors, in MessagePack.

Nothing in a message is ever executed: tensors travel as their type's name, their shape and their
bytes, and everything else is what MessagePack itself knows. It is imported where there is a
message: one process needs none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import msgpack
    import torch

Message = dict[str, Any]

_TENSOR = 1
_DTYPES = frozenset(
    {
        "bool", "uint8", "int8", "int16", "int32", "int64",
        "float16", "bfloat16", "float32", "float64", "float8_e4m3fn",
    }
)  # fmt: skip
_LONGEST = 1 << 40


class MessageError(ValueError):
    """Bytes that are no message."""


def pack(message: Mapping[str, Any]) -> bytes:
    """Turn a message into bytes.

    Parameters
    ----------
    message
        Of None, booleans, numbers, texts, bytes, tensors on the CPU, and lists and dicts of them.

    Raises
    ------
    TypeError
        There is something else in it.
    """
    import msgpack

    packed: bytes = msgpack.packb(
        message, default=_pack_tensor, use_bin_type=True, unicode_errors="surrogatepass"
    )
    return packed


def unpack(data: bytes) -> Message:
    """Turn bytes from `pack` into the message they were; lists stay lists.

    Raises
    ------
    MessageError
        They are none.
    """
    import msgpack

    try:
        message = msgpack.unpackb(
            data, ext_hook=_unpack_extension, raw=False, strict_map_key=False,
            unicode_errors="surrogatepass",
            max_bin_len=_LONGEST, max_ext_len=_LONGEST, max_str_len=_LONGEST,
        )  # fmt: skip
    except MessageError:
        raise
    except Exception as error:  # of many kinds, by what is wrong with them
        raise MessageError(f"these {len(data)} bytes are no message: {error}") from error
    if not isinstance(message, dict):
        raise MessageError(f"a message is a dict, not {type(message).__name__}")
    return message


def _pack_tensor(value: object) -> msgpack.ExtType:
    import msgpack
    import torch

    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{type(value).__name__} is nothing that goes into a message")
    name = str(value.dtype).removeprefix("torch.")
    flat = value.detach().contiguous().reshape(-1)
    content = flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
    return msgpack.ExtType(_TENSOR, msgpack.packb((name, list(value.shape), content)))


def _unpack_extension(code: int, data: bytes) -> torch.Tensor:
    import msgpack
    import torch

    if code != _TENSOR:
        raise MessageError(f"there is no extension {code}")
    name, shape, content = msgpack.unpackb(data, max_bin_len=_LONGEST)
    if name not in _DTYPES or any(not isinstance(size, int) or size < 0 for size in shape):
        raise MessageError(f"no tensor is of type {name!r} and shape {shape!r}")
    dtype: torch.dtype = getattr(torch, name)
    if math.prod(shape) * dtype.itemsize != len(content):
        raise MessageError(f"{len(content)} bytes are no {name} of shape {shape}")
    if not content:
        return torch.empty(shape, dtype=dtype, device="cpu")
    flat = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    return flat.view(dtype).reshape(shape)
