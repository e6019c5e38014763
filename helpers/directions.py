"""Many directions at once: draws from one set of images, which differ only in the images they take.

All draws share their rows, and their logistic regressions lie near that of their mean. Newton's method
solves that one roughly, on a sample of the rows; its solution and curvature then start an L-BFGS (Nocedal
1980) of all draws together, each step of it two matrix products, in single precision, and in double where
that is too coarse. Means, patterns and Fisher's matrices are sums over images. All of it runs on one device,
a GPU included.
"""

import warnings
from collections.abc import Sequence

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import StratifiedKFold

from helpers.tcav import ALIKE, KINDS, NOT_FINITE

ANGLE = 1e-2  # how far from its optimum a vector may be, see `_angle`: cosines are above 1 - 5e-5
NEWTON_ANGLE, NEWTON_ROWS = 0.3, 8  # of the first regression: its angle, and rows for each of its numbers
STEPS, MEMORY, TRIES = 100, 8, 5  # of L-BFGS: steps, earlier ones it remembers, shorter ones it tries
BLOCK = 2**21  # numbers in an array of rows × draws
MATRICES = 2**25  # numbers in an array of draws, or images, × hidden × hidden


def fit_directions(
    rows, lengths, positive, negative, kinds: Sequence[str] = ("logistic",), device="cpu"
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return {kind: (unit vectors (draws, hidden), thresholds (draws,))}; `fit_direction` does it for one.

    rows                (rows, hidden), of all images, one below the other
    lengths             (images,) the number of rows of each image
    positive, negative  bool (images, draws), the images on either side of a draw
    device              where to compute, in double precision but for the regressions

    Raises ValueError for an unknown kind, an empty side, and rows that hold NaN or infinity or are alike on
    both sides. Warns of logistic regressions that did not converge.
    """
    if unknown := set(kinds) - set(KINDS):
        raise ValueError(f"kinds {sorted(unknown)} are unknown; use some of {', '.join(KINDS)}")
    rows = torch.tensor(np.asarray(rows), device=device)
    lengths = torch.as_tensor(lengths, device=device)
    sides = [torch.as_tensor(side, device=device).double() for side in (positive, negative)]
    counts = [side.T @ lengths.double() for side in sides]
    if not all(count.all() for count in counts):
        raise ValueError("a CAV needs rows on both sides; some draw has none on one")
    center = rows.mean(0)
    if not torch.isfinite(center).all():
        raise ValueError(NOT_FINITE)
    x = (rows - center).double()
    image = torch.arange(len(lengths), device=device).repeat_interleave(lengths)
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
        thresholds = thresholds + units @ center.double()
        found[kind] = units.float().cpu().numpy(), thresholds.cpu().numpy()
    return found


def held_out_accuracy(
    rows,
    lengths,
    positive,
    negative,
    n_folds: int = 5,
    kinds: Sequence[str] = ("logistic",),
    seed: int = 0,
    device="cpu",
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
    fits = fit_directions(rows, lengths, kept[0], kept[1], kinds, device)
    for kind, (vectors, thresholds) in fits.items():
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

    Warns where a vector may be further than `ANGLE` from its optimum.
    """
    x, member = torch.nn.functional.pad(x, (0, 1), value=1.0), positive + negative
    start, curvature = _newton(x, *(side.mean(1, keepdim=True)[image] for side in (member, positive)))
    w = start.repeat(1, member.shape[1])
    angles = w.new_full((w.shape[1],), torch.inf)
    for dtype in (torch.float32, torch.float64):
        rows = x.to(dtype)
        for draws in (angles > ANGLE).nonzero()[:, 0].split(max(1, BLOCK // len(x))):
            chosen, label = (side[:, draws].to(dtype)[image] for side in (member, positive))
            w[:, draws], angles[draws] = _lbfgs(rows, chosen, label, w[:, draws], curvature)
    if (worst := angles.max().item()) > ANGLE:
        message = f"logistic CAVs did not converge; one may be {worst:.1g} off"
        warnings.warn(message, ConvergenceWarning, stacklevel=4)
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
    """Return the solution (hidden + 1, 1) of one regression, about, and its curvature, factored.

    Of many rows a sample stands for all, drawn by how often they are members.
    """
    size = min(NEWTON_ROWS * x.shape[1], int((member > 0).sum()))
    generator = torch.Generator().manual_seed(0)
    sample = torch.multinomial(member[:, 0].cpu(), size, generator=generator).to(x.device)
    each, share = member.sum() / size, label[sample] / member[sample]
    x, member, label = (part.float() for part in (x[sample], each * torch.ones_like(share), each * share))
    w = x.new_zeros(x.shape[1], 1, dtype=torch.float64)
    gradient = _gradient(x, member, label, w)
    for _ in range(STEPS):
        p = torch.sigmoid(x @ w.to(x))
        hessian = (x.T @ (x * (member * p * (1 - p)))).double()
        hessian.diagonal()[:-1].add_(1)
        hessian.diagonal().add_(1e-6 * hessian.trace())  # the rounding of single precision
        curvature = torch.linalg.cholesky(hessian)
        w, gradient = _move(x, member, label, w, gradient, -torch.cholesky_solve(gradient, curvature))
        if _angle(gradient, w) <= NEWTON_ANGLE:
            break
    return w, curvature


def _lbfgs(x, member, label, w, curvature):
    """Return w (hidden + 1, draws), near the optima, and the angle (draws,) that each may be off."""
    solved, angles, going = w.clone(), w.new_zeros(w.shape[1]), torch.arange(w.shape[1], device=w.device)
    gradient, pairs = _gradient(x, member, label, w), []
    for step_number in range(STEPS + 1):
        angle = _angle(gradient, w).nan_to_num(nan=torch.inf)
        far = angle > ANGLE
        if step_number == STEPS or not far.all():  # those that are done
            solved[:, going], angles[going] = w, angle
            going, w, gradient = going[far], w[:, far], gradient[:, far]
            member, label = member[:, far], label[:, far]
            pairs = [(s[:, far], y[:, far]) for s, y in pairs]
        if step_number == STEPS or not len(going):
            break
        step, scales = gradient.clone(), []
        for s, y in reversed(pairs):
            rho = 1 / (s * y).sum(0).clamp_min(1e-30)
            scales.append((rho, rho * (s * step).sum(0)))
            step -= scales[-1][1] * y
        step = torch.cholesky_solve(step, curvature)
        for s, y in pairs[-1:]:  # how the curvature of a draw is to that of the mean
            step *= (s * y).sum(0) / (y * torch.cholesky_solve(y, curvature)).sum(0).clamp_min(1e-30)
        for (s, y), (rho, scale) in zip(pairs, reversed(scales), strict=True):
            step += (scale - rho * (y * step).sum(0)) * s
        moved, after = _move(x, member, label, w, gradient, -step)
        pairs = [*pairs, (moved - w, after - gradient)][-MEMORY:]
        w, gradient = moved, after
    return solved, angles


def _covariance_times(x, image, member, w):
    """Return (draws, hidden): the covariance of the rows of each draw, times their number and its w."""
    found = []
    for draws in torch.arange(w.shape[1], device=w.device).split(max(1, BLOCK // len(x))):
        chosen, z = member[:, draws][image], x @ w[:, draws]
        z -= (chosen * z).sum(0) / chosen.sum(0)
        found.append((x.T @ z.mul_(chosen)).T)
    return torch.cat(found)


def _fisher(x, lengths, sides, means):
    """Return (draws, hidden): the inverse covariance of all rows of a draw times the difference of its means.

    It is parallel to that with the covariance within the sides (Sherman and Morrison 1950), and draws of the
    same images share it.
    """
    between, found = means[0] - means[1], torch.empty_like(means[0])
    members, draws = torch.unique((sides[0] + sides[1]).T, dim=0, return_inverse=True)
    for some in torch.arange(len(members)).split(max(1, MATRICES // x.shape[1] ** 2)):
        total, sums = _scatter(x, lengths, members[some].T)
        counts = members[some] @ lengths.double()
        total -= torch.einsum("ki,kj->kij", sums, sums / counts[:, None])
        diagonal = total.diagonal(dim1=1, dim2=2)
        diagonal += 1e-4 * diagonal.mean(1, keepdim=True)  # a little, for few rows
        for number, matrix in zip(some.tolist(), total, strict=True):
            found[draws == number] = torch.linalg.solve(matrix, between[draws == number].T).T
    return found


def _scatter(x, lengths, weights):
    """Return sums over images, weighted: of rowsᵀ rows (draws, hidden, hidden), of rows (draws, hidden)."""
    hidden, parts = x.shape[1], x.split(lengths.tolist())
    total, size = x.new_zeros(weights.shape[1], hidden**2), max(1, MATRICES // hidden**2)
    for start in range(0, len(parts), size):
        grams = torch.stack([part.T @ part for part in parts[start : start + size]])
        total += weights[start : start + size].T @ grams.flatten(1)
    return total.unflatten(1, (hidden, hidden)), weights.T @ torch.stack([part.sum(0) for part in parts])
