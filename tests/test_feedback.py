"""What a learner reads: the facts, escaped, in few lines, the same text and markup everywhere."""

import re
from dataclasses import replace
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
from toys import BACKWARD, PRODUCT, answer, backward, exercise_of, no_keepdims, no_row_sum, product

from attn_lessons.grading import feedback
from attn_lessons.grading.exercise import Case, Mistake
from attn_lessons.grading.records import Judgement

EVIL = "<script>alert('x')</script>\"&"


class Balanced(HTMLParser):
    """Fails where a tag is not closed in order."""

    def __init__(self):
        super().__init__()
        self.open, self.text = [], []

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def parsed(markup):
    parser = Balanced()
    parser.feed(markup)
    parser.close()
    assert parser.open == []
    return " ".join(" ".join(parser.text).split())


def shout(*args, **kwargs):
    raise ValueError(EVIL)


def grads_wrong(dy, x, w):
    dx, grads, size = product(dy, x, w)
    return dx, {**grads, "w": grads["w"] * 2}, size


ANSWERS = [
    (BACKWARD, backward),
    (BACKWARD, no_row_sum),
    (BACKWARD, no_keepdims),
    (BACKWARD, shout),
    (BACKWARD, lambda dp, p, axis=-1: None),
    (BACKWARD, lambda dp, p, axis=-1: backward(dp, p, axis) * np.nan),
    (BACKWARD, lambda dp, p, axis=-1: backward(dp, p, axis) + 1e-9),
    (BACKWARD, lambda dp, p, axis=-1: backward(dp, p, axis) + 1j),
    (BACKWARD, lambda dp, p, axis=-1: EVIL),
    (BACKWARD, lambda dp, p, axis=-1: {EVIL: dp}),
    (PRODUCT, grads_wrong),
    (PRODUCT, lambda dy, x, w: (*product(dy, x, w)[:2], 0.0)),
]


@pytest.mark.parametrize(("exercise", "function"), ANSWERS)
def test_short_text_and_sound_markup(exercise, function):
    verdict = answer(exercise, function)
    text, markup = feedback.text(verdict), feedback.html(verdict, exercise)
    assert len(text.splitlines()) <= 15
    assert max(map(len, text.splitlines())) <= 100
    told = parsed(markup)
    assert exercise.id in told
    assert "script>" not in re.sub("&lt;/?script", "", markup)
    assert "alert('x')" not in markup.replace("alert(&#x27;x&#x27;)", "")
    assert markup == feedback.html(verdict, exercise)
    if verdict.mismatch is not None:
        assert verdict.mismatch.case in told
        assert verdict.mismatch.case in text


def test_a_pass_names_its_cases_and_nothing_that_varies():
    verdict = answer(BACKWARD, backward)
    text = feedback.text(verdict)
    assert text == (
        "backward: passed, 5 cases on two draws of numbers each\n"
        "  one row, a batch, axis 0, heads, zeros"
    )
    told = parsed(feedback.html(verdict))
    assert all(name in told for name in verdict.cases_passed)


def test_a_failure_holds_mistake_reason_section_case_hint_and_numbers(monkeypatch):
    verdict = answer(BACKWARD, no_row_sum)
    monkeypatch.delenv("ATTN_LESSONS_BOOK", raising=False)
    text, markup = feedback.text(verdict), feedback.html(verdict, BACKWARD)
    for told in (text, parsed(markup)):
        for fact in ("ow sum dropped", "the normaliser moves too", "ch00.html#sum", "A vector"):
            assert fact in told
        assert all(label in told for label in ("got", "expected", "difference"))
    assert "<a " not in markup


def test_the_link_into_the_book_is_there_where_the_book_is_served(monkeypatch):
    verdict = answer(BACKWARD, no_row_sum)
    monkeypatch.setenv("ATTN_LESSONS_BOOK", "/somewhere/book")
    monkeypatch.delenv("JUPYTERHUB_SERVICE_PREFIX", raising=False)
    assert "<a href='/book/ch00.html#sum' target='_blank'" in feedback.html(verdict)
    monkeypatch.setenv("JUPYTERHUB_SERVICE_PREFIX", "/user/ada/")
    assert "<a href='/user/ada/book/ch00.html#sum'" in feedback.html(verdict)
    assert feedback.text(verdict) == feedback.text(verdict)


def test_observations_are_offered_as_such():
    verdict = answer(BACKWARD, lambda dp, p, axis=-1: 2 * backward(dp, p, axis))
    assert "Seen: dz is 2 times what it should be" in feedback.text(verdict)
    told = parsed(feedback.html(verdict))
    assert "None of the known mistakes gives these numbers." in told
    assert "dz is 2 times what it should be." in told


def numbers_in(markup):
    """The tables of a failure as lists of rows."""
    tables = re.findall(r"<table.*?</table>", markup, re.S)
    tables = [table if "<th scope='col'" in table else f"<tr></tr>{table}" for table in tables]
    return [
        [
            re.findall(r"<td[^>]*>([^<]+)</td>", row)
            for row in re.findall(r"<tr.*?</tr>", t, re.S)[1:]
        ]
        for t in tables
    ]


