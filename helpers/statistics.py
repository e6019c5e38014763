"""Every interval, test and correction of the collection, by scipy and statsmodels."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats
from statsmodels.stats.multitest import multipletests


class TTest(NamedTuple):
    """A t-test: statistic, two-sided p-value, and whether the scores had no variance; all of one shape."""

    statistic: np.ndarray
    p_value: np.ndarray
    constant: np.ndarray


def mean_interval(scores, confidence: float = 0.95, n_resamples: int = 2000, seed: int = 0) -> pd.DataFrame:
    """Return the columns mean, low, high of each column of `scores` (inputs, methods): bootstrap over inputs.

    The interval is of percentiles, and all methods share the same resamples of the inputs, as a paired
    comparison wants it. One input alone has no interval: NaN. Raises ValueError for scores that are not
    finite.
    """
    scores = pd.DataFrame(scores)
    _check_finite(scores)
    if len(scores) < 2:
        return pd.DataFrame({"mean": scores.mean(), "low": np.nan, "high": np.nan})
    result = stats.bootstrap(
        (scores.to_numpy(),),
        np.mean,
        axis=0,
        confidence_level=confidence,
        n_resamples=n_resamples,
        method="percentile",
        rng=np.random.default_rng(seed),
        batch=100,
    )
    low, high = result.confidence_interval
    return pd.DataFrame({"mean": scores.mean(), "low": low, "high": high}, index=scores.columns)


def paired_tests(scores: pd.DataFrame, reference: str) -> pd.DataFrame:
    """Compare each method with `reference` on the same inputs.

    scores  a line for each input, a column for each method

    Returns a line for each method: the mean difference to the reference with its bootstrap interval, the
    two-sided p of Wilcoxon's signed-rank test, and p Holm, corrected over the methods (Holm 1979). Methods
    that never differ have p 1. Raises ValueError for an unknown reference, or fewer than two inputs.
    """
    if reference not in scores.columns:
        raise ValueError(
            f"reference {reference!r} is not a column; use one of {', '.join(map(str, scores.columns))}"
        )
    _check_finite(scores)
    if len(scores) < 2:
        raise ValueError(f"a paired test needs at least two inputs, not {len(scores)}")
    differences = scores.drop(columns=reference).sub(scores[reference], axis=0)
    table = mean_interval(differences)
    table["p"] = [
        stats.wilcoxon(difference).pvalue if np.any(difference != 0) else 1.0
        for difference in differences.to_numpy().T
    ]
    table["p Holm"] = multipletests(table["p"], method="holm")[1]
    return table


def tied_with_best(scores: pd.DataFrame, higher: bool = True, seed: int = 0) -> list[str]:
    """Return the best method by its mean, then those whose interval of the difference to it holds zero.

    scores  a line for each input, a column for each method; `higher` says whether larger means better
    """
    _check_finite(scores)
    best = scores.mean().idxmax() if higher else scores.mean().idxmin()
    gaps = mean_interval(scores.drop(columns=best).sub(scores[best], axis=0), seed=seed)
    return [best, *gaps.index[(gaps["low"] <= 0) & (gaps["high"] >= 0)]]


def pareto_front(prices: Sequence[float], scores: Sequence[float]) -> np.ndarray:
    """Return bool (methods,): True where no other scores at least as high for at most the price."""
    price, score = np.asarray(prices, dtype=float), np.asarray(scores, dtype=float)
    no_worse = (price[None] <= price[:, None]) & (score[None] >= score[:, None])
    better = (price[None] < price[:, None]) | (score[None] > score[:, None])
    return np.asarray(~(no_worse & better).any(1))


def rank_agreement(attributions: pd.DataFrame, inputs) -> pd.DataFrame:
    """Return the mean Spearman correlation of each two methods over inputs, methods × methods.

    attributions  a line for each token or patch, a column for each method
    inputs        what tells the inputs apart, one value for each line

    Inputs with fewer than three players are left out, and so is, for a pair, an input that one of them ranks
    not at all.
    """
    parts = [part.corr("spearman").to_numpy() for _, part in attributions.groupby(inputs) if len(part) > 2]
    if not parts:
        raise ValueError("no input has three players or more, so nothing can be ranked")
    stacked = np.ma.masked_invalid(np.stack(parts))
    return pd.DataFrame(stacked.mean(0).filled(np.nan), attributions.columns, attributions.columns)


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
    """Return two-sided p-values (...) against scores of random CAVs: (1 + number as extreme) / (1 + n).

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
    """Return the p-values adjusted for the false discovery rate over all entries together.

    NaN, where no test was possible, stays NaN and does not count as a test.
    """
    adjusted = np.array(p_values, dtype=np.float64)
    tested = ~np.isnan(adjusted)
    if tested.any():
        adjusted[tested] = stats.false_discovery_control(adjusted[tested])
    return adjusted


def bootstrap_interval(
    positive, level: float = 0.95, n_resamples: int = 1000, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Return the percentile interval (low, high), each (...), of the mean TTCAV score.

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


def _check_finite(scores: pd.DataFrame) -> None:
    bad = ~np.isfinite(scores.to_numpy(dtype=float))
    if bad.any():
        column = scores.columns[bad.any(0)][0]
        raise ValueError(
            f"{bad.any(1).sum()} inputs have no finite score of {column!r}; leave out these inputs, or that "
            f"column"
        )
