"""Tests and intervals of TTCAV scores: scipy's, and solved by hand."""

import warnings

import numpy as np
import pytest
import torch
from scipy import stats

from helpers.statistics import benjamini_hochberg, bootstrap_interval, empirical_p_values, t_test


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
