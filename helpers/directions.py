"""Many directions at once: draws from one set of images, which differ only in the images they take.

All draws share their rows, and their logistic regressions lie near that of their mean. Newton's method
solves that one; its solution and curvature then start an L-BFGS (Nocedal 1980) of all draws together, each
step of it two matrix products, in single precision first and then in double. Means, patterns and Fisher's
matrices are sums over images.
"""

import warnings
from collections.abc import Sequence

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import StratifiedKFold

from helpers.tcav import ALIKE, KINDS, NOT_FINITE

ANGLES = {torch.float32: 1e-2, torch.float64: 1e-4}  # how far from the optimum a vector may be, see `_angle`
STEPS, MEMORY, TRIES = (
    100,
    8,
    5,
)  # of L-BFGS: steps, earlier ones that it remembers, shorter ones that it tries
BLOCK = 2**21  # numbers in an array of rows × draws
MATRICES = 2**25  # numbers in an array of draws, or images, × hidden × hidden


def fit_directions(
    rows, lengths, positive, negative, kinds: Sequence[str] = ("logistic",)
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return {kind: (unit vectors (draws, hidden), thresholds (draws,))}; `fit_direction` does it for one.

    rows                (rows, hidden), of all images, one below the other
    lengths             (images,) the number of rows of each image
    positive, negative  bool (images, draws), the images on either side of a draw

    Raises ValueError for an unknown kind, an empty side, and rows that hold NaN or infinity or are alike on
    both sides. Warns of logistic regressions that did not converge.
    """
    if unknown := set(kinds) - set(KINDS):
        raise ValueError(f"kinds {sorted(unknown)} are unknown; use some of {', '.join(KINDS)}")
    rows, lengths = torch.tensor(np.asarray(rows)), torch.as_tensor(lengths)
    sides = [torch.as_tensor(side).double() for side in (positive, negative)]
    counts = [side.T @ lengths.double() for side in sides]
    if not all(count.all() for count in counts):
        raise ValueError("a CAV needs rows on both sides; some draw has none on one")
    center = rows.mean(0)
    if not torch.isfinite(center).all():
        raise ValueError(NOT_FINITE)
    x = (rows - center).double()
    image = torch.arange(len(lengths)).repeat_interleave(lengths)
    sums = x.new_zeros(len(lengths), x.shape[1]).index_add_(0, image, x)
    means = [side.T @ sums / count[:, None] for side, count in zip(sides, counts, strict=True)]
    between = means[0] - means[1]
    if not between.any(1).all():
        raise ValueError(ALIKE)
    if {"logistic", "pattern"} & set(kinds):
        w = fit_logistic(x, image, *sides)
    found = {}
    for kind in kinds:
        if kind == "logistic":
            vectors = w[:-1].T
        elif kind == "pattern":
            vectors = _covariance_times(x, image, sides[0] + sides[1], w[:-1])
        elif kind == "fisher":
            vectors = _fisher(x, lengths, sides, means)
        else:
            vectors = between
        norms = vectors.norm(dim=1)
        units = vectors / norms[:, None]
        thresholds = -w[-1] / norms if kind == "logistic" else ((means[0] + means[1]) / 2 * units).sum(1)
        found[kind] = units.float().numpy(), (thresholds + units @ center.double()).numpy()
    return found


def held_out_accuracy(
    rows, lengths, positive, negative, n_folds: int = 5, kinds: Sequence[str] = ("logistic",), seed: int = 0
) -> dict[str, np.ndarray]:
    """Return {kind: (draws, folds)}: the share of held-out rows that fall on their side; folds are by image.

    Arguments as in `fit_directions`. The rows of an image are never on both sides of a fold; lengths of 1,
    every row an image of its own, fold by row. Raises ValueError where a side has fewer images than folds.
    """
    positive, negative = (np.asarray(side, dtype=bool) for side in (positive, negative))
    fewest = min(positive.sum(0).min(), negative.sum(0).min())
    if n_folds < 2 or fewest < n_folds:
        raise ValueError(
            f"{n_folds} folds need as many images on each side, and two or more; there are {fewest}"
        )
    held = np.zeros((*positive.shape, n_folds), dtype=bool)  # images, draws, folds
    for draw in range(positive.shape[1]):
        images = np.flatnonzero(positive[:, draw] | negative[:, draw])
        folds = StratifiedKFold(n_folds, shuffle=True, random_state=seed)
        for fold, (_, test) in enumerate(folds.split(images, positive[images, draw])):
            held[images[test], draw, fold] = True
    kept = [(side[:, :, None] & ~held).reshape(len(held), -1) for side in (positive, negative)]
    rows, accuracies = np.asarray(rows), {}
    for kind, (vectors, thresholds) in fit_directions(rows, lengths, kept[0], kept[1], kinds).items():
        accuracies[kind] = np.empty(held.shape[1:])
        for column, (draw, fold) in enumerate(np.ndindex(held.shape[1:])):
            test, truth = (np.repeat(part, lengths) for part in (held[:, draw, fold], positive[:, draw]))
            called = rows[test] @ vectors[column] > thresholds[column]
            accuracies[kind][draw, fold] = np.mean(called == truth[test])
    return accuracies


def fit_logistic(x, image, positive, negative) -> torch.Tensor:
    """Return (hidden + 1, draws): coefficients and intercept of logistic regressions, L2 penalty with C = 1.

    x                   (rows, hidden) float64, centred
    image               (rows,) the image of each row
    positive, negative  float64 (images, draws), 1 for the images on that side

    Warns where a vector may be more than an angle of 1e-4 from its optimum.
    """
    x, member = torch.nn.functional.pad(x, (0, 1), value=1.0), positive + negative
    means = (side.mean(1, keepdim=True).float()[image] for side in (member, positive))
    start, curvature = _newton(x.float(), *means)
    w = start.repeat(1, member.shape[1])
    for dtype, angle in ANGLES.items():
        rows = x.to(dtype)
        for draws in torch.arange(w.shape[1]).split(max(1, BLOCK // len(x))):
            chosen, label = (side[:, draws].to(dtype)[image] for side in (member, positive))
            w[:, draws], left = _lbfgs(rows, chosen, label, w[:, draws], curvature, angle)
            if left != 0 and dtype == torch.float64:
                warnings.warn(
                    f"logistic CAVs did not converge; one may be {left:.1g} off",
                    ConvergenceWarning,
                    stacklevel=4,
                )
    return w


def _gradient(x, member, label, w):
    """Return the gradient (hidden + 1, draws) of ½ ‖w‖² + Σ log(1 + exp z) − label · z of the members."""
    residual = torch.sigmoid_(x @ w.to(x)).mul_(member).sub_(label)
    gradient = (x.T @ residual).double()
    gradient[:-1] += w[:-1]  # the intercept carries no penalty
    return gradient


def _angle(gradient, w):
    """Return how far w may be from its optimum, by its length: the loss is 1-strongly convex."""
    return gradient.norm(dim=0) / w[:-1].norm(dim=0)


def _move(x, member, label, w, gradient, step):
    """Return (w, gradient) after a step, shortened by the secant rule where the slope turns steeply."""
    slope, length = (gradient * step).sum(0), torch.ones_like(step[0])
    after = _gradient(x, member, label, w + step)
    for _ in range(TRIES):
        turned = (after * step).sum(0)
        far = turned > -slope / 2
        if not far.any():
            break
        length[far] *= (slope / (slope - turned))[far]
        after[:, far] = _gradient(x, member[:, far], label[:, far], (w + length * step)[:, far])
    return w + length * step, after


def _newton(x, member, label):
    """Return the solution (hidden + 1, 1) of one regression, about, and its curvature, factored."""
    w = x.new_zeros(x.shape[1], 1, dtype=torch.float64)
    gradient = _gradient(x, member, label, w)
    for _ in range(STEPS):
        p = torch.sigmoid(x @ w.to(x))
        hessian = (x.T @ (x * (member * p * (1 - p)))).double()
        hessian.diagonal()[:-1].add_(1)
        hessian.diagonal().add_(1e-6 * hessian.trace())  # the rounding of single precision
        curvature = torch.linalg.cholesky(hessian)
        w, gradient = _move(x, member, label, w, gradient, -torch.cholesky_solve(gradient, curvature))
        if _angle(gradient, w) <= ANGLES[torch.float32]:
            break
    return w, curvature


def _lbfgs(x, member, label, w, curvature, angle):
    """Return w (hidden + 1, draws) within `angle` of the optima, and the largest angle of those that are
    not, or 0.
    """
    solved, going = w.clone(), torch.arange(w.shape[1])
    gradient, pairs = _gradient(x, member, label, w), []
    for _ in range(STEPS):
        far = ~(_angle(gradient, w) <= angle)
        if not far.all():  # the others are done
            solved[:, going] = w
            going, w, gradient, member, label = (
                going[far],
                w[:, far],
                gradient[:, far],
                member[:, far],
                label[:, far],
            )
            pairs = [(s[:, far], y[:, far]) for s, y in pairs]
        if not len(going):
            return solved, 0.0
        step, scales = gradient.clone(), []
        for s, y in reversed(pairs):
            rho = 1 / (s * y).sum(0).clamp_min(1e-30)
            scales.append((rho, rho * (s * step).sum(0)))
            step -= scales[-1][1] * y
        step = torch.cholesky_solve(step, curvature)
        for (s, y), (rho, scale) in zip(pairs, reversed(scales), strict=True):
            step += (scale - rho * (y * step).sum(0)) * s
        moved, after = _move(x, member, label, w, gradient, -step)
        pairs = [*pairs, (moved - w, after - gradient)][-MEMORY:]
        w, gradient = moved, after
    solved[:, going] = w
    return solved, float(_angle(gradient, w).max())


def _covariance_times(x, image, member, w):
    """Return (draws, hidden): the covariance of the rows of each draw, times their number and its w."""
    found = []
    for draws in torch.arange(w.shape[1]).split(max(1, BLOCK // len(x))):
        chosen, z = member[:, draws][image], x @ w[:, draws]
        z -= (chosen * z).sum(0) / chosen.sum(0)
        found.append((x.T @ z.mul_(chosen)).T)
    return torch.cat(found)


def _fisher(x, lengths, sides, means):
    """Return (draws, hidden): the inverse covariance within the sides times the difference of the means."""
    found = []
    for draws in torch.arange(len(means[0])).split(max(1, MATRICES // x.shape[1] ** 2)):
        within = _scatter(x, lengths, (sides[0] + sides[1])[:, draws])
        for side, mean in zip(sides, means, strict=True):
            count = side[:, draws].T @ lengths.double()
            within -= torch.einsum("k,ki,kj->kij", count, mean[draws], mean[draws])
        diagonal = within.diagonal(dim1=1, dim2=2)
        shrinkage = 1e-4 * diagonal.mean(1, keepdim=True)  # a little, for few rows
        diagonal += torch.where(shrinkage > 0, shrinkage, 1.0)
        found.append(torch.linalg.solve(within, (means[0] - means[1])[draws]))
    return torch.cat(found)


def _scatter(x, lengths, weights):
    """Return (draws, hidden, hidden): the sum over images of weight · rowsᵀ rows, from one Gram matrix an
    image.
    """
    hidden, parts = x.shape[1], x.split(lengths.tolist())
    total, size = x.new_zeros(weights.shape[1], hidden**2), max(1, MATRICES // hidden**2)
    for start in range(0, len(parts), size):
        grams = torch.stack([part.T @ part for part in parts[start : start + size]])
        total += weights[start : start + size].T @ grams.flatten(1)
    return total.unflatten(1, (hidden, hidden))
