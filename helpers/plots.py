"""Figures of attributions; every function returns (figure, axes) and leaves saving to the caller."""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.artist import Artist
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

PAGE = 7.2  # inches, the width of a printed page's text
CHARACTER = 0.073  # inches that a character of a token takes, in the strips
FAMILY_COLORS = {"attention": "#2c6fbb", "gradient": "#2a8c55", "input": "#c0392b", "none": "#7f7f7f"}
FAMILIES = {  # what a method needs: attention alone, a gradient, changed inputs, or nothing of the model
    "attention": (
        "Shapley-Att-CLS",
        "Shapley-Att-Mutual",
        "Shapley-Att-Max-Mutual",
        "Max-Mutual (published, uniform)",
        "Max-Mutual (published, kernel)",
        "Att (received)",
        "Att (row sum, constant)",
        "Attention rollout",
        "Network on A, taught by people",
        "Network on A, taught by the model",
    ),
    "gradient": (
        "Shapley-Grad-Att-CLS",
        "Shapley-Grad-Att-Mutual",
        "Shapley-Grad-Att-Max-Mutual",
        "Grad-Max-Mutual (published, uniform)",
        "Grad-Max-Mutual (published, kernel)",
        "Grad-SAM",
        "Chefer",
        "Chefer (signed)",
        "Gradient × input",
        "CP-LRP",
        "AttnLRP",
        "Shapley-Rel-Att-CLS",
        "Shapley-Rel-Att-Received",
        "Shapley-Rel-Att-Contrast",
        "Integrated gradients",
    ),
    "input": (
        "Leave-one-out",
        "Shapley-Input",
        "Shapley-Input (sampled)",
        "SHAP (signed)",
        "SHAP (absolute)",
    ),
    "none": ("Random", "First tokens", "Longest words", "People", "People (signed)"),
}
FAMILY = {method: family for family, methods in FAMILIES.items() for method in methods}
FAMILY_MARKS = {"attention": "o", "gradient": "^", "input": "s", "none": "X"}
FAMILY_WORDS = {
    "attention": "reads attention",
    "gradient": "uses gradients",
    "input": "erases inputs",
    "none": "knows nothing of the model",
}
CONCEPT_COLORS = {
    "striped": "#0072b2",
    "dotted": "#e69f00",
    "zigzagged": "#cc79a7",
    "red": "#d55e00",
    "blue": "#0072b2",
    "green": "#009e73",
    "yellow": "#b8a000",
}
SIGNED = "RdBu_r"  # centred on zero: red speaks for the class, blue against it
UNSIGNED = "viridis"
STYLE: dict = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.dpi": 100,
    "pdf.fonttype": 42,
    "font.family": "DejaVu Sans",
}


def signed_part(low: float) -> ListedColormap:
    """Return the part of the signed colours from `low` (−1 to 0) to 1, for a scale that begins there."""
    return ListedColormap(plt.get_cmap(SIGNED)(np.linspace((1 + low) / 2, 1, 256)))


def use_style() -> None:
    """Set fonts and lines that stay legible in a printed column."""
    plt.rcParams.update(STYLE)


