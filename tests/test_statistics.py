"""Differences are called real, tied or not worth their price exactly where they were planted."""

import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from helpers.statistics import (
    benjamini_hochberg,
    bootstrap_interval,
    empirical_p_values,
    paired_tests,
    pareto_front,
    rank_agreement,
    t_test,
    tied_with_best,
)


def scores_with_differences(**differences):
    """Return a reference of random scores, and methods that differ from it as told."""
    rng = np.random.default_rng(0)
    reference = pd.Series(rng.normal(size=len(next(iter(differences.values())))))
    return pd.DataFrame(
        {"reference": reference, **{name: reference + add for name, add in differences.items()}}
    )


# Paired tests


def test_p_of_wilcoxon_and_holm_are_those_of_a_hand_calculation():
    # rank sums of the rarer sign are 3, 0 and 1: 5, 1 and 2 of 64 signs are as extreme, twice
    scores = scores_with_differences(
        third=np.array([-1, -2, 3, 4, 5, 6]), first=np.arange(1, 7), second=np.array([-1, 2, 3, 4, 5, 6])
    )
    table = paired_tests(scores, "reference")
    assert list(table.index) == ["third", "first", "second"]
    np.testing.assert_allclose(table["p"], [10 / 64, 2 / 64, 4 / 64])
    np.testing.assert_allclose(table["p Holm"], [10 / 64, 3 * 2 / 64, 2 * 4 / 64])


def test_holm_never_ranks_a_larger_p_before_a_smaller_one():
    scores = scores_with_differences(
        one=np.arange(1, 7), two=np.arange(6, 0, -1), three=np.array([-1, 2, 3, 4, 5, 6])
    )
    table = paired_tests(scores, "reference")
    np.testing.assert_allclose(table["p"], [2 / 64, 2 / 64, 4 / 64])
    np.testing.assert_allclose(
        table["p Holm"], [6 / 64, 6 / 64, 6 / 64]
    )  # two would have 4 / 64, three 4 / 64


def test_planted_shift_is_found_beside_noise_with_its_size_and_sign():
    noise = np.random.default_rng(1).normal(size=(2, 60))
    table = paired_tests(
        scores_with_differences(worse=noise[0] - 1, same=noise[1] - noise[1].mean()), "reference"
    )
    assert table.loc["worse", "p Holm"] < 1e-4 and table.loc["worse", "high"] < 0
    assert table.loc["same", "p Holm"] > 0.2 and table.loc["same", "low"] < 0 < table.loc["same", "high"]
    assert table.loc["worse", "mean"] == pytest.approx(noise[0].mean() - 1)


def test_method_that_equals_the_reference_has_p_one():
    table = paired_tests(scores_with_differences(twin=np.zeros(8), better=np.arange(1, 9)), "reference")
    assert table.loc["twin", ["mean", "low", "high", "p", "p Holm"]].tolist() == [0, 0, 0, 1, 1]
    assert table.loc["better", "p Holm"] == pytest.approx(2 * 2 / 256)


def test_correction_never_lowers_a_p_nor_lifts_it_above_one():
    values = np.random.default_rng(0).normal(size=(9, 6)) + [0, 0, 0, 0.5, 1, 2]
    table = paired_tests(pd.DataFrame(values, columns=list("abcdef")), "a")
    assert (table["p Holm"] >= table["p"]).all() and table["p Holm"].max() <= 1 and table["p"].min() < 0.05


def test_unknown_reference_is_named_with_the_known_ones():
    with pytest.raises(ValueError, match="reference 'Grad' is not a column; use one of reference, twin"):
        paired_tests(scores_with_differences(twin=np.zeros(3)), "Grad")


def test_single_input_cannot_be_tested():
    with pytest.raises(ValueError, match="at least two inputs, not 1"):
        paired_tests(scores_with_differences(twin=np.zeros(1)), "reference")


# Ties with the best


@pytest.mark.parametrize("higher", [True, False])
def test_tie_is_told_by_the_paired_interval_and_not_by_the_mean(higher):
    wave = np.resize([1.0, -1.0], 40)
    scores = scores_with_differences(noisy=wave - 0.1, close=np.full(40, -0.01), loser=wave - 3)
    scores = scores[["loser", "noisy", "close", "reference"]].rename(columns={"reference": "best"})
    assert scores["noisy"].mean() < scores["close"].mean()
    assert tied_with_best(scores if higher else -scores, higher=higher) == ["best", "noisy"]


def test_direction_chooses_the_best():
    scores = scores_with_differences(low=np.full(10, -1.0), high=np.full(10, 1.0))
    assert tied_with_best(scores) == ["high"] and tied_with_best(scores, higher=False) == ["low"]


def test_twins_tie():
    assert sorted(tied_with_best(scores_with_differences(twin=np.zeros(5)))) == ["reference", "twin"]


# Price and score


@pytest.mark.parametrize(
    ("prices", "scores", "front"),
    [
        ([1, 2, 3], [1, 2, 3], [True, True, True]),
        ([1, 2, 3], [3, 2, 1], [True, False, False]),
        ([3, 1, 2], [2, 1, 3], [False, True, True]),
        ([1, 1], [1, 2], [False, True]),
        ([1, 2], [5, 5], [True, False]),
        ([2, 1, 2, 3], [4, 1, 4, 4], [True, True, True, False]),  # twins on the front both stay
        ([1, 2, 2], [4, 3, 3], [True, False, False]),  # and both leave below it
        ([7], [0], [True]),
    ],
)
def test_front_holds_what_no_other_method_beats(prices, scores, front):
    assert pareto_front(prices, scores).tolist() == front


