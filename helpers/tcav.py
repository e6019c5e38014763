"""Method 2: token-level TCAV with attention. Gradients at every layer, one CAV, weighted derivatives, scores.

Source: Kim et al. (2018), TCAV; Eggen, Lysnæs-Larsen and Strümke (2025), section 4, for tokens and attention.
Many CAVs at once are in `directions` and `cavs`.
"""

import warnings

import numpy as np
import torch
from scipy.linalg import LinAlgWarning, solve
from scipy.special import expit
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from helpers.activations import block_outputs, check_outputs
from helpers.attention import check_eager
from helpers.labels import find_class, resolve_target
from helpers.models import GRADIENT_SCALE, check_explainable, full_precision

KINDS = ("logistic", "pattern", "fisher", "mean_difference")
ALIKE = "positive and negative rows are alike, so no direction separates them; use other images"
NOT_FINITE = "the activations hold NaN or infinity; check the model's weights and dtype"


def token_gradients(model, inputs, target=None) -> tuple[dict[int, torch.Tensor], dict[int, torch.Tensor]]:
    """Return {layer: ∂y/∂f_l (batch, tokens, hidden)} and {layer: cls attention of layer l (batch, tokens)}.

    y is the logit of `target`: a class number, a label (see `find_class`), a (batch,) tensor, or None for
    the predicted class. The cls attention is the mean over heads of the cls row of A[l]. One forward and
    one backward pass; padding has no gradient and no attention. Raises ValueError for an unknown target, a
    model without eager attention, or gradients that are not finite.
    """
    _, gradients, attention = token_states(model, inputs, target)
    return gradients, attention


def token_states(model, inputs, target=None) -> tuple[dict[int, torch.Tensor], ...]:
    """Return the outputs {layer: f_l (batch, tokens, hidden)} before what `token_gradients` returns."""
    check_explainable(model, inputs, gradients=True)
    check_eager(model)
    target = find_class(model, target) if isinstance(target, str) else target
    with torch.enable_grad(), block_outputs(model, differentiable=True) as outputs:
        result = model(**inputs, output_attentions=True)
        maps, chosen = result.attentions or (), resolve_target(model, result.logits, target)
        explained = result.logits.gather(1, chosen[:, None]).sum()
        gradients = torch.autograd.grad(explained * GRADIENT_SCALE, check_outputs(model, outputs))
    if len(maps) != len(gradients) or any(layer is None or layer.ndim != 4 for layer in maps):
        name = type(model).__name__
        raise ValueError(f"{name} returned {len(maps)} attention maps for {len(gradients)} layers")
    if not all(torch.isfinite(gradient).all() for gradient in gradients):
        raise ValueError(
            "the gradients hold NaN or infinity; check the model's weights, or use another precision"
        )
    rows = [weights[:, :, 0].detach() for weights in maps]
    attention = [row.mean(1, dtype=full_precision(row.dtype)) for row in rows]
    found = [part.detach() for part in outputs], [part / GRADIENT_SCALE for part in gradients], attention
    return tuple(dict(enumerate(part)) for part in found)


def fit_cav(positive, negative, seed: int = 0, kind: str = "logistic") -> torch.Tensor:
    """Return the CAV (hidden,): the unit vector from `negative` to `positive` rows, each (rows, hidden).

    Tensors or arrays go in, a tensor on the CPU comes out. See `fit_direction` for the kinds and the errors.
    """
    sides = []
    for side in (positive, negative):
        side = side if torch.is_tensor(side) else np.array(side)  # copied, for rows of a cache are read-only
        sides.append(torch.as_tensor(side).detach().cpu())
    dtype = torch.float64 if torch.float64 in (sides[0].dtype, sides[1].dtype) else torch.float32
    rows = [side.to(dtype).numpy() for side in sides]
    return torch.from_numpy(fit_direction(rows[0], rows[1], kind, seed)[0])


def fit_direction(
    positive: np.ndarray, negative: np.ndarray, kind: str = "logistic", seed: int = 0
) -> tuple[np.ndarray, float]:
    """Return the unit vector (hidden,) from `negative` to `positive` rows, and the threshold between them.

    positive, negative  (rows, hidden)
    kind                "logistic": coefficients of a logistic regression, L2 penalty with C = 1; the paper's
                        "pattern": covariance of all rows times those coefficients (Haufe et al., 2014)
                        "fisher": inverse covariance of all rows times the difference of the means
                        "mean_difference": also what regressing rows on labels gives (Pahde et al., 2024)
    seed                for solvers that shuffle rows; Newton's method, used here, draws nothing

    Rows are centred first: the intercept carries no penalty, so the optimum stays where it was, and single
    precision suffices. Raises ValueError for an unknown kind, and for rows that do not fit together, hold
    NaN or infinity, or are alike on both sides.
    """
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r} is unknown; use one of {', '.join(KINDS)}")
    shapes = [np.shape(side) for side in (positive, negative)]
    if not all(len(shape) == 2 for shape in shapes) or shapes[0][1] != shapes[1][1]:
        raise ValueError(f"positive {shapes[0]} and negative {shapes[1]} must both be (rows, hidden)")
    if not len(positive) or not len(negative):
        raise ValueError(
            f"a CAV needs rows on both sides, not {len(positive)} positive, {len(negative)} negative"
        )
    rows = np.concatenate([positive, negative])
    center, is_positive = rows.mean(0), np.arange(len(rows)) < len(positive)
    if not np.isfinite(center).all():
        raise ValueError(NOT_FINITE)
    rows -= center
    means = np.stack([rows[is_positive].mean(0), rows[~is_positive].mean(0)])
    if kind == "mean_difference":
        direction = means[0] - means[1]
    elif kind == "fisher":
        total = (rows.T @ rows).astype(np.float64)
        shrinkage = 1e-4 * np.trace(total) / len(total) or 1  # a little, for few rows
        direction = solve(total + shrinkage * np.eye(len(total)), means[0] - means[1], assume_a="pos")
    else:
        direction, intercept = _fit_logistic(rows, is_positive, seed)
        if kind == "pattern":
            direction = (rows @ direction) @ rows
    norm = np.linalg.norm(direction)
    if norm == 0:
        raise ValueError(ALIKE)
    threshold = -intercept if kind == "logistic" else means.mean(0) @ direction
    unit = (direction / norm).astype(rows.dtype)
    return unit, float(threshold / norm + center @ unit)