def token_strips(
    sentences: Sequence[tuple[str, Sequence[str], Mapping[str, Sequence[float]]]], line: int = 66
) -> tuple[plt.Figure, np.ndarray]:
    """Draw sentences as lines of coloured tokens, one for each method, all on one colour scale.

    sentences  (title, tokens, {method: attribution of each token}) each
    line       characters after which a sentence goes on in a new line

    Each line is divided by its largest absolute value, so zero and sign stay where they are and methods of
    different units can be compared. Methods of one family (`FAMILIES`) stand together with its marker, a
    gap after them; the figure is as wide as its longest line. Returns the figure and one axes for each
    sentence.
    """
    layouts = [_break_lines(tokens, line) for _, tokens, _ in sentences]
    sentences = [(title, tokens, _by_family(methods)) for title, tokens, methods in sentences]
    starts = [
        _line_starts(list(methods), layout[-1][1] + 1)
        for (_, _, methods), layout in zip(sentences, layouts, strict=True)
    ]
    heights = [ends[-1] for ends in starts]
    names = list(dict.fromkeys(name for *_, methods in sentences for name in methods))
    right = max([48.0, *(left + width for layout in layouts for left, _, width in layout)])
    margin = 4 + 0.85 * max(map(len, names))  # characters left of the tokens, for the names of methods
    figure, axes = plt.subplots(
        len(sentences),
        1,
        figsize=(CHARACTER * (margin + right), 0.2 * sum(heights) + 0.75),
        squeeze=False,
        gridspec_kw={"height_ratios": heights},
        layout="constrained",
    )
    scale = ScalarMappable(Normalize(-1, 1), SIGNED)
    plain = {"va": "center", "parse_math": False}  # a price in dollars is no formula
    for axis, (title, tokens, methods), layout, tops in zip(
        axes[:, 0], sentences, layouts, starts, strict=True
    ):
        axis.set(xlim=(-margin, right), ylim=(tops[-1], 0))
        axis.axis("off")
        axis.text(-margin, 0.5, title, fontsize=8, fontweight="bold", **plain)
        for top, (method, values) in zip(tops, methods.items(), strict=False):
            axis.text(-1.9, top + 0.5, method, ha="right", fontsize=7.5, **plain)
            if family := FAMILY.get(method):
                axis.scatter(-0.9, top + 0.5, s=16, marker=FAMILY_MARKS[family], color=FAMILY_COLORS[family])
            shares = np.asarray(values, dtype=float)
            shares = shares / (np.abs(shares).max() or 1)
            colors = scale.to_rgba(shares)
            for token, color, (left, down, width) in zip(tokens, colors, layout, strict=True):
                axis.add_patch(
                    Rectangle((left, top + down + 0.06), width - 0.15, 0.88, color=color, linewidth=0)
                )
                ink = "white" if np.dot(color[:3], (0.299, 0.587, 0.114)) < 0.5 else "black"
                axis.text(
                    left + width / 2, top + down + 0.5, token, ha="center", fontsize=7.5, color=ink, **plain
                )
    bar = figure.colorbar(
        scale, ax=axes[:, 0].tolist(), orientation="horizontal", aspect=50, pad=0.02, shrink=0.75
    )
    bar.set_ticks([-1, -0.5, 0, 0.5, 1], labels=["−1\nagainst", "−0.5", "0", "0.5", "1\nfor"])
    bar.ax.tick_params(labelsize=7.5)
    bar.set_label("attribution / largest |attribution| of the line", fontsize=7.5)
    if set(names) <= set(FAMILY):
        family_legend(figure, names, ncols=2)
    return figure, axes[:, 0]


def _by_family(methods: Mapping[str, Sequence[float]]) -> dict[str, Sequence[float]]:
    """Return methods in the order of the families, their own order kept; unknown ones come first."""
    order = [*FAMILIES].index
    return dict(sorted(methods.items(), key=lambda item: order(FAMILY[item[0]]) if item[0] in FAMILY else -1))


def _line_starts(methods: Sequence[str], lines: int) -> list[float]:
    """Return where each method's `lines` begin below a title, and the end: a gap between families."""
    starts = [1.0]
    for method, following in zip(methods, [*methods[1:], ""], strict=True):
        changes = following and FAMILY.get(method) != FAMILY.get(following)
        starts.append(starts[-1] + lines + (0.35 if changes else 0))
    return [*starts[:-1], starts[-1] + 0.4]


def _break_lines(tokens: Sequence[str], line: int) -> list[tuple[float, int, float]]:
    """Return (left, line number, width) of each token, in characters."""
    places, left, down = [], 0.0, 0
    for token in tokens:
        width = max(len(token), 2) * 0.92 + 1.0
        if left and left + width > line:
            left, down = 0.0, down + 1
        places.append((left, down, width))
        left += width
    return places