def test_small_arrays_are_shown_whole():
    want = np.arange(12.0).reshape(3, 4)
    exercise = exercise_of(lambda: want, (), id="toy")
    markup = feedback.html(answer(exercise, lambda: want + (want == 6)))
    got, expected, difference = numbers_in(markup)
    assert expected == [["0", "1", "2", "3"], ["4", "5", "6", "7"], ["8", "9", "10", "11"]]
    assert got[1] == ["4", "5", "7", "7"]
    assert difference == [["0"] * 4, ["0", "0", "1", "0"], ["0"] * 4]
    assert markup.count("font-weight:700;background") == 3


def test_large_arrays_are_shown_around_the_largest_error():
    want = np.zeros((2, 40, 50))
    wrong = want.copy()
    wrong[1, 39, 20] = 3
    exercise = exercise_of(lambda: want, (), id="toy", returns=("probs",))
    markup = feedback.html(answer(exercise, lambda: wrong))
    got, _, _ = numbers_in(markup)
    assert [len(got), len(got[0])] == [5, 5]
    assert got[4] == ["0", "0", "3", "0", "0"]
    assert "probs[1, 35:40, 18:23]" in markup
    assert ">39</th>" in markup


def test_vectors_and_single_numbers():
    vector = exercise_of(lambda: np.arange(4.0), (), id="toy")
    ((got, want, gap),) = numbers_in(feedback.html(answer(vector, lambda: np.arange(4.0) * 2)))
    assert (got, want, gap) == (["0", "2", "4", "6"], ["0", "1", "2", "3"], ["0", "1", "2", "3"])
    single = exercise_of(lambda: 0.25, (), id="toy")
    (rows,) = numbers_in(feedback.html(answer(single, lambda: 0.5)))
    assert rows == [["0.5000"], ["0.2500"], ["0.2500"]]
    assert "0.25" in feedback.text(answer(single, lambda: 0.5))


def heat_map(markup):
    found = re.search(r"<svg.*?</svg>", markup, re.S)
    return found and ElementTree.fromstring(found[0])


def test_a_heat_map_where_the_output_is_laid_out_over_tokens():
    def one_row(dp, p, axis=-1):
        dz = backward(dp, p, axis)
        if dz.shape == (3, 4):
            dz[1] += [0.0, 0.5, -1.0, 0.25]
        return dz

    verdict = answer(BACKWARD, one_row)
    svg = heat_map(feedback.html(verdict, BACKWARD))
    assert svg.get("role") == "img"
    assert svg.get("aria-label") == (
        "Heat map of the error of dz: 3 of 12 entries off, the largest at row 1, column 2"
    )
    fills = [cell.get("fill") for cell in svg.iter("rect")]
    assert len(fills) == 12
    assert fills.count("#ffffff") == 9
    assert fills[6] == "#b2182b"  # the largest, negative: red
    assert fills[5] == "#90b2d6"  # half as large, positive: blue on the way
    assert heat_map(feedback.html(verdict)) is None
    assert heat_map(feedback.html(verdict, replace(BACKWARD, tokens=()))) is None


def test_heat_maps_of_large_and_of_broken_arrays():
    want = np.zeros((3, 60, 90))
    broken = want.copy()
    broken[2, 50, 80] = np.nan
    exercise = exercise_of(lambda: want, (), id="toy", tokens=("y",))
    svg = heat_map(feedback.html(answer(exercise, lambda: broken), exercise))
    cells = [cell.get("fill") for cell in svg.iter("rect")]
    assert len(cells) == 24 * 24
    assert cells.count("#111111") == 1
    assert "row 50, column 80" in svg.get("aria-label")


def test_a_boolean_output():
    want = np.tril(np.ones((4, 4), bool))
    exercise = exercise_of(lambda: want, (), id="toy", tokens=("y",))
    verdict = answer(exercise, lambda: want.T)
    markup = feedback.html(verdict, exercise)
    parsed(markup)
    assert numbers_in(markup)[1][0] == ["True", "False", "False", "False"]
    assert heat_map(markup) is not None


def test_names_hints_and_reasons_are_escaped():
    mistake = Mistake(EVIL, EVIL, EVIL, lambda x: x)
    exercise = exercise_of(
        lambda x: x * 2,
        id=EVIL,
        cases=lambda rng: [Case(EVIL, (np.ones((2, 2)),), hint=EVIL)],
        mistakes=(mistake,),
        returns=(EVIL,),
        tokens=(EVIL,),
    )
    for function in (lambda x: x, lambda x: x * 3, lambda x: EVIL, shout, lambda x: x * 2):
        markup = feedback.html(answer(exercise, function), exercise)
        assert "<script" not in markup
        assert parsed(markup)


def test_text_alone_is_enough_for_a_verdict_without_details():
    bare = Judgement("softmax", "timeout", 0, 2, message="no answer within 10 s")
    assert "softmax" in feedback.text(bare)
    assert "softmax" in feedback.html(bare)
