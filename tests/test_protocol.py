"""Values survive the way to a kernel and back, and nothing else gets through."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from attn_lessons.grading import protocol
from attn_lessons.grading.probe import Probe
from attn_lessons.grading.records import Returned


def round_trip(value):
    return protocol.decode(json.loads(json.dumps(protocol.encode(value), allow_nan=False)))


DTYPES = st.one_of(
    hnp.boolean_dtypes(),
    hnp.integer_dtypes(),
    hnp.unsigned_integer_dtypes(),
    hnp.floating_dtypes(),
    hnp.complex_number_dtypes(),
)


@given(st.data())
def test_arrays_keep_values_dtype_and_memory_order(data):
    shape = data.draw(hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4))
    array = data.draw(hnp.arrays(data.draw(DTYPES), shape))
    axes = data.draw(st.permutations(range(array.ndim)))
    array = array.transpose(axes)
    steps = data.draw(st.lists(st.sampled_from([1, 2, -1]), min_size=0, max_size=array.ndim))
    array = array[(*(slice(None, None, step) for step in steps), ...)]
    back = round_trip(array)
    assert back.dtype == array.dtype
    assert back.shape == array.shape
    assert np.ascontiguousarray(back).tobytes() == np.ascontiguousarray(array).tobytes()
    assert back.flags.c_contiguous == array.flags.c_contiguous
    assert back.flags.writeable


def test_a_transposed_input_arrives_transposed():
    array = np.arange(6.0).reshape(2, 3).T
    assert round_trip(array).strides == array.strides


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.complex_numbers(),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.tuples(inner, inner)
            | st.dictionaries(st.text(max_size=3), inner, max_size=3)
        ),
        max_leaves=12,
    )
)
def test_plain_data_comes_back_as_it_was(value):
    assert repr(round_trip(value)) == repr(value)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -0.0, 5e-324, 1e308])
def test_every_float_survives_json(value):
    assert repr(round_trip(value)) == repr(value)
    assert repr(round_trip(np.float64(value))) == repr(np.float64(value))


def test_a_probe_computes_the_same_after_the_journey():
    probe = Probe("quadratic", {"matrix": np.eye(3) + 0.5, "slope": np.arange(3.0)})
    x = np.array([1.0, -2.0, 0.25])
    assert round_trip(probe)(x) == probe(x)


def test_an_outcome_comes_back():
    outcome = Returned((np.eye(2), 1.5), None, "", ("z",))
    back = protocol.decode_returned(json.loads(json.dumps(protocol.encode_returned(outcome))))
    assert back.mutated == ("z",)
    assert np.array_equal(back.value[0], np.eye(2))
    assert back.value[1] == 1.5


@pytest.mark.parametrize("value", [object(), {1, 2}, lambda: 0, b"x", np.array([object()])])
def test_what_is_no_plain_data_is_not_sent(value):
    with pytest.raises(protocol.ProtocolError, match="cannot be sent"):
        protocol.encode(value)


@pytest.mark.parametrize(
    "message",
    [
        1.5,
        {},
        ["a"],
        ["x", 1],
        ["a", "O", [1], "AAAAAAAAAAA=", None],
        ["a", "<f8", [2], "AAAAAAAAAAA=", None],
        ["a", "<f8", [-1], "AAAAAAAAAAA=", None],
        ["a", "<f8", [10**12], "", None],
        ["a", "<f8", [1], "%%%", None],
        ["a", "no dtype", [1], "AAAAAAAAAAA=", None],
        ["a", "<f8", [1], "AAAAAAAAAAA=", [[5], [], 1]],
        ["a", "<f8", [1], "AAAAAAAAAAA=", 7],
        ["f", "one"],
        ["d", [[["l", []], 1]]],
        ["p", "no kind", ["d", []]],
        ["p", "linear", 3],
    ],
)
def test_a_message_of_another_form_is_refused(message):
    with pytest.raises(protocol.ProtocolError):
        protocol.decode(message)


def test_deep_nesting_is_refused():
    message = ["l", []]
    for _ in range(500):
        message = ["l", [message]]
    with pytest.raises(protocol.ProtocolError, match="nested"):
        protocol.decode(message)


@pytest.mark.parametrize(
    "message",
    [
        None,
        {},
        {"value": 1, "error": 3, "error_message": "", "mutated": []},
        {"value": 1, "error": None, "error_message": "", "mutated": [1]},
        {"value": ["x"], "error": None, "error_message": "", "mutated": []},
    ],
)
def test_an_outcome_of_another_form_is_refused(message):
    with pytest.raises(protocol.ProtocolError):
        protocol.decode_returned(message)
