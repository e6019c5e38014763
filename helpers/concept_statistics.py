"""The half of concept training that needs no model: fits of CAVs, held-out accuracy, tests and intervals, on
arrays.

It imports neither torch nor transformers, so that the worker processes which fit CAVs start quickly.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from joblib import Parallel, delayed
from scipy import stats
from scipy.linalg import LinAlgWarning, solve
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold
from tqdm.auto import tqdm

KINDS = ("logistic", "pattern", "fisher", "mean_difference")
MIN_IMAGES = 5  # a concept of fewer images is refused
DRAWS_A_JOB = 10  # draws that one worker fits, each from the solution of the one before


class Part(NamedTuple):
    """Some images of a set of activations, one layer: image i owns the rows offsets[i] to offsets[i + 1]."""

    rows: np.ndarray  # (rows, hidden), one row a token
    offsets: np.ndarray  # (images + 1,)
    images: np.ndarray  # (chosen,) indices


@dataclass(frozen=True)
class Activations:
    """What the blocks of one model say about a set of inputs, one row a token.

    layers     {layer: (rows, hidden)} float32, read-only maps of the cache files
    offsets    (inputs + 1,) input i owns the rows offsets[i] to offsets[i + 1]: all its tokens but the
               padding
    model_id   the model's name; model_key stands for its content, n_layers is its number of blocks
    """

    layers: dict[int, np.ndarray]
    offsets: np.ndarray
    model_id: str
    model_key: str
    n_layers: int

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def part(self, layer: int, images: Sequence[int] | None = None) -> Part:
        """Return one layer of the chosen images, or of all."""
        return Part(
            self.layers[layer], self.offsets, np.arange(len(self)) if images is None else np.asarray(images)
        )


@dataclass(frozen=True)
class Cavs:
    """Concept activation vectors, and the model that they belong to.

    vectors   (layers, concepts, draws, hidden) float32, unit norm
    layers    number of each layer, counted from 0
    concepts  name of each concept
    kind      one of KINDS; model_id, model_key and n_layers as in Activations
    """

    vectors: np.ndarray
    layers: tuple[int, ...]
    concepts: tuple[str, ...]
    kind: str
    model_id: str
    model_key: str
    n_layers: int


# One CAV.


def fit_direction(
    positive: np.ndarray,
    negative: np.ndarray,
    kind: str = "logistic",
    seed: int = 0,
    regression: LogisticRegression | None = None,
) -> tuple[np.ndarray, float]:
    """Return the unit vector (hidden,) from negative to positive rows, and the threshold between them along
    it.

    positive, negative  (rows, hidden)
    kind                "logistic": coefficients of a logistic regression, L2 penalty with C = 1, as in the
                        paper "pattern": covariance of all rows times those coefficients (Haufe et al., 2014)
                        "fisher": inverse covariance within the classes times the difference of their means
                        "mean_difference": also what regressing the rows on the label gives (Pahde et al.,
                        2024)
    seed                for solvers that shuffle rows; Newton's method, used here, draws nothing
    regression          that of an earlier call, from `new_regression`, whose solution is near this one: saves
                        steps

    Rows are centred first: the intercept carries no penalty, so the optimum stays where it was, and the
    Hessian becomes well conditioned enough for single precision. Raises ValueError for an unknown kind, and
    for rows that do not fit together, hold NaN or infinity, or are alike on both sides.
    """
    _check_rows(positive, negative, kind)
    rows = np.concatenate([positive, negative])
    is_positive = np.arange(len(rows)) < len(positive)
    center = rows.mean(0)
    if not np.isfinite(center).all():
        raise ValueError("the activations hold NaN or infinity; check the model's weights and dtype")
    rows -= center
    means = np.stack([rows[: len(positive)].mean(0), rows[len(positive) :].mean(0)])
    if kind in ("logistic", "pattern"):
        direction, intercept = _fit_logistic(rows, is_positive, regression or new_regression(seed))
    if kind == "pattern":
        direction = (rows @ direction) @ rows
    elif kind == "mean_difference":
        direction = means[0] - means[1]
    elif kind == "fisher":
        rows -= means[1 - is_positive.astype(int)]
        within = (rows.T @ rows).astype(np.float64)
        within += (1e-4 * np.trace(within) / len(within) or 1) * np.eye(
            len(within)
        )  # a little shrinkage, for few rows
        direction = solve(within, means[0] - means[1], assume_a="pos")
    norm = np.linalg.norm(direction)
    if norm == 0:
        raise ValueError(
            "positive and negative rows are alike, so no direction separates them; use other images"
        )
    threshold = -intercept if kind == "logistic" else means.mean(0) @ direction
    unit = (direction / norm).astype(rows.dtype)
    return unit, float(threshold / norm + center @ unit)


def _check_rows(positive: np.ndarray, negative: np.ndarray, kind: str) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r} is unknown; use one of {', '.join(KINDS)}")
    if np.ndim(positive) != 2 or np.ndim(negative) != 2 or positive.shape[1] != negative.shape[1]:
        raise ValueError(
            f"positive {np.shape(positive)} and negative {np.shape(negative)} must both be (rows, hidden)"
        )
    if not len(positive) or not len(negative):
        raise ValueError(
            f"a CAV needs rows on both sides, not {len(positive)} positive and {len(negative)} negative"
        )


def new_regression(seed: int = 0) -> LogisticRegression:
    """Return a logistic regression for many rows and few columns: 3 to 13 Newton steps where lbfgs takes
    hundreds.

    The default tolerance, 1e-4, can stop 15 degrees short of the optimum where a concept separates perfectly.
    """
    return LogisticRegression(solver="newton-cholesky", tol=1e-6, warm_start=True, random_state=seed)


def _fit_logistic(
    rows: np.ndarray, is_positive: np.ndarray, regression: LogisticRegression
) -> tuple[np.ndarray, float]:
    """Return coefficients (hidden,) and intercept."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", ConvergenceWarning)
            warnings.simplefilter("error", LinAlgWarning)
            regression.fit(rows, is_positive)
    except (ConvergenceWarning, LinAlgWarning):
        regression.fit(rows.astype(np.float64), is_positive)  # single precision was too coarse
    return regression.coef_[0], regression.intercept_[0]