# Agreement of ranks


def test_perfect_reversed_and_hand_calculated_ranks():
    attributions = pd.DataFrame(
        {"a": [1, 2, 3, 4], "squared": [1, 4, 9, 16], "less": [4, 3, 2, 1], "other": [2, 1, 4, 3]}
    )
    table = rank_agreement(attributions, ["x"] * 4)
    assert list(table.index) == list(table.columns) == list(attributions)
    np.testing.assert_allclose(table.loc["a"], [1, 1, -1, 1 - 6 * 4 / (4 * 15)])
    np.testing.assert_allclose(table, table.T)


def test_inputs_count_alike_and_are_ranked_apart():
    attributions = pd.DataFrame({"a": [1, 2, 3, 10, 20, 30, 40, 50], "b": [1, 2, 3, -1, -2, -3, -4, -5]})
    assert rank_agreement(attributions, [0] * 3 + [1] * 5).loc["a", "b"] == pytest.approx(0)


def test_input_that_one_method_does_not_rank_is_left_out_for_its_pairs_alone():
    columns = {"a": [1, 2, 3, 1, 2, 3], "b": [3, 2, 1, 1, 2, 3], "flat": [0, 0, 0, 1, 2, 3], "never": [7] * 6}
    table = rank_agreement(pd.DataFrame(columns), [0, 0, 0, 1, 1, 1])
    assert table.loc["a", "flat"] == pytest.approx(1) and table.loc["a", "b"] == pytest.approx(0)
    assert table["never"].isna().all() and table.drop(columns="never").loc["never"].isna().all()


def test_inputs_with_two_players_are_left_out():
    attributions = pd.DataFrame({"a": [1, 2, 1, 2, 3], "b": [2, 1, 1, 2, 3]})
    assert rank_agreement(attributions, [0, 0, 1, 1, 1]).loc["a", "b"] == pytest.approx(1)


def test_nothing_to_rank_is_an_error():
    with pytest.raises(ValueError, match="no input has three players"):
        rank_agreement(pd.DataFrame({"a": [1, 2, 1], "b": [1, 2, 3]}), [0, 0, 1])


# Tests and intervals of TTCAV scores


def test_t_test_is_scipys_and_marks_scores_without_variance():
    scores = np.array([[[0.6, 0.7, 0.9], [0.5, 0.5, 0.5]], [[1.0, 1.0, 1.0], [0.1, 0.1, 0.1]]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = t_test(scores)
    expected = stats.ttest_1samp(scores[0, 0], 0.5)
    assert result.statistic[0, 0] == expected.statistic and result.p_value[0, 0] == expected.pvalue
    assert result.constant.tolist() == [[False, True], [True, True]]
    assert result.statistic[1].tolist() == [np.inf, -np.inf] and result.p_value[1].tolist() == [0, 0]
    assert (result.statistic[0, 1], result.p_value[0, 1]) == (0, 1)
    assert float(t_test(torch.tensor([0.25, 0.375])).p_value) == stats.ttest_1samp([0.25, 0.375], 0.5).pvalue
    for bad in ([0.3], [0.3, np.nan]):
        with pytest.raises(ValueError, match="two|NaN"):
            t_test(bad)


def test_empirical_p_values_by_hand():
    null = [0.1, 0.5, 0.9, 0.3]
    assert empirical_p_values([1.0, 0.9, 0.1, 0.35, 0.5], null).tolist() == [1 / 5, 3 / 5, 3 / 5, 4 / 5, 1]
    assert empirical_p_values(0.9, np.float32(null)) == 3 / 5  # ties, in single precision too
    assert empirical_p_values([[0.0], [0.5]], [[[0.5]], [[0.5]]]).tolist() == [[0.5], [1]]
    with pytest.raises(ValueError, match="random CAV"):
        empirical_p_values(0.5, [])


def test_benjamini_hochberg_by_hand():
    np.testing.assert_allclose(benjamini_hochberg([[0.01, 0.5], [0.03, 0.02]]), [[0.04, 0.5], [0.04, 0.04]])


def test_benjamini_hochberg_leaves_out_what_was_not_tested():
    adjusted = benjamini_hochberg([0.01, np.nan, 0.5])
    np.testing.assert_array_equal(adjusted, [0.02, np.nan, 0.5])
    assert np.isnan(benjamini_hochberg([np.nan, np.nan])).all()


def test_bootstrap_interval_counts_images_and_draws():
    rng = np.random.default_rng(0)
    by_image = np.repeat(rng.random((100, 1)) < 0.3, 50, axis=1)
    by_draw = np.repeat(rng.random((1, 50)) < 0.3, 100, axis=0)
    for positive, count in ((by_image, 100), (by_draw, 50)):
        low, high = bootstrap_interval(positive, n_resamples=4000)
        share = positive.mean()
        assert low < share < high
        np.testing.assert_allclose(high - low, 2 * 1.96 * np.sqrt(share * (1 - share) / count), rtol=0.1)
    low, high = bootstrap_interval(np.stack([by_image, np.ones((100, 50), bool)]))
    assert low.shape == (2,) and (low[1], high[1]) == (1, 1)
    np.testing.assert_array_equal(bootstrap_interval(by_image, seed=3), bootstrap_interval(by_image, seed=3))
    for bad, level in ((by_image, 1.0), (by_image[:0], 0.9), (by_image[0], 0.9)):
        with pytest.raises(ValueError, match="level|must be"):
            bootstrap_interval(bad, level)
