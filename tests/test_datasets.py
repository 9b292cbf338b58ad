"""The digits are scikit-learn's, the text is Python's, and a target is what comes next."""

import doctest
from pydoc_data.topics import topics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from strategies import generators

from attn_lessons import datasets
from attn_lessons.datasets import batches, characters, digits_sequences, topics_text


def test_digits_are_scikit_learns_each_once():
    x_train, y_train, x_test, y_test = digits_sequences(3)
    assert x_train.shape == (1437, 8, 8)
    assert x_test.shape == (360, 8, 8)
    pairs = zip(np.concatenate([x_train, x_test]), np.concatenate([y_train, y_test]), strict=True)
    images, digits = load_digits(return_X_y=True)
    want = sorted((*image, digit) for image, digit in zip(images, digits, strict=True))
    assert sorted((*(16 * image).ravel(), digit) for image, digit in pairs) == want
    assert np.ptp(x_train) == 1


def test_a_token_is_a_row_of_pixels():
    x_train, *_ = digits_sequences(0)
    images = {image.tobytes() for image in load_digits().images / 16}
    assert x_train[0].tobytes() in images
    assert np.ascontiguousarray(x_train[0].T).tobytes() not in images


def test_the_seed_decides_the_split():
    one, again, other = digits_sequences(1), digits_sequences(1), digits_sequences(2)
    assert all(np.array_equal(a, b) for a, b in zip(one, again, strict=True))
    assert not np.array_equal(one.y_test, other.y_test)
    # Near 36 of each digit: 360 drawn without regard to them.
    counts = np.bincount(one.y_test, minlength=10)
    assert counts.min() >= 20
    assert counts.max() <= 55


def test_the_text_holds_every_page():
    text = topics_text()
    assert all(page in text for page in topics.values())
    assert len(text) == sum(map(len, topics.values())) + len(topics) - 1
    assert text == topics_text()


@given(st.text(st.characters(codec=None), min_size=0, max_size=40))
def test_characters_come_back(text):
    vocabulary, tokens = characters(text)
    assert "".join(vocabulary[i] for i in tokens) == text
    assert vocabulary == "".join(sorted(set(text)))
    assert tokens.shape == (len(text),)
    assert tokens.dtype.kind == "i"


def test_the_texts_characters():
    text = topics_text()
    vocabulary, tokens = characters(text)
    assert "\n" in vocabulary
    assert set(tokens.tolist()) == set(range(len(vocabulary)))
    assert "".join(vocabulary[i] for i in tokens[:500]) == text[:500]


@given(st.integers(2, 40), st.integers(1, 7), st.integers(1, 5), generators())
def test_a_target_is_what_comes_next(n, length, size, rng):
    length = min(length, n - 1)
    tokens = np.arange(100, 100 + n)
    inputs, targets = batches(tokens, length, size, rng)
    assert inputs.shape == targets.shape == (size, length)
    assert np.array_equal(targets, inputs + 1)
    assert np.array_equal(np.diff(inputs, axis=1), np.ones((size, length - 1)))
    assert inputs.min() >= 100
    assert targets.max() < 100 + n


def test_every_place_is_drawn():
    """Five tokens hold three pieces of length 2 with a target: all come, the last included."""
    inputs, _ = batches(np.arange(5), 2, 300, np.random.default_rng(0))
    starts = np.bincount(inputs[:, 0], minlength=5)
    assert starts[3:].sum() == 0
    assert starts[:3].min() > 70


def test_the_generator_decides_and_the_text_stays():
    tokens = np.arange(50)
    one, two = (batches(tokens, 4, 3, np.random.default_rng(9)) for _ in range(2))
    assert np.array_equal(one, two)
    assert np.array_equal(tokens, np.arange(50))
    one[0][:] = -1
    assert np.array_equal(tokens, np.arange(50))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda rng: batches(np.arange(4), 4, 1, rng),
            "tokens: expected more than length, 4; got 4",
        ),
        (lambda rng: batches(np.arange(4), 0, 1, rng), "length: expected"),
        (lambda rng: batches(np.arange(4), 2, 0, rng), "size: expected"),
        (
            lambda rng: batches(np.zeros((2, 4), int), 2, 1, rng),
            r"tokens: expected shape \(T,\); got \(2, 4\)",
        ),
    ],
)
def test_bad_input(call, words):
    with pytest.raises(ValueError, match=words):
        call(np.random.default_rng(0))


def test_examples():
    ran = doctest.testmod(datasets)
    assert ran.attempted
    assert not ran.failed
