"""Figures: the style is applied, what is drawn is what the report says, bytes repeat."""

import io
import itertools
import subprocess
import sys

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.collections import LineCollection

from attn_lessons.figures import STYLE, gradient_report, heat_map, use_style
from attn_lessons.gradcheck import check_gradient

PHONE = 390 - 2 * 16


@pytest.fixture(autouse=True)
def _own_style():
    with mpl.rc_context():
        yield


def report(spoil, shape=(4, 5)):
    x = np.random.default_rng(0).normal(size=shape)
    grad = np.cos(x)
    return check_gradient(lambda x: np.sin(x).sum(), x, spoil(grad.copy()), name="dx")


def flip_row(g):
    g[1] *= -1
    return g


def images(fig):
    return [ax.images[0] for ax in fig.axes if ax.images]


def outline(ax):
    """The segments drawn around marked cells, as a set of unordered pairs of corners."""
    lines = [c for c in ax.collections if isinstance(c, LineCollection)]
    return {frozenset(map(tuple, s.tolist())) for c in lines for s in c.get_segments()}


def saved(fig, **options):
    buffer = io.BytesIO()
    fig.savefig(buffer, **options)
    return buffer.getvalue()


def test_the_style_is_the_books():
    use_style()
    assert plt.rcParams["figure.figsize"] == [4.8, 3.0]
    assert plt.rcParams["font.size"] == 10
    assert not plt.rcParams["axes.spines.top"]
    assert plt.rcParams["svg.hashsalt"]
    cycle = plt.rcParams["axes.prop_cycle"].by_key()
    assert [c.upper() for c in cycle["color"]] == [
        "#0072B2",
        "#D55E00",
        "#009E73",
        "#CC79A7",
        "#222222",
    ]
    assert cycle["linestyle"] == ["-", "--", "-.", ":", "-"]