def method_strips(
    scores: pd.DataFrame, intervals: pd.DataFrame, measure: str, label: str | None = None
) -> tuple[plt.Figure, np.ndarray]:
    """Draw a panel for each set, a strip for each method: inputs as dots, the mean with its interval.

    scores     long table with the columns set, method, family and `measure`, one line for each input
    intervals  the same without inputs: set, method, family, mean, low, high of `measure`

    Marker and colour tell the families apart (`FAMILY_MARKS`, `FAMILY_COLORS`). Returns the figure and one
    axes for each set.
    """
    sets = list(dict.fromkeys(scores["set"]))
    methods = list(dict.fromkeys(scores["method"]))
    figure, axes = plt.subplots(
        1,
        len(sets),
        figsize=(PAGE - 0.6, 0.19 * len(methods) + 1.2),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axis, name in zip(axes[0], sets, strict=True):
        part = scores[scores["set"] == name]
        for family, own in part.groupby("family", sort=False):
            sns.stripplot(
                own,
                x=measure,
                y="method",
                order=methods,
                color=FAMILY_COLORS[family],
                marker=FAMILY_MARKS[family],
                ax=axis,
                size=2,
                alpha=0.4,
                jitter=0.3,
                linewidth=0,
                legend=False,
                rasterized=True,
                zorder=1,
            )
        axis.axvline(0, color="black", linewidth=0.5, zorder=0)
        for row in intervals[intervals["set"] == name].itertuples():
            place = methods.index(row.method)
            axis.fill_betweenx(
                [place - 0.36, place + 0.36], row.low, row.high, color="black", alpha=0.25, linewidth=0
            )
            axis.plot(
                [row.mean, row.mean], [place - 0.36, place + 0.36], color="black", linewidth=1.2, zorder=3
            )
        axis.set(title=f"{name} (n = {part['method'].value_counts().max()})", xlabel="", ylabel="")
        axis.set_ylim(len(methods) - 0.4, -0.6)
        axis.tick_params(axis="y", length=0, labelsize=7.5)
        axis.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.tick_params(axis="x", labelsize=7)
        axis.grid(axis="x", color="#dddddd", linewidth=0.5)
        axis.set_axisbelow(True)
    figure.supxlabel(label or measure, fontsize=8)
    mean = Line2D([], [], color="black", linestyle="none", marker="|", markersize=7, label="mean")
    interval = Rectangle((0, 0), 1, 1, color="black", alpha=0.25, linewidth=0, label="95 % interval")
    family_legend(figure, methods, ncols=3, also=[mean, interval], side="upper")
    return figure, axes[0]


def method_points(
    axis: plt.Axes,
    values: pd.Series,
    filled: Collection[str] | None = None,
    order: Sequence[str] | None = None,
    bars: bool = False,
    intervals: pd.DataFrame | None = None,
) -> None:
    """Draw one value for each method, methods from the top down, the marker's shape and colour by family.

    values     the value of each method; those that `order` lacks are left out
    filled     methods whose marker is filled, the others' are hollow; default all
    order      methods from the top down, empty lines where `values` has none; default that of `values`
    bars       draw a bar from 0 to each value, too
    intervals  columns low and high of each method, drawn as a black line
    """
    order = list(values.index if order is None else order)
    for place, method in enumerate(order):
        if pd.isna(value := values.get(method)):
            continue
        family = FAMILY.get(method, "gradient")
        colour = FAMILY_COLORS[family]
        inside = colour if filled is None or method in filled else "white"
        if bars:
            axis.barh(place, value, color=colour, height=0.6, alpha=0.35)
        if intervals is not None:
            axis.hlines(place, *intervals.loc[method, ["low", "high"]], color="black", linewidth=1)
        marker = FAMILY_MARKS[family]
        axis.scatter(
            value, place, s=18, zorder=3, clip_on=False, marker=marker, edgecolors=colour, facecolors=inside
        )
    axis.set_yticks(range(len(order)), order, fontsize=7)
    axis.set_ylim(len(order) - 0.4, -0.6)


def family_legend(
    figure: plt.Figure,
    methods: Iterable[str],
    ncols: int = 4,
    also: Sequence[Artist] = (),
    side: str = "lower",
) -> None:
    """Say beside a figure what the shapes mean of those families that are in it, and what `also` is."""
    present = {FAMILY.get(method, "gradient") for method in methods}
    look: dict[str, Any] = {"linestyle": "none", "markersize": 4.5}
    handles: list[Artist] = [
        Line2D([], [], marker=FAMILY_MARKS[name], color=FAMILY_COLORS[name], label=said, **look)
        for name, said in FAMILY_WORDS.items()
        if name in present
    ]
    handles += also
    place: Any = f"outside {side} center"
    figure.legend(handles=handles, loc=place, ncols=ncols, frameon=False, fontsize=7)


def patch_heatmaps(
    rows: Sequence[tuple[str, np.ndarray, Mapping[str, np.ndarray]]],
    shared: bool = False,
    outlines: Sequence[np.ndarray] | None = None,
    unsigned: Mapping[str, str] | None = None,
    overlay: bool = False,
    width: float = PAGE,
    fontsize: float = 6.5,
    what: str = "attribution",
) -> tuple[plt.Figure, np.ndarray]:
    """Draw images as rows and methods as columns of patch heatmaps, all on one signed colour scale.

    rows      (title, image, {method: attribution of each patch, (rows, columns)}) each; image in uint8 or [0,
              1]
    shared    divide all maps of a column by the largest absolute value in it, to compare them; else each map
              by its own
    outlines  bool mask (height, width) of each row, whose border is drawn over the maps
    unsigned  {column: unit} of columns with positive quantities: a scale of their own, from 0 to the column's
              largest
    overlay   lay the maps over the image in grey, the more opaque the larger the value
    width     of the figure in inches; on a small screen letters are the larger the narrower it is
    what      the maps show, for the label of the colour bar

    Zero is white and stays where it is; every patch is one flat square. The colour bar shows negative values
    only where there are some. Returns the figure and axes (rows, 1 + methods).
    """
    unsigned = unsigned or {}
    methods = list(rows[0][2])
    side = (width - 0.3) / (1 + len(methods))
    figure, axes = plt.subplots(
        len(rows),
        1 + len(methods),
        figsize=(width, side * len(rows) + 0.13 * fontsize),
        squeeze=False,
        layout="constrained",
    )
    largest = {method: max(np.abs(maps[method]).max() for *_, maps in rows) for method in methods}
    for row, (title, image, maps) in enumerate(rows):
        height, width = np.shape(image)[:2]
        axes[row, 0].imshow(image, interpolation="nearest")
        axes[row, 0].set_ylabel(title, fontsize=fontsize)
        for axis, (method, values) in zip(axes[row, 1:], maps.items(), strict=True):
            values = np.asarray(values, dtype=float)
            top = largest[method] if shared or method in unsigned else np.abs(values).max()
            low, colors = (0, UNSIGNED) if method in unsigned else (-1, SIGNED)
            frame = {"extent": (0, width, height, 0), "interpolation": "nearest"}
            opacity = 1.0
            if overlay:
                grey = np.asarray(image, dtype=float).mean(-1)
                axis.imshow(grey, "gray", **frame)
                opacity = 0.85 * np.clip(np.abs(values) / (top or 1), 0, 1)
            axis.imshow(values / (top or 1), colors, vmin=low, vmax=1, alpha=opacity, **frame)
            if outlines is not None and method not in unsigned:
                centres = np.arange(width) + 0.5, np.arange(height) + 0.5
                axis.contour(*centres, outlines[row], levels=[0.5], colors="black", linewidths=0.5)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    axes[0, 0].set_title("image", fontsize=fontsize)
    for axis, method in zip(axes[0, 1:], methods, strict=True):
        name = re.sub("(Shapley-)(?=.*Att-)", r"\1\n", method).replace("Att-", "Att-\n")
        axis.set_title(name.replace(" ", "\n"), fontsize=fontsize)
    signed = [0, *(index for index, method in enumerate(methods, 1) if method not in unsigned)]
    against = any(np.min(maps[name]) < 0 for *_, maps in rows for name in methods if name not in unsigned)
    said = f"{what} / largest |{what}| of the {'column' if shared else 'map'}"
    _bar_below(figure, axes[:, signed], SIGNED, -1, said, fontsize, -1 if against else 0)
    for method, unit in unsigned.items():
        _bar_below(figure, axes[:, 1 + methods.index(method)], UNSIGNED, 0, unit, fontsize)
    return figure, axes


def _bar_below(
    figure, axes: np.ndarray, colors: str, low: float, label: str, fontsize: float, start: float = 0
) -> None:
    """Put a horizontal colour bar under some columns: the colours of low to 1, shown from `start` on."""
    scale = ScalarMappable(Normalize(low, 1), colors)
    thin = 50 if axes.ndim > 1 else 8
    bar = figure.colorbar(
        scale, ax=list(axes.flat), orientation="horizontal", fraction=0.03, pad=0.02, aspect=thin, shrink=0.8
    )
    bar.set_label(label, fontsize=fontsize)
    bar.ax.tick_params(labelsize=fontsize)
    bar.set_ticks([0, 0.5, 1] if start == 0 else [-1, -0.5, 0, 0.5, 1])
    bar.ax.set_xlim(start, 1)