def gather(parts: Sequence[Part]) -> np.ndarray:
    """Return the rows (rows, hidden) of the chosen images of all parts, one below the other."""
    return np.concatenate(
        [part.rows[part.offsets[image] : part.offsets[image + 1]] for part in parts for image in part.images]
    )


def fit_draws(draws: Sequence[Sequence[Sequence[Part]]], kind: str = "logistic", seed: int = 0) -> np.ndarray:
    """Return CAVs (draws, hidden) between two samples of images each, (positive, negative): the job of one
    worker.
    """
    regression = new_regression(seed)
    return np.stack([fit_direction(*map(gather, sides), kind, seed, regression)[0] for sides in draws])


def held_out_accuracy(
    positive: Sequence[Part],
    negative: Sequence[Part],
    n_folds: int = 5,
    kind: str = "logistic",
    seed: int = 0,
) -> np.ndarray:
    """Return (n_folds,) the share of held-out tokens that fall on their side; folds are by image.

    Tokens of one image are never on both sides of a fold. Raises ValueError where a side has fewer images
    than folds.
    """
    lengths = [
        np.concatenate([np.diff(part.offsets)[part.images] for part in side]) for side in (positive, negative)
    ]
    if n_folds < 2 or min(map(len, lengths)) < n_folds:
        raise ValueError(
            f"{n_folds} folds need as many images on each side, not {[len(side) for side in lengths]}"
        )
    rows = gather([*positive, *negative])
    is_positive = np.arange(len(rows)) < lengths[0].sum()
    images = np.repeat(np.arange(sum(map(len, lengths))), np.concatenate(lengths))
    accuracies = []
    for train, test in StratifiedGroupKFold(n_folds, shuffle=True, random_state=seed).split(
        rows, is_positive, images
    ):
        fitted, side = rows[train], is_positive[train]
        direction, threshold = fit_direction(fitted[side], fitted[~side], kind, seed)
        accuracies.append(np.mean((rows[test] @ direction > threshold) == is_positive[test]))
    return np.array(accuracies)


# All layers, concepts and draws. A contrast is (positive, negative), each a list of (activations, image
# indices).


def fit_cavs(
    activations: Mapping[str, Activations],
    n_draws: int = 50,
    random: Activations | None = None,
    kind: str = "logistic",
    seed: int = 0,
    n_jobs: int = -1,
    progress: bool = False,
) -> Cavs:
    """Fit one CAV for each layer, concept and draw, in parallel: the concept's tokens against tokens of other
    images.

    activations  {concept: its activations}
    random       activations of random images to contrast with; None contrasts with the other concepts
                 ("relative" CAVs)
    n_jobs       worker processes, -1 for one a core; they map the cache files, so memory does not grow with
                 draws

    Draw k contrasts with as many images as the concept has, drawn without replacement with seed + k. Warns
    where only one such draw is possible. Raises ValueError for one concept without random images, too few
    images on either side, or activations of different models.
    """
    _check_draws(activations, random, n_draws)
    seeds = range(seed, seed + n_draws)
    contrasts = {
        name: [_draw_contrast(activations, name, random, draw) for draw in seeds] for name in activations
    }
    return _fit_contrasts(next(iter(activations.values())), contrasts, kind, seed, n_jobs, progress)


