"""Pictures in one style: heat maps, and a gradient beside the numerical one."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from jaxtyping import Bool, Float, Real
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from attn_lessons.gradcheck import GradientReport

STYLE = Path(__file__).with_name("attn.mplstyle")
WIDTH = 4.8
MARK = "#D55E00"
INK = "#222222"
NOT_A_NUMBER = "#CC79A7"


def use_style() -> None:
    """Draw everything from here on in the book's style (``attn.mplstyle``)."""
    plt.style.use(STYLE)


def heat_map(
    values: Real[np.ndarray, "..."],
    *,
    row_labels: Sequence[str] | None = None,
    column_labels: Sequence[str] | None = None,
    row_name: str = "",
    column_name: str = "",
    value_name: str = "",
    numbers: bool | None = None,
    mark: Bool[np.ndarray, "..."] | None = None,
) -> Figure:
    """Draw an array as coloured cells: white is 0, blue stronger with size, red negative.

    ``row_name`` and ``column_name`` label the axes, ``row_labels`` and ``column_labels`` their
    ticks, ``value_name`` the colour bar. Cells show their numbers where they fit, unless
    ``numbers`` says otherwise. ``mark`` outlines the entries where it is True. NaN and infinity
    are crossed out.

    Shapes: ``values`` any; leading axes are stacked as rows, a vector is one row. ``mark`` as
    ``values``.

    ValueError: a list of labels or ``mark`` does not fit ``values``.
    """
    grid, marked = _grid(values), None if mark is None else _grid(_fitting(mark, values))
    _check_labels("row_labels", row_labels, grid.shape[0])
    _check_labels("column_labels", column_labels, grid.shape[1])
    with plt.style.context(STYLE):
        height = min(max(WIDTH * 0.8 * grid.shape[0] / max(grid.shape[1], 1), 0.5), 4.5)
        fig, ax = plt.subplots(figsize=(WIDTH, height + 0.9))
        image = _cells(ax, grid, _norm(grid), marked, numbers)
        _ticks(ax, row_labels, column_labels)
        ax.set(xlabel=column_name, ylabel=row_name)
        fig.colorbar(image, ax=ax, label=value_name, shrink=0.9)
    return _finished(fig)


def gradient_report(report: GradientReport) -> Figure:
    """Draw a report: the numerical gradient, the one checked, and the relative error.

    Both gradients share one colour scale, the error has a logarithmic one. Entries that are
    off are outlined in orange. Where the shapes differ, there is no error to draw.

    ValueError: the gradient has no entries.
    """
    same = report.got.shape == report.want.shape
    shown = [("numerical", report.want, None), (report.name, report.got, report.wrong)]
    shown += [("relative error", report.error, report.wrong)] * same
    norm = _norm(np.concatenate([report.want.ravel(), report.got.ravel()]))
    with plt.style.context(STYLE):
        fig, axes = _panels([_grid(values) for _, values, _ in shown])
        images: list[Any] = []
        for ax, (label, values, wrong) in zip(axes, shown, strict=True):
            scale, floor = (
                (LogNorm(1e-10, 1, clip=True), 1e-10) if len(images) == 2 else (norm, None)
            )
            marked = _grid(wrong) if same and wrong is not None else None
            images.append(_cells(ax, np.clip(_grid(values), floor, None), scale, marked, False))
            ax.set_title(label if same else f"{label} {values.shape}", loc="left")
            _corners(ax, values.shape)
        if same and _side_by_side(fig):
            for ax in axes[1:]:
                ax.yaxis.set_ticks([])
        _bar(fig, images[1], axes[:2], [norm.vmin or 0, 0, norm.vmax or 0])
        if same:
            _bar(fig, images[2], axes[2:], [1e-10, 1])
    return _finished(fig)


# --- drawing ----------------------------------------------------------------------------------


def _cells(
    ax: Axes,
    grid: Float[np.ndarray, "rows columns"],
    norm: Normalize,
    marked: Bool[np.ndarray, "rows columns"] | None,
    numbers: bool | None,
) -> Any:
    signed = norm.vmin is not None and norm.vmin < 0
    shown = np.ma.masked_invalid(grid)
    image = ax.imshow(shown, cmap="RdBu" if signed else "Blues", norm=norm, aspect="auto")
    for row, column in np.argwhere(~np.isfinite(grid)):
        ax.plot(column, row, "x", color=NOT_A_NUMBER, markersize=6, markeredgewidth=1.8)
    if numbers or (numbers is None and grid.shape[1] <= 8 and grid.shape[0] <= 10):
        _numbers(ax, grid, image)
    if marked is not None and marked.any():
        _outline(ax, marked)
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    return image


def _numbers(ax: Axes, grid: Float[np.ndarray, "rows columns"], image: Any) -> None:
    for (row, column), value in np.ndenumerate(grid):
        if np.isfinite(value):
            ink = "white" if _luminance(image.to_rgba(value)) < 0.2 else INK
            text = f"{value:.2f}" if 0.005 <= abs(value) < 1000 else f"{value:.2g}"
            ax.text(column, row, text, ha="center", va="center", color=ink, fontsize=8.5)