def contrast(colour, ground):
    def luminance(c):
        c = np.array(mpl.colors.to_rgb(c))
        linear = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
        return linear @ [0.2126, 0.7152, 0.0722]

    light, dark = sorted((luminance(colour), luminance(ground)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_lines_stand_out_from_white():
    use_style()
    for colour in plt.rcParams["axes.prop_cycle"].by_key()["color"]:
        assert contrast(colour, "white") >= 2.9


def test_drawing_leaves_the_callers_style_alone():
    before = dict(plt.rcParams)
    gradient_report(report(flip_row))
    heat_map(np.eye(3))
    assert dict(plt.rcParams) == before
    assert plt.get_fignums() == [], "an open figure is shown twice in a notebook"


def test_a_report_shows_both_gradients_and_the_error():
    seen = report(flip_row)
    fig = gradient_report(seen)
    want, got, error = images(fig)
    np.testing.assert_array_equal(want.get_array(), seen.want)
    np.testing.assert_array_equal(got.get_array(), seen.got)
    np.testing.assert_array_equal(error.get_array(), np.maximum(seen.error, 1e-10))
    assert want.norm is got.norm, "one colour scale for both"
    assert -want.norm.vmin == want.norm.vmax == np.abs([seen.want, seen.got]).max()
    titles = [ax.get_title(loc="left") for ax in fig.axes[:3]]
    assert titles == ["numerical", "dx", "relative error"]


def test_wrong_entries_are_outlined_and_no_others():
    fig = gradient_report(report(flip_row))
    row = {frozenset({(c - 0.5, y), (c + 0.5, y)}) for c in range(5) for y in (0.5, 1.5)}
    ends = {frozenset({(x, 0.5), (x, 1.5)}) for x in (-0.5, 4.5)}
    assert outline(fig.axes[0]) == set()
    assert outline(fig.axes[1]) == outline(fig.axes[2]) == row | ends
    assert all(outline(ax) == set() for ax in gradient_report(report(lambda g: g)).axes)


def test_nan_is_crossed_out():
    def spoil(g):
        g[2, 3] = np.nan
        return g

    fig = gradient_report(report(spoil))
    crosses = [[tuple(line.get_xydata()[0]) for line in ax.lines] for ax in fig.axes[:3]]
    assert crosses == [[], [(3.0, 2.0)], [(3.0, 2.0)]]


@pytest.mark.parametrize("shape", [(), (1,), (7,), (4, 5), (2, 3, 4, 5), (3, 40), (60, 2), (1, 1)])
@pytest.mark.parametrize("factor", [1, 3])
def test_every_shape_is_drawn_within_a_phones_width(shape, factor):
    fig = gradient_report(report(lambda g: factor * g, shape))
    fig.draw_without_rendering()
    assert fig.get_figwidth() == 4.8
    box = fig.get_tightbbox()
    assert box.x0 >= -0.02
    assert box.x1 <= 4.82
    assert box.y0 >= -0.02
    assert box.y1 <= fig.get_figheight() + 0.02
    assert fig.get_figheight() <= 11
    pixels_a_point = PHONE / 4.8 / 72
    sizes = [t.get_fontsize() for t in fig.findobj(mpl.text.Text) if t.get_text()]
    assert min(sizes) * pixels_a_point >= 8.5, "CSS pixels on a phone"


def test_stacked_rows_carry_their_indices():
    fig = gradient_report(report(lambda g: g, (2, 3, 4)))
    labels = [t.get_text() for t in fig.axes[0].get_yticklabels()]
    assert labels == ["0, 0", "1, 2"]


def test_another_shape_is_drawn_without_an_error():
    fig = gradient_report(report(lambda g: g.T))
    assert len(images(fig)) == 2
    assert [ax.get_title(loc="left") for ax in fig.axes[:2]] == ["numerical (4, 5)", "dx (5, 4)"]


def test_labels_of_colour_bars_do_not_touch():
    fig = gradient_report(report(flip_row))
    fig.draw_without_rendering()
    bars = [ax for ax in fig.axes if not ax.images and ax.get_xticks().size]
    boxes = sorted(
        (t.get_window_extent() for ax in bars for t in ax.get_xticklabels() if t.get_text()),
        key=lambda b: b.x0,
    )
    assert len(boxes) >= 5
    assert all(a.x1 < b.x0 for a, b in itertools.pairwise(boxes))


def test_a_heat_map_starts_at_white_or_centres_on_it():
    (image,) = images(heat_map(np.array([[0.0, 0.5], [0.25, 1.0]])))
    assert image.norm.vmin == 0
    assert image.get_cmap().name == "Blues"
    assert min(image.to_rgba(0.0)[:3]) > 0.96
    (image,) = images(heat_map(np.array([[-1.0, 0.5], [0.0, 4.0]])))
    assert (image.norm.vmin, image.norm.vmax) == (-4, 4)
    assert min(image.to_rgba(0.0)[:3]) > 0.96
    (image,) = images(heat_map(np.zeros((2, 2))))
    assert image.norm.vmax > image.norm.vmin


def test_a_heat_map_writes_numbers_that_can_be_read():
    fig = heat_map(np.array([[0.1, 1.0], [np.nan, -0.001]]))
    ax = fig.axes[0]
    texts = {t.get_position(): t for t in ax.texts}
    shown = {p: t.get_text() for p, t in texts.items()}
    assert shown == {(0, 0): "0.10", (1, 0): "1.00", (1, 1): "-0.001"}
    image = ax.images[0]
    for (column, row), text in texts.items():
        cell = image.to_rgba(image.get_array()[row, column])
        assert contrast(text.get_color(), cell[:3]) >= 4.5
    assert not heat_map(np.ones((20, 20))).axes[0].texts
    assert heat_map(np.ones((9, 9)), numbers=True).axes[0].texts
    assert not heat_map(np.ones((2, 2)), numbers=False).axes[0].texts


def test_numbers_stand_out_from_every_shade():
    ramp = np.linspace(-1, 1, 41)
    for values in (ramp, np.abs(ramp)):
        ax = heat_map(values, numbers=True).axes[0]
        image = ax.images[0]
        for text in ax.texts:
            cell = image.to_rgba(values[int(text.get_position()[0])])
            assert contrast(text.get_color(), cell[:3]) >= 3.9


def test_a_heat_map_carries_its_names():
    fig = heat_map(
        np.eye(2, 3),
        row_labels=["the", "cat"],
        column_labels=["a", "b", "c"],
        row_name="query",
        column_name="key",
        value_name="probability",
        mark=np.eye(2, 3) > 0,
    )
    ax = fig.axes[0]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("key", "query")
    assert [t.get_text() for t in ax.get_yticklabels()] == ["the", "cat"]
    assert [t.get_text() for t in ax.get_xticklabels()] == ["a", "b", "c"]
    assert fig.axes[1].get_ylabel() == "probability"
    assert len(outline(ax)) == 8


def test_the_same_figure_gives_the_same_bytes():
    use_style()
    metadata = {"Date": None}
    first = saved(gradient_report(report(flip_row)), format="svg", metadata=metadata)
    again = saved(gradient_report(report(flip_row)), format="svg", metadata=metadata)
    assert first == again


def test_the_style_travels_with_the_package():
    assert STYLE.parent.name == "attn_lessons"
    assert STYLE.is_file()


def test_the_library_needs_no_matplotlib_without_figures():
    code = "import sys, attn_lessons.gradcheck as _; print('matplotlib' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"row_labels": ["a"]}, "row_labels: expected 2 labels; got 1"),
        ({"column_labels": ["a"]}, "column_labels: expected 3 labels; got 1"),
        ({"mark": np.ones(3, bool)}, r"mark: expected shape \(2, 3\); got \(3,\)"),
        ({"values": np.ones((0, 3))}, r"values: expected at least one entry; got shape \(0, 3\)"),
    ],
)
def test_bad_input_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        heat_map(**{"values": np.ones((2, 3)), **options})