def fit_random_cavs(
    random: Activations,
    n_images: int,
    n_draws: int = 50,
    kind: str = "logistic",
    seed: int = 0,
    n_jobs: int = -1,
    progress: bool = False,
) -> Cavs:
    """Fit CAVs of `n_images` random images against as many others, for the empirical null; the one concept is
    "random".

    Raises ValueError where there are fewer than 2 · n_images random images.
    """
    if n_images < 1 or n_draws < 1 or len(random) < 2 * n_images:
        raise ValueError(
            f"{n_images} random images against others need {2 * n_images} of them, not {len(random)}"
        )
    contrasts = []
    for draw in range(n_draws):
        images = np.random.default_rng(seed + draw).permutation(len(random))[: 2 * n_images]
        contrasts.append(([(random, np.sort(images[:n_images]))], [(random, np.sort(images[n_images:]))]))
    return _fit_contrasts(random, {"random": contrasts}, kind, seed, n_jobs, progress)


def cav_accuracies(
    activations: Mapping[str, Activations],
    n_folds: int = 5,
    random: Activations | None = None,
    kind: str = "logistic",
    seed: int = 0,
    n_jobs: int = -1,
    progress: bool = False,
) -> np.ndarray:
    """Return (layers, concepts, folds) the held-out accuracies of the contrasts drawn with `seed`; see
    `fit_cavs`.
    """
    _check_draws(activations, random, 1)
    contrasts = [_draw_contrast(activations, name, random, seed) for name in activations]
    layers = next(iter(activations.values())).layers
    jobs = [
        delayed(held_out_accuracy)(*_parts(contrast, layer), n_folds, kind, seed)
        for layer in layers
        for contrast in contrasts
    ]
    return np.reshape(_run(jobs, n_jobs, progress), (len(layers), len(contrasts), n_folds))


def _fit_contrasts(
    source: Activations, contrasts: Mapping[str, list], kind: str, seed: int, n_jobs: int, progress: bool
) -> Cavs:
    """Return the CAVs of {concept: contrast of each draw}, all of the model and layers of `source`."""
    jobs = [
        delayed(fit_draws)(
            [_parts(contrast, layer) for contrast in draws[start : start + DRAWS_A_JOB]], kind, seed
        )
        for layer in source.layers
        for draws in contrasts.values()
        for start in range(0, len(draws), DRAWS_A_JOB)
    ]
    vectors = np.concatenate(_run(jobs, n_jobs, progress))
    vectors = vectors.reshape(len(source.layers), len(contrasts), -1, vectors.shape[-1])
    model = source.model_id, source.model_key, source.n_layers
    return Cavs(vectors, tuple(source.layers), tuple(contrasts), kind, *model)


def _parts(contrast, layer: int) -> list[list[Part]]:
    return [[source.part(layer, images) for source, images in side] for side in contrast]


def _run(jobs: list, n_jobs: int, progress: bool) -> list:
    results = Parallel(n_jobs=n_jobs, return_as="generator")(jobs)
    return list(tqdm(results, total=len(jobs), desc="CAVs", disable=not progress, leave=False))


def _pool(
    activations: Mapping[str, Activations], concept: str, random: Activations | None
) -> list[Activations]:
    """Return the sets of images that a concept is contrasted with."""
    return (
        [random] if random is not None else [other for name, other in activations.items() if name != concept]
    )


def _draw_contrast(
    activations: Mapping[str, Activations], concept: str, random: Activations | None, seed: int
):
    positive, pool = activations[concept], _pool(activations, concept, random)
    edges = np.cumsum([0, *map(len, pool)])
    chosen = np.sort(np.random.default_rng(seed).choice(edges[-1], len(positive), replace=False))
    shares = np.split(chosen, np.searchsorted(chosen, edges[1:-1]))
    negative = [(source, share - start) for source, share, start in zip(pool, shares, edges)]
    return [(positive, np.arange(len(positive)))], negative


def _check_draws(activations: Mapping[str, Activations], random: Activations | None, n_draws: int) -> None:
    if not activations or n_draws < 1:
        raise ValueError(
            f"there are {len(activations)} concepts and {n_draws} draws to fit; give at least one of each"
        )
    if random is None and len(activations) < 2:
        raise ValueError(
            f"{next(iter(activations))!r} is the only concept, and relative CAVs contrast a concept with others: "
            "add a concept, or pass activations of random images"
        )
    sources = [*activations.values(), *([] if random is None else [random])]
    if len({(source.model_key, tuple(source.layers)) for source in sources}) > 1:
        raise ValueError(
            "the activations come from different models or layers; collect all of them with one model"
        )
    for concept in activations:
        n_images, n_others = len(activations[concept]), sum(map(len, _pool(activations, concept, random)))
        if n_images < MIN_IMAGES:
            raise ValueError(
                f"concept {concept!r} has {n_images} images, too few for a CAV; give {MIN_IMAGES} or more"
            )
        if n_others < n_images:
            raise ValueError(
                f"concept {concept!r} has {n_images} images but only {n_others} to contrast with; add images, "
                "or keep fewer of the concept's"
            )
        if n_others == n_images and n_draws > 1:
            warnings.warn(
                f"concept {concept!r} has as many images to contrast with as its own {n_images}, "
                f"so its {n_draws} draws are all equal",
                stacklevel=3,
            )