def _fit_logistic(rows: np.ndarray, is_positive: np.ndarray, seed: int) -> tuple[np.ndarray, float]:
    """Return coefficients (hidden,) and intercept, after 3 to 13 Newton steps where lbfgs takes hundreds.

    The default tolerance, 1e-4, can stop 15 degrees short of the optimum where a concept separates perfectly.
    """
    regression = LogisticRegression(solver="newton-cholesky", tol=1e-6, random_state=seed)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", ConvergenceWarning)
            warnings.simplefilter("error", LinAlgWarning)
            regression.fit(rows, is_positive)
    except (ConvergenceWarning, LinAlgWarning):
        regression.fit(rows.astype(np.float64), is_positive)  # single precision was too coarse
    return regression.coef_[0], regression.intercept_[0]


def plain_derivatives(gradients, cavs) -> torch.Tensor:
    """Return s (batch, tokens, n_cavs), s_t = ∂y/∂f_t · cav: token TCAV without attention."""
    return gradients @ torch.as_tensor(cavs).to(gradients).T


def top_tokens(states, cavs, real=None, share: float = 0.1) -> torch.Tensor:
    """Return bool (batch, tokens, n_cavs): the share of an image's tokens that lie furthest along a CAV.

    states  (batch, tokens, hidden) outputs f of one layer; `real` (batch, tokens) leaves padding out

    At least one token; ties at the border all count. After SuperActivators (arXiv 2512.05038): a concept
    shows most reliably in its most extreme tokens.
    """
    along = plain_derivatives(states, cavs)
    real = torch.ones_like(along[..., 0], dtype=torch.bool) if real is None else real
    along = along.masked_fill(~real[..., None], -torch.inf)
    counts = (share * real.sum(1)).ceil().long().clamp(min=1)
    ranked = along.topk(int(counts.max()), dim=1).values
    lowest = ranked.gather(1, (counts - 1)[:, None, None].expand(-1, 1, ranked.shape[2]))
    return along >= lowest


def smooth_scores(means, alpha: float = 4.0) -> np.ndarray:
    """Return α-TCAV scores (..., draws) of mean derivatives (..., images, draws), with a smooth step.

    A mean m counts σ(α · m / rms), rms over the images of each draw, in place of 1[m > 0]; α → ∞ is TTCAV.
    Source: arXiv 2605.15688.
    """
    means = np.asarray(means, dtype=np.float64)
    sizes = np.sqrt((means**2).mean(-2, keepdims=True))
    return expit(alpha * means / np.where(sizes > 0, sizes, 1)).mean(-2)


def attention_weighted_derivatives(gradients, cls_attention, cavs) -> torch.Tensor:
    """Return d (batch, tokens, n_cavs): d_t = a_t · s_t · ‖a‖/‖s‖, with s_t = ∂y/∂f_t · cav.

    gradients      (batch, tokens, hidden) ∂y/∂f of one layer
    cls_attention  (batch, tokens) a, of the same layer
    cavs           (n_cavs, hidden)

    Where s is zero, so is d.
    """
    s = plain_derivatives(gradients, cavs)
    return cls_attention.to(s)[..., None] * s * attention_scale(s, cls_attention)[:, None]


def attention_scale(s, cls_attention) -> torch.Tensor:
    """Return ‖a‖/‖s‖ (batch, n_cavs) of plain derivatives s (batch, tokens, n_cavs), 0 where s is zero."""
    norms = torch.linalg.vector_norm(s, dim=1, dtype=torch.float64)  # squares of tiny gradients do not vanish
    norms = torch.where(norms > 0, cls_attention.double().norm(dim=1)[:, None] / norms, 0)
    return norms.to(s)


def ttcav_scores(derivatives) -> torch.Tensor:
    """Return (n_cavs,): the share of images whose mean derivative over tokens is positive.

    derivatives  (batch, tokens, n_cavs)

    Padding adds zeros, which change no sign. A mean of exactly zero is not positive. Raises ValueError
    without images.
    """
    if not len(derivatives):
        raise ValueError("there is no image to score")
    return (derivatives.mean(1) > 0).to(derivatives.dtype).mean(0)
