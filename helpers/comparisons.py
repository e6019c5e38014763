"""Which differences between explanations hold, which explanations agree, and which are worth their price."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import scipy.stats
from statsmodels.stats.multitest import multipletests

from helpers.faithfulness import mean_interval


def paired_tests(scores: pd.DataFrame, reference: str) -> pd.DataFrame:
    """Compare each method with `reference` on the same inputs.

    scores  one line an input, one column a method

    Returns, a line a method: the mean difference to the reference with its bootstrap interval, the two-sided
    p of Wilcoxon's signed-rank test, and p Holm, corrected over the methods (Holm 1979). Methods that never
    differ have p 1. Raises ValueError for an unknown reference, or fewer than two inputs.
    """
    if reference not in scores.columns:
        raise ValueError(
            f"reference {reference!r} is not a column; use one of {', '.join(map(str, scores.columns))}"
        )
    if len(scores) < 2:
        raise ValueError(f"a paired test needs at least two inputs, not {len(scores)}")
    differences = scores.drop(columns=reference).sub(scores[reference], axis=0)
    table = mean_interval(differences)
    table["p"] = [
        scipy.stats.wilcoxon(difference).pvalue if np.any(difference != 0) else 1.0
        for difference in differences.to_numpy().T
    ]
    table["p Holm"] = multipletests(table["p"], method="holm")[1]
    return table


def tied_with_best(scores: pd.DataFrame, higher: bool = True, seed: int = 0) -> list[str]:
    """Return the best method by its mean, first, and every method whose interval of the difference to it
    holds zero.

    scores  one line an input, one column a method; `higher` says whether larger means better
    """
    best = scores.mean().idxmax() if higher else scores.mean().idxmin()
    gaps = mean_interval(scores.drop(columns=best).sub(scores[best], axis=0), seed=seed)
    return [best, *gaps.index[(gaps["low"] <= 0) & (gaps["high"] >= 0)]]


def pareto_front(prices: Sequence[float], scores: Sequence[float]) -> np.ndarray:
    """Return bool (methods,): True where no other method scores at least as high for at most the price, and
    differs.
    """
    prices, scores = np.asarray(prices, dtype=float), np.asarray(scores, dtype=float)
    no_worse = (prices[None] <= prices[:, None]) & (scores[None] >= scores[:, None])
    better = (prices[None] < prices[:, None]) | (scores[None] > scores[:, None])
    return ~(no_worse & better).any(1)


def rank_agreement(attributions: pd.DataFrame, inputs) -> pd.DataFrame:
    """Return the mean Spearman correlation of each two methods over inputs, methods × methods.

    attributions  one line a token or patch, one column a method
    inputs        what tells the inputs apart, one value a line

    Inputs with fewer than three players are left out, and so is, for a pair, an input that one of them ranks
    not at all.
    """
    parts = [part.corr("spearman").to_numpy() for _, part in attributions.groupby(inputs) if len(part) > 2]
    if not parts:
        raise ValueError("no input has three players or more, so nothing can be ranked")
    stacked = np.ma.masked_invalid(np.stack(parts))
    return pd.DataFrame(stacked.mean(0).filled(np.nan), attributions.columns, attributions.columns)
