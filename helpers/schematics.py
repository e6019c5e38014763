"""Both methods as schematics of four steps, computed by the helpers on numbers small enough to follow."""

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.patches import ConnectionPatch, Rectangle

from helpers.plots import SIGNED
from helpers.shapley import attention_shapley, coalition_values
from helpers.tcav import attention_weighted_derivatives, fit_cav, ttcav_scores

WIDTH, HEIGHT = 6.4, 2.35  # inches; narrower than a page, so that letters survive on a small screen
BLUE, RED, GREY = "#2c6fbb", "#c0392b", "#7f7f7f"
WORDS = ["[CLS]", "not", "a", "bad", "film"]
ATTENTION = torch.tensor([
    [0.20, 0.30, 0.05, 0.35, 0.10],
    [0.10, 0.30, 0.05, 0.45, 0.10],
    [0.15, 0.10, 0.25, 0.20, 0.30],
    [0.10, 0.40, 0.05, 0.30, 0.15],
    [0.10, 0.15, 0.15, 0.40, 0.20],
], dtype=torch.double)  # fmt: skip  # the matrix that notebook 01 solves by hand


def attention_to_values() -> tuple[plt.Figure, np.ndarray]:
    """Draw attention → matrix → game → values, the game `mutual` on four words; return figure and axes."""
    pair = torch.tensor([[False, True, False, True, False]])
    worth = coalition_values(ATTENTION, pair, "mutual").item()
    values = attention_shapley(ATTENTION[None], torch.tensor([[False, *[True] * 4]]), "mutual")[0, 1:].numpy()
    figure, axes = _four_steps(
        {
            "attention": "of every head\nin every layer",
            "matrix M": "their mean: who\nlooks at whom",
            "game v": f"v({{not, bad}}) =\n.45 + .40 = {worth:.2f}".replace("0.", "."),
            "values φ": "each word's share\nof v(all words)",
        }
    )
    heads = np.random.default_rng(0).dirichlet(np.full(5, 0.5), (3, 5))
    for place, head in enumerate(heads):
        low = 1.3 * place
        axes[0].imshow(head, "Blues", vmin=0, vmax=0.8, extent=(low, low + 5, low + 5, low), zorder=-place)
        axes[0].add_patch(Rectangle((low, low), 5, 5, fill=False, linewidth=0.8, zorder=0.5 - place))
    axes[0].set(xlim=(-0.1, 7.8), ylim=(7.8, -0.1))
    for axis, opacity in ((axes[1], 1.0), (axes[2], 0.3)):
        axis.imshow(ATTENTION.numpy(), "Blues", vmin=0, vmax=0.5, alpha=opacity)
        _name_rows(axis, WORDS)
    for row, column in ((1, 3), (3, 1)):
        axes[2].add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, facecolor=BLUE, edgecolor="black"))
        number = f"{ATTENTION[row, column]:.2f}".lstrip("0")
        axes[2].text(column, row, number, ha="center", va="center", fontsize=7.5, color="white")
    axes[3].barh(range(4), values, color=BLUE, height=0.7)
    for place, value in enumerate(values):
        number = f"{value:.2f}".lstrip("0")
        axes[3].text(value + 0.02, place, number, va="center", fontsize=8.5)
    axes[3].set(xlim=(0, 1.35 * float(values.max())), ylim=(4.0, -1.0))
    _name_rows(axes[3], WORDS[1:])
    return figure, axes


