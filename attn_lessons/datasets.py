r"""Real data that needs no network: handwritten digits as short sequences, and a text.

- Digits: scikit-learn's copy of 1797 images of 8 × 8 pixels. A row of pixels is a token, so an
  image is a sequence of 8 tokens of 8 features, from top to bottom.
- Text: the help pages that Python carries, ``pydoc_data.topics``, as characters. They are another
  text in another version of Python; figures made of them say which one.

Nothing is kept on disk and nothing fetched.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Integer

from attn_lessons._arrays import as_count, check_rank

# Of the 1797 images, a fifth.
TEST_IMAGES = 360


class Digits(NamedTuple):
    """Images to learn from, and images to be tested on."""

    x_train: Float[np.ndarray, "train 8 8"]
    y_train: Integer[np.ndarray, train]
    x_test: Float[np.ndarray, "test 8 8"]
    y_test: Integer[np.ndarray, test]


def digits_sequences(seed: int = 0) -> Digits:
    r"""Images of digits as sequences of their 8 rows, split at random.

    Pixels run from 0 (paper) to 1 (ink) in steps of 1/16. The split is
    decided by ``seed``, the images are not: every seed divides the same
    1797.

    Shapes: x ``(images, 8, 8)``, y ``(images,)`` the digits 0 … 9;
    returns ``(x_train, y_train, x_test, y_test)``.

    Errors: ImportError without scikit-learn.

    Source: Alpaydin & Kaynak 1998, Optical Recognition of Handwritten
    Digits, UCI; the part that scikit-learn carries.
    """
    from sklearn.datasets import load_digits

    images, digits = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(images))
    x, y = images.reshape(-1, 8, 8)[order] / 16, digits[order]
    return Digits(x[TEST_IMAGES:], y[TEST_IMAGES:], x[:TEST_IMAGES], y[:TEST_IMAGES])


def topics_text() -> str:
    """The help pages of this version of Python, one after another by name."""
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics))


def characters(text: str) -> tuple[str, Integer[np.ndarray, T]]:
    r"""The characters that a text is made of, and the text as their numbers.

    >>> vocabulary, tokens = characters("attention")
    >>> vocabulary, tokens.tolist()
    ('aeinot', [0, 5, 5, 1, 3, 5, 2, 4, 3])

    The vocabulary is sorted, so that a text has one; ``vocabulary[i]``
    is the character of token i, and ``"".join(vocabulary[i] for i in
    tokens)`` the text again.

    Shapes: ``text`` of T characters; returns ``(vocabulary, tokens)``,
    tokens ``(T,)``.
    """
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    kinds, tokens = np.unique(points, return_inverse=True)
    return "".join(map(chr, kinds)), tokens


def batches(
    tokens: Integer[np.ndarray, T], length: int, size: int, rng: np.random.Generator
) -> tuple[Integer[np.ndarray, "B N"], Integer[np.ndarray, "B N"]]:
    r"""Pieces of a text, and what comes next at each of their places.

    .. math:: \mathrm{inputs}_{bn} = t_{s_b + n}, \qquad
              \mathrm{targets}_{bn} = t_{s_b + n + 1}

    The starts s are drawn by ``rng``, each place where a whole piece
    fits as likely as any other.

    Shapes: tokens ``(T,)``; inputs and targets ``(size, length)``.

    ValueError: ``length`` or ``size`` < 1; the text has not ``length``
    + 1 tokens.
    """
    tokens = np.asarray(tokens)
    check_rank("tokens", tokens, "T")
    length, size = as_count("length", length, 1), as_count("size", size, 1)
    if len(tokens) <= length:
        raise ValueError(f"tokens: expected more than length, {length}; got {len(tokens)}")
    starts = rng.integers(0, len(tokens) - length, size)
    places = starts[:, None] + np.arange(length)
    return tokens[places], tokens[places + 1]