def _luminance(colour: Sequence[float]) -> float:
    """Relative luminance of WCAG 2; ink and white contrast alike with 0.2."""
    part = np.array(colour[:3])
    linear = np.where(part <= 0.04045, part / 12.92, ((part + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def _outline(ax: Axes, marked: Bool[np.ndarray, "rows columns"]) -> None:
    """Draw the border between marked cells and the others."""
    around = np.pad(marked, 1)
    segments = []
    for row, column in np.argwhere(marked):
        left, top = column - 0.5, row - 0.5
        if not around[row, column + 1]:
            segments.append([(left, top), (left + 1, top)])
        if not around[row + 2, column + 1]:
            segments.append([(left, top + 1), (left + 1, top + 1)])
        if not around[row + 1, column]:
            segments.append([(left, top), (left, top + 1)])
        if not around[row + 1, column + 2]:
            segments.append([(left + 1, top), (left + 1, top + 1)])
    lines = LineCollection(segments, colors=MARK, linewidths=2, capstyle="projecting")
    lines.set_clip_on(False)
    ax.add_collection(lines, autolim=False)


def _panels(grids: Sequence[Float[np.ndarray, "_ _"]]) -> tuple[Figure, list[Axes]]:
    """Side by side where cells stay wide enough to see on a phone, else one above the other."""
    rows, columns = np.max([grid.shape for grid in grids], axis=0)
    if columns <= 8:
        height = min(max(0.22 * rows, 0.6), 4.0) + 1.1
        fig, axes = plt.subplots(1, len(grids), figsize=(WIDTH, height), squeeze=False)
    else:
        height = min(max(0.2 * rows, 0.3), 2.5) + 0.75
        fig, axes = plt.subplots(len(grids), 1, figsize=(WIDTH, height * len(grids)), squeeze=False)
    fig.set_layout_engine("constrained", wspace=0.06)
    return fig, list(axes.ravel())


def _side_by_side(fig: Figure) -> bool:
    place = fig.axes[0].get_subplotspec()
    return place is not None and place.get_gridspec().nrows == 1


def _bar(fig: Figure, image: Any, axes: Sequence[Axes], ticks: Sequence[float]) -> None:
    if _side_by_side(fig):
        bar = fig.colorbar(image, ax=list(axes), location="bottom", pad=0.03, aspect=9 * len(axes))
    else:
        bar = fig.colorbar(image, ax=list(axes), location="right", pad=0.03, shrink=0.9)
    ticks = list(dict.fromkeys(ticks))
    bar.set_ticks(ticks, labels=[_short(t) for t in ticks])
    bar.ax.minorticks_off()
    bar.outline.set_visible(False)
    if _side_by_side(fig):
        # Labels at the ends stay within their bar, clear of the next one's.
        texts = bar.ax.get_xticklabels()
        texts[0].set_horizontalalignment("left")
        texts[-1].set_horizontalalignment("right")


def _ticks(ax: Axes, rows: Sequence[str] | None, columns: Sequence[str] | None) -> None:
    for axis, labels in ((ax.yaxis, rows), (ax.xaxis, columns)):
        axis.set_major_locator(MaxNLocator(integer=True))
        if labels is not None:
            axis.set_ticks(range(len(labels)), labels=list(labels))


def _corners(ax: Axes, shape: tuple[int, ...]) -> None:
    """Ticks at the first and last row and column; stacked rows carry all their indices."""
    rows = list(np.ndindex(shape[:-1])) if len(shape) > 1 else []
    ends = [0, len(rows) - 1] if len(rows) > 1 else [0] * len(rows)
    ax.set_yticks(ends, labels=[", ".join(map(str, rows[i])) for i in ends])
    last = shape[-1] - 1 if shape else 0
    ax.set_xticks([0, last] if last else [0])


def _finished(fig: Figure) -> Figure:
    # Left open, a notebook would show it a second time at the end of the cell.
    plt.close(fig)
    return fig


# --- arrays -----------------------------------------------------------------------------------


def _grid(values: Real[np.ndarray, "..."] | Bool[np.ndarray, "..."]) -> np.ndarray:
    values = np.asarray(values)
    flat = values.reshape(1, 1) if values.ndim == 0 else values.reshape(-1, values.shape[-1])
    if flat.size == 0:
        raise ValueError(f"values: expected at least one entry; got shape {values.shape}")
    return flat if flat.dtype == bool else flat.astype(float)


def _norm(grid: Float[np.ndarray, "..."]) -> Normalize:
    finite = grid[np.isfinite(grid)]
    top = float(np.abs(finite).max(initial=0)) or 1.0
    return Normalize(-top if (finite < 0).any() else 0, top)


def _fitting(mark: Bool[np.ndarray, "..."], values: Real[np.ndarray, "..."]) -> np.ndarray:
    if np.shape(mark) != np.shape(values):
        raise ValueError(f"mark: expected shape {np.shape(values)}; got {np.shape(mark)}")
    return np.asarray(mark, bool)


def _check_labels(name: str, labels: Sequence[str] | None, n: int) -> None:
    if labels is not None and len(labels) != n:
        raise ValueError(f"{name}: expected {n} labels; got {len(labels)}")


def _short(value: float) -> str:
    return f"{value:.2g}".replace("-", "−")  # a minus as wide as the digits