def states_to_score() -> tuple[plt.Figure, np.ndarray]:
    """Draw states → CAV → derivative → score, in two dimensions on images of 4 × 4 patches; return figure
    and axes.
    """
    rng = np.random.default_rng(3)
    concept = rng.normal((1.0, 0.7), 0.6, (22, 2))
    others = rng.normal((-1.0, -0.5), 0.7, (22, 2))
    cav = fit_cav(concept, others)
    toward = 0.1 * cav.numpy()
    gradients = torch.from_numpy(rng.normal(toward, 1.0, (8, 16, 2)))  # of eight images
    attention = torch.from_numpy(rng.dirichlet(np.full(16, 2.0), 8))
    derivatives = attention_weighted_derivatives(gradients, attention, cav[None])
    says_yes = (derivatives.mean(1) > 0)[:, 0].tolist()
    score = ttcav_scores(derivatives).item()
    figure, axes = _four_steps(
        {
            "states f": "of tokens: with the\nconcept ●, others ○",
            "CAV v": "the direction from\nothers to concept",
            "derivative": "(∂y/∂f) · v at each\npatch, × attention",
            "score": f"images whose\nmean is > 0: {sum(says_yes)} of {len(says_yes)}",
        }
    )
    for axis, opacity in ((axes[0], 1.0), (axes[1], 0.3)):
        axis.scatter(*concept.T, s=16, color=BLUE, alpha=opacity, linewidth=0)
        axis.scatter(*others.T, s=16, facecolor="none", edgecolor=GREY, alpha=opacity)
        axis.set(xlim=(-2.8, 2.8), ylim=(-2.8, 2.8), aspect="equal")
        axis.add_patch(Rectangle((-2.8, -2.8), 5.6, 5.6, fill=False, linewidth=0.8))
    across = np.array([-cav[1], cav[0]])
    axes[1].plot(*np.outer([-2.4, 2.4], across).T, color="black", linewidth=0.8, linestyle="--")
    axes[1].annotate("", 1.9 * cav.numpy(), -0.4 * cav.numpy(), arrowprops={"arrowstyle": "-|>", "lw": 2})
    axes[1].text(*(2.25 * cav.numpy()), "v", ha="center", va="center", fontsize=11, fontweight="bold")
    first = derivatives[0, :, 0].numpy()
    axes[2].imshow(first.reshape(4, 4) / np.abs(first).max(), SIGNED, vmin=-1, vmax=1)
    for place in range(16):
        sign = "+" if first[place] > 0 else "−"
        ink = "white" if abs(first[place]) > 0.8 * np.abs(first).max() else "black"
        axes[2].text(place % 4, place // 4, sign, ha="center", va="center", fontsize=9, color=ink)
    axes[2].add_patch(Rectangle((-0.5, -0.5), 4, 4, fill=False, linewidth=0.8))
    for place, yes in enumerate(says_yes):
        left, top = place % 3, place // 3
        color = "#e9a08f" if yes else "#a9c8e6"
        axes[3].add_patch(
            Rectangle((left + 0.08, top + 0.08), 0.84, 0.84, facecolor=color, edgecolor="black")
        )
        axes[3].text(left + 0.5, top + 0.5, "+" if yes else "−", ha="center", va="center", fontsize=11)
    axes[3].text(2.5, 2.5, f"{score:.2f}", ha="center", va="center", fontsize=11, fontweight="bold")
    axes[3].set(xlim=(0, 3), ylim=(3, 0), aspect="equal")
    return figure, axes


def _four_steps(captions: dict[str, str]) -> tuple[plt.Figure, np.ndarray]:
    """Return a figure of four bare axes with titles, a caption below each, and arrows between them."""
    figure, axes = plt.subplots(1, 4, figsize=(WIDTH, HEIGHT))
    figure.subplots_adjust(left=0.01, right=0.99, top=0.92, bottom=0.2, wspace=0.34)
    for number, (axis, (title, caption)) in enumerate(zip(axes, captions.items(), strict=True), 1):
        axis.set(xticks=[], yticks=[])
        axis.set_anchor("C")
        axis.spines[:].set_visible(False)
        place = axis.get_position()
        middle = (place.x0 + place.x1) / 2
        figure.text(middle, 0.93, f"{number}  {title}", ha="center", fontsize=10.5, fontweight="bold")
        figure.text(middle, 0.16, caption, ha="center", va="top", fontsize=9)
    for before, after in zip(axes, axes[1:], strict=False):
        border = (before.get_position().x1 + after.get_position().x0) / 2
        start, end = (border - 0.028, 0.955), (border + 0.028, 0.955)
        arrow = ConnectionPatch(start, end, "figure fraction", arrowstyle="-|>", color="black")
        arrow.set(mutation_scale=11, linewidth=1.3)
        figure.add_artist(arrow)
    return figure, axes


def _name_rows(axis: plt.Axes, names: list[str]) -> None:
    """Write a name beside each row of a matrix, or each bar."""
    axis.set_yticks(range(len(names)), names, fontsize=8.5)
    axis.tick_params(length=0, pad=1)
