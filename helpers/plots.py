"""Figures of attributions; every function returns (figure, axes) and leaves saving to the caller."""

import re
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.patches import Rectangle

PAGE = 7.2  # inches, the width of a printed page's text
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
        "Signed received",
        "Integrated gradients",
    ),
    "input": (
        "Leave-one-out",
        "Shapley-Input",
        "Shapley-Input (sampled)",
        "SHAP (signed)",
        "SHAP (absolute)",
    ),
    "none": ("Random", "First tokens", "Longest words"),
}
FAMILY = {method: family for family, methods in FAMILIES.items() for method in methods}
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


def use_style() -> None:
    """Set fonts and lines that stay legible in a printed column."""
    plt.rcParams.update(STYLE)


def token_strips(
    sentences: Sequence[tuple[str, Sequence[str], Mapping[str, Sequence[float]]]], line: int = 84
) -> tuple[plt.Figure, np.ndarray]:
    """Draw sentences as rows of coloured tokens, one row a method, all on one colour scale.

    sentences  (title, tokens, {method: attribution of each token}) each
    line       characters after which a sentence goes on in a new line

    Each row is divided by its largest absolute value, so zero and sign stay where they are and methods of
    different units can be compared. Returns the figure and one axes a sentence.
    """
    layouts = [_break_lines(tokens, line) for _, tokens, _ in sentences]
    heights = [
        1 + len(methods) * (layout[-1][1] + 1)
        for (_, _, methods), layout in zip(sentences, layouts, strict=True)
    ]
    figure, axes = plt.subplots(
        len(sentences),
        1,
        figsize=(PAGE, 0.19 * sum(heights) + 0.45),
        squeeze=False,
        gridspec_kw={"height_ratios": heights},
        layout="constrained",
    )
    scale = ScalarMappable(Normalize(-1, 1), SIGNED)
    for axis, (title, tokens, methods), layout, height in zip(
        axes[:, 0], sentences, layouts, heights, strict=True
    ):
        axis.set(xlim=(-0.36 * line, line), ylim=(height, 0))
        axis.axis("off")
        axis.text(-0.36 * line, 0.5, title, va="center", fontsize=8, fontweight="bold")
        lines = layout[-1][1] + 1
        for row, (method, values) in enumerate(methods.items()):
            top = 1 + row * lines
            axis.text(-0.01 * line, top + 0.5, method, ha="right", va="center", fontsize=6.5)
            shares = np.asarray(values, dtype=float)
            shares = shares / (np.abs(shares).max() or 1)
            colors = scale.to_rgba(shares)
            for token, color, (left, down, width) in zip(tokens, colors, layout, strict=True):
                axis.add_patch(
                    Rectangle((left, top + down + 0.06), width - 0.15, 0.88, color=color, linewidth=0)
                )
                ink = "white" if np.dot(color[:3], (0.299, 0.587, 0.114)) < 0.5 else "black"
                axis.text(
                    left + width / 2,
                    top + down + 0.5,
                    token,
                    ha="center",
                    va="center",
                    fontsize=6.5,
                    color=ink,
                )
    bar = figure.colorbar(
        scale, ax=axes[:, 0].tolist(), orientation="horizontal", aspect=60, pad=0.02, shrink=0.6
    )
    bar.ax.tick_params(labelsize=6.5)
    bar.set_label("attribution / largest |attribution| of the row", fontsize=7)
    return figure, axes[:, 0]


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

    scores     long table with the columns set, method, family and `measure`, one row an input
    intervals  the same without inputs: set, method, family, mean, low, high of `measure`

    Dots are blue for attention-based, green for gradient-based, red for input-based methods, grey for those
    that know nothing. Returns the figure and one axes a set.
    """
    sets = list(dict.fromkeys(scores["set"]))
    methods = list(dict.fromkeys(scores["method"]))
    figure, axes = plt.subplots(
        1,
        len(sets),
        figsize=(PAGE, 0.19 * len(methods) + 0.9),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axis, name in zip(axes[0], sets, strict=True):
        part = scores[scores["set"] == name]
        sns.stripplot(
            part,
            x=measure,
            y="method",
            hue="family",
            order=methods,
            palette=FAMILY_COLORS,
            ax=axis,
            size=1.6,
            alpha=0.35,
            jitter=0.3,
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
        sizes = sorted(set(part["method"].value_counts()))
        axis.set(title=f"{name} (n = {'/'.join(map(str, sizes))})", xlabel="", ylabel="")
        axis.tick_params(axis="y", length=0, labelsize=6.5)
    figure.supxlabel(label or measure, fontsize=8)
    return figure, axes[0]


def patch_heatmaps(
    rows: Sequence[tuple[str, np.ndarray, Mapping[str, np.ndarray]]],
    shared: bool = False,
    outlines: Sequence[np.ndarray] | None = None,
    unsigned: Mapping[str, str] | None = None,
    overlay: bool = False,
    width: float = PAGE,
    fontsize: float = 6.5,
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
    said = f"attribution / largest |attribution| of the {'column' if shared else 'map'}"
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
