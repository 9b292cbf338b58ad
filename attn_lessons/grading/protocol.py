"""Values as JSON and back, without pickle: what crosses between grader and kernel.

Arrays keep dtype, bytes and the order of their strides, so a non-contiguous input arrives
non-contiguous. What comes back from a kernel is untrusted: ``decode`` accepts nothing but plain
data of known kinds and raises ``ProtocolError`` on the rest.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from attn_lessons.grading.probe import Probe
from attn_lessons.grading.records import Returned

MIME = "application/vnd.attn-lessons.returned+json"
MAX_ARRAY_BYTES = 64 * 2**20
MAX_DEPTH = 32
PLAIN_KINDS = "biufc"

Layout = tuple[tuple[int, ...], tuple[int, ...], int]


class ProtocolError(ValueError):
    """A value that cannot be sent, or a message that is not one of ours."""


def layout_of(array: np.ndarray) -> Layout | None:
    """How ``array`` lies in memory, or None where it lies in C order without gaps.

    (axes from the longest stride to the shortest, axes that run backwards, step of the last)
    """
    if array.flags.c_contiguous:
        return None
    order = tuple(int(i) for i in np.argsort([-abs(s) for s in array.strides], kind="stable"))
    backwards = tuple(i for i, stride in enumerate(array.strides) if stride < 0)
    straight = np.flip(array, backwards).transpose(order)
    return order, backwards, 1 if straight.flags.c_contiguous else 2


def with_layout(array: np.ndarray, layout: Layout | None) -> np.ndarray:
    """A fresh writeable copy of ``array`` that lies in memory as ``layout`` says."""
    if layout is None:
        return np.array(array, order="C")
    order, backwards, step = layout
    shape = [array.shape[i] for i in order]
    room = np.zeros([*shape[:-1], shape[-1] * step], dtype=array.dtype)
    fresh = np.flip(room[..., ::step].transpose(np.argsort(order)), backwards)
    fresh[...] = array
    return fresh


def encode(value: Any) -> Any:
    """``value`` as data that JSON carries unharmed (NaN, infinities and dtypes included)."""
    match value:
        case None | bool() | str():
            return value
        case np.ndarray():
            return _encode_array(value)
        case np.generic():
            dtype, _, data, _ = _encode_array(np.asarray(value))[1:]
            return ["s", dtype, data]
        case int():
            return int(value)
        case float():
            return ["f", float(value).hex()]
        case complex():
            return ["c", value.real.hex(), value.imag.hex()]
        case tuple():
            return ["t", [encode(item) for item in value]]
        case list():
            return ["l", [encode(item) for item in value]]
        case Probe():
            return ["p", value.kind, encode(dict(value.params))]
        case Mapping():
            return ["d", [[encode(key), encode(item)] for key, item in value.items()]]
    raise ProtocolError(f"value: a {type(value).__name__} cannot be sent")


def decode(message: Any, depth: int = 0) -> Any:
    """The value that ``encode`` made ``message`` of."""
    if depth > MAX_DEPTH:
        raise ProtocolError(f"message: nested deeper than {MAX_DEPTH}")
    try:
        match message:
            case None | bool() | str() | int():
                return message
            case ["a", str(dtype), list(shape), str(data), layout]:
                return _decode_array(dtype, shape, data, layout)
            case ["s", str(dtype), str(data)]:
                return _decode_array(dtype, [], data, None)[()]
            case ["f", str(number)]:
                return float.fromhex(number)
            case ["c", str(real), str(imag)]:
                return complex(float.fromhex(real), float.fromhex(imag))
            case ["t", list(items)]:
                return tuple(decode(item, depth + 1) for item in items)
            case ["l", list(items)]:
                return [decode(item, depth + 1) for item in items]
            case ["p", str(kind), ["d", list()] as params]:
                return Probe(kind, decode(params, depth + 1))
            case ["d", list(items)]:
                return {decode(k, depth + 1): decode(v, depth + 1) for k, v in items}
    except ProtocolError:
        raise
    except (ValueError, TypeError, OverflowError) as error:
        raise ProtocolError(f"message: {error}") from error
    raise ProtocolError(f"message: unknown form {str(message)[:60]!r}")


def encode_returned(returned: Returned) -> dict[str, Any]:
    """One call's outcome as a JSON object."""
    return {
        "value": encode(returned.value),
        "error": returned.error,
        "error_message": returned.error_message,
        "mutated": list(returned.mutated),
    }


def decode_returned(message: Any) -> Returned:
    """The outcome that a kernel emitted, held to its form."""
    match message:
        case {
            "value": value,
            "error": None | str() as error,
            "error_message": str(text),
            "mutated": list(mutated),
        } if all(isinstance(name, str) for name in mutated):
            return Returned(decode(value), error, text[:2000], tuple(mutated))
    raise ProtocolError("message: not the outcome of a call")


def _encode_array(array: np.ndarray) -> list[Any]:
    if array.dtype.kind not in PLAIN_KINDS:
        raise ProtocolError(f"value: an array of dtype {array.dtype} cannot be sent")
    if array.nbytes > MAX_ARRAY_BYTES:
        raise ProtocolError(f"value: an array of {array.nbytes} bytes is too large")
    data = base64.b64encode(np.ascontiguousarray(array).tobytes()).decode("ascii")
    layout = layout_of(array)
    shown = None if layout is None else [list(layout[0]), list(layout[1]), layout[2]]
    return ["a", array.dtype.str, list(array.shape), data, shown]


def _decode_array(name: str, shape: list[Any], data: str, layout: Any) -> np.ndarray:
    dtype = np.dtype(name)
    if dtype.kind not in PLAIN_KINDS or not all(type(n) is int and n >= 0 for n in shape):
        raise ProtocolError(f"message: no array of dtype {name} and shape {shape}")
    if math.prod(shape) * dtype.itemsize > MAX_ARRAY_BYTES:
        raise ProtocolError(f"message: an array of shape {shape} is too large")
    raw = base64.b64decode(data, validate=True)
    array = np.frombuffer(raw, dtype=dtype).reshape(shape)
    if layout is None:
        return with_layout(array, None)
    order, backwards, step = layout
    if sorted(order) != list(range(len(shape))) or step not in (1, 2):
        raise ProtocolError(f"message: no layout {layout} for shape {shape}")
    return with_layout(array, (tuple(order), tuple(backwards), step))