# Tests and intervals of TTCAV scores.


class TTest(NamedTuple):
    """A t-test: statistic, two-sided p-value, and whether the scores had no variance; all of one shape."""

    statistic: np.ndarray
    p_value: np.ndarray
    constant: np.ndarray


def t_test(scores, null: float = 0.5) -> TTest:
    """Test by a one-sample t-test over draws whether the mean TTCAV score differs from `null`, as published.

    scores  (..., draws)

    Scores without variance have no t statistic. They are marked `constant` and get the limit: p = 1 at the
    null, else p = 0 with a statistic of ±infinity. Draws share images, so they are not independent, and the
    test is too sure of itself; see `empirical_p_values`. Raises ValueError for fewer than two draws, or
    scores that are not finite.
    """
    scores = np.asarray(scores, dtype=np.float64)
    if scores.ndim < 1 or scores.shape[-1] < 2:
        raise ValueError(
            f"a t-test over draws needs at least two of them, not scores of shape {scores.shape}"
        )
    if not np.isfinite(scores).all():
        raise ValueError("the scores hold NaN or infinity")
    constant = np.ptp(scores, axis=-1) == 0
    offset = scores[..., 0] - null
    statistic = np.where(offset == 0, 0.0, np.copysign(np.inf, offset))
    p_value = np.where(offset == 0, 1.0, 0.0)
    if not constant.all():
        test = stats.ttest_1samp(scores[~constant], null, axis=-1)
        statistic[~constant], p_value[~constant] = test.statistic, test.pvalue
    return TTest(statistic, p_value, constant)


def empirical_p_values(scores, null_scores, center: float = 0.5) -> np.ndarray:
    """Return two-sided p-values (...) of scores against those of random CAVs: (1 + number as extreme) / (1 +
    n).

    scores       (...) TTCAV scores of one draw, or means over draws, whose p-values then err on the high side
    null_scores  (..., n) scores of CAVs that tell random images from other random images, same layer and
                 targets

    Extreme means far from `center`: a random CAV and its opposite are equally likely, so the null is
    symmetric. The smallest p-value is 1 / (1 + n). Raises ValueError without null scores, or where a score is
    not finite.
    """
    scores, null_scores = np.asarray(scores, dtype=np.float64), np.asarray(null_scores, dtype=np.float64)
    if null_scores.ndim < 1 or not null_scores.shape[-1]:
        raise ValueError("the empirical null needs at least one random CAV; fit some with fit_random_cavs")
    if not (np.isfinite(scores).all() and np.isfinite(null_scores).all()):
        raise ValueError("the scores hold NaN or infinity")
    distance = (
        np.abs(scores - center)[..., None] - 1e-6
    )  # equal shares of images must tie, also in single precision
    return (1 + (np.abs(null_scores - center) >= distance).sum(-1)) / (1 + null_scores.shape[-1])


def benjamini_hochberg(p_values) -> np.ndarray:
    """Return the p-values adjusted for the false discovery rate over all entries together, in their own
    shape.
    """
    p_values = np.asarray(p_values, dtype=np.float64)
    return stats.false_discovery_control(p_values.ravel()).reshape(p_values.shape)


def bootstrap_interval(
    positive, level: float = 0.95, n_resamples: int = 1000, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Return the percentile interval (low, high), each (...), of the mean TTCAV score over images and CAV
    draws.

    positive  bool (..., images, draws), whether the image's score is positive for that CAV

    Images and draws are both resampled with replacement, so the interval covers other images and other CAVs.
    The same resamples serve every leading index. Raises ValueError for a level outside 0 to 1 or an empty
    matrix.
    """
    positive = np.asarray(positive, dtype=np.float64)
    if not 0 < level < 1 or n_resamples < 1:
        raise ValueError(
            f"level must lie between 0 and 1 and n_resamples be positive, not {level} and {n_resamples}"
        )
    if positive.ndim < 2 or not positive.size:
        raise ValueError(
            f"positive must be (..., images, draws) with at least one of each, not {positive.shape}"
        )
    rng = np.random.default_rng(seed)
    images, draws = (rng.multinomial(n, np.full(n, 1 / n), n_resamples) for n in positive.shape[-2:])
    means = ((images @ positive) * draws).sum(-1) / (
        positive.shape[-2] * positive.shape[-1]
    )  # (..., n_resamples)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2], axis=-1)
    return low, high
