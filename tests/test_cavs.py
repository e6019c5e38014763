"""Many CAVs: the draws are as promised, fits are optima, folds hold images together, files know their
model.
"""

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import SENTENCES, build_text_classifier
from image_models import COMMON, build_image_classifier, pixels
from safetensors import safe_open
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from torch.testing import assert_close
from transformers import ViTConfig, ViTForImageClassification

from helpers import activations as activation_module
from helpers import cavs as cavs_module
from helpers import directions
from helpers.activations import Activations, collect_activations
from helpers.cavs import (
    cav_accuracies,
    equal_draws,
    fit_cavs,
    fit_random_cavs,
    image_scores,
    load_cavs,
    save_cavs,
)
from helpers.directions import fit_directions, held_out_accuracy
from helpers.statistics import empirical_p_values
from helpers.tcav import (
    KINDS,
    attention_weighted_derivatives,
    fit_direction,
    plain_derivatives,
    token_gradients,
    token_states,
    top_tokens,
)
from helpers.text import encode

MEAN = ["mean_difference"]


def planted(n_images, shift=0.0, tokens=4, hidden=6, seed=0, model_key="m"):
    """Activations of one layer, noise around `shift` times the first axis."""
    rows = np.random.default_rng(seed).standard_normal((n_images * tokens, hidden)).astype(np.float32)
    rows[:, 0] += shift
    return Activations({0: rows}, np.arange(n_images + 1) * tokens, "model", model_key, 1)


def one_hot(count, total, start):
    """Activations of one token an image that is the image's number: mean-difference CAVs then name their
    images.
    """
    rows = np.eye(total, dtype=np.float32)[start : start + count]
    return Activations({0: rows}, np.arange(count + 1), "model", "m", 1)


def test_where_memory_runs_out_images_go_through_in_smaller_batches(vit, tmp_path, monkeypatch):
    cavs = fit_random_cavs(collect_activations(vit, pixels(12), cache_dir=tmp_path / "all"), 3, 2)["logistic"]
    expected = image_scores(vit, pixels(7), 1, {"random": cavs})
    activations = collect_activations(vit, pixels(7), cache_dir=tmp_path / "all").layers
    for module, name in ((activation_module, "token_activations"), (cavs_module, "token_states")):
        monkeypatch.setattr(module, name, at_most_two(getattr(module, name)))
    with pytest.warns(UserWarning, match="^7 inputs at a time do not fit into memory; going on with 3$"):
        found = image_scores(vit, pixels(7), 1, {"random": cavs})
    for weighting, values in expected["random"].items():
        assert_close(found["random"][weighting], values, rtol=1e-4, atol=1e-6)
    with pytest.warns(UserWarning, match="^3 inputs at a time do not fit into memory; going on with 1$"):
        again = collect_activations(vit, pixels(7), cache_dir=tmp_path / "again").layers
    for layer, rows in activations.items():
        assert_close(np.array(again[layer]), np.array(rows), rtol=1e-4, atol=1e-5)


def at_most_two(function):
    """Let a function run out of memory on more than two images."""

    def limited(model, inputs, *args):
        if len(inputs["pixel_values"]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return function(model, inputs, *args)

    return limited


def test_relative_cavs_contrast_with_as_many_images_of_the_other_concepts():
    sources = {name: one_hot(6, 18, 6 * i) for i, name in enumerate("abc")}
    cavs = fit_cavs(sources, n_draws=8, kinds=MEAN)["mean_difference"]
    assert cavs.vectors.shape == (1, 3, 8, 18) and cavs.concepts == ("a", "b", "c")
    for i, draws in enumerate(cavs.vectors[0]):
        own = np.arange(18) // 6 == i
        assert (
            (draws[:, own] > 0).all()
            and ((draws[:, ~own] < 0).sum(1) == 6).all()
            and (draws[:, ~own] <= 0).all()
        )
        assert len(np.unique(draws < 0, axis=0)) > 4
    alone = fit_cavs(sources, n_draws=8, kinds=MEAN, concepts=["b"])["mean_difference"]
    np.testing.assert_array_equal(alone.vectors, cavs.vectors[:, 1:2])
    assert alone.concepts == ("b",)


def test_random_images_take_the_place_of_other_concepts():
    sources = {"a": one_hot(6, 18, 0)}
    cavs = fit_cavs(sources, 4, random=one_hot(12, 18, 6), kinds=MEAN)
    [[draws]] = cavs["mean_difference"].vectors
    assert (draws[:, :6] > 0).all() and ((draws[:, 6:] < 0).sum(1) == 6).all()


def test_random_cavs_split_pools_of_random_images_in_halves():
    found = fit_random_cavs(one_hot(15, 15, 0), 3, n_draws=5, kinds=MEAN)["mean_difference"]
    [[draws]] = found.vectors
    assert ((draws > 0).sum(1) == 3).all() and ((draws < 0).sum(1) == 3).all() and found.n_images == 3
    assert len(np.unique(draws > 0, axis=0)) > 3
    pools = draws != 0
    np.testing.assert_array_equal(pools[[0, 1]], pools[[2, 3]])  # two pools of six take turns
    assert not (pools[0] & pools[1]).any()
    fewer = fit_random_cavs(one_hot(15, 15, 0), 3, n_draws=2, kinds=MEAN)["mean_difference"]
    np.testing.assert_array_equal(fewer.vectors[0, 0], draws[:2])
    with pytest.raises(ValueError, match="need 16"):
        fit_random_cavs(one_hot(15, 15, 0), 8)


def test_concepts_of_random_images_are_significant_as_often_as_the_null_says():
    """A concept that means nothing, its CAV of 10 images against 10, and random CAVs of as many images."""
    gradients = np.random.default_rng(0).standard_normal((2000, 8)) + 0.15
    images = {f"concept {k}": planted(10, hidden=8, seed=1 + k) for k in range(200)}
    shares = lambda cavs: ((cavs @ gradients.T) > 0).mean(-1)
    pool = planted(400, hidden=8, seed=999)
    null = shares(fit_random_cavs(pool, 10, 999)["logistic"].vectors[0, 0])
    found = [fit_cavs({name: part}, 1, random=pool, seed=k) for k, (name, part) in enumerate(images.items())]
    p = empirical_p_values(np.array([shares(fit["logistic"].vectors[0, 0])[0] for fit in found]), null)
    assert 0.02 < (p < 0.05).mean() < 0.09 and 0.4 < np.median(p) < 0.6


def test_cavs_are_the_same_for_a_seed_whatever_the_number_of_draws():
    sources = {
        name: planted(8, shift, seed=i) for i, (name, shift) in enumerate({"a": 2, "b": 0, "c": -1}.items())
    }
    cavs = fit_cavs(sources, n_draws=3)["logistic"]
    np.testing.assert_array_equal(fit_cavs(sources, n_draws=3)["logistic"].vectors, cavs.vectors)
    fewer = fit_cavs(sources, n_draws=2)["logistic"].vectors  # the same contrasts, from another start
    np.testing.assert_allclose(fewer, cavs.vectors[:, :, :2], atol=directions.ANGLE)
    later = fit_cavs(sources, n_draws=2, seed=1)["logistic"].vectors
    np.testing.assert_allclose(later, cavs.vectors[:, :, 1:], atol=directions.ANGLE)
    assert (cavs.vectors[0, :, 0] != cavs.vectors[0, :, 1]).any(1).all()
    np.testing.assert_allclose(np.linalg.norm(cavs.vectors, axis=-1), 1, rtol=1e-5)


def test_bad_sets_of_concepts_are_refused():
    ten, four = planted(10), planted(4)
    for sources, random, message in (
        ({}, None, "0 concepts"),
        ({"striped": ten}, None, "'striped' is the only concept"),
        ({"striped": ten, "dotted": four}, None, "'striped' has 10 images but only 4"),
        ({"dotted": four, "striped": ten}, None, "'dotted' has 4 images, too few"),
        ({"striped": ten}, planted(9), "only 9 to contrast"),
        ({"striped": ten, "dotted": planted(10, model_key="other")}, None, "different models"),
    ):
        with pytest.raises(ValueError, match=message):
            fit_cavs(sources, random=random, n_draws=2)
    with pytest.warns(UserWarning, match="its 2 draws are all equal; give more random images"):
        fit_cavs({"striped": ten}, random=planted(10, seed=1), n_draws=2)
    with pytest.warns(UserWarning, match="its 2 draws are all equal; give a third concept"):
        cavs = fit_cavs({"striped": ten, "dotted": planted(10, 1, seed=1)}, n_draws=2)["logistic"]
    np.testing.assert_allclose(cavs.vectors[:, :, 0], cavs.vectors[:, :, 1], atol=1e-4)
    assert equal_draws(cavs).shape == cavs.vectors.shape[:2] and equal_draws(cavs).all()
    third = {"striped": ten, "dotted": planted(10, 1, seed=1), "plain": planted(10, 0, seed=2)}
    assert not equal_draws(fit_cavs(third, n_draws=3)["logistic"]).any()


@pytest.mark.parametrize("kind", KINDS)
def test_held_out_accuracy_of_a_planted_concept(kind):
    sources = {"a": planted(20, 2.0), "b": planted(20, -2.0, seed=1)}
    accuracies = cav_accuracies(sources, n_folds=4, kinds=[kind])[kind]
    assert accuracies.shape == (1, 2, 1, 4) and accuracies.mean() > 0.95
    off_centre = {name: replace(source, layers={0: source.layers[0] + 9}) for name, source in sources.items()}
    np.testing.assert_allclose(
        cav_accuracies(off_centre, n_folds=4, kinds=[kind])[kind], accuracies, atol=0.02
    )


def test_folds_keep_the_tokens_of_an_image_together():
    rng = np.random.default_rng(0)

    def images_without_concept():
        """Every token is its image and a little noise: a fold that splits images scores 1."""
        rows = np.repeat(rng.standard_normal((40, 64)), 5, axis=0) + 0.01 * rng.standard_normal((200, 64))
        return Activations({0: rows.astype(np.float32)}, np.arange(41) * 5, "model", "m", 1)

    sources = {"a": images_without_concept(), "b": images_without_concept()}
    assert 0.3 < cav_accuracies(sources, n_folds=4)["logistic"].mean() < 0.7
    with pytest.raises(ValueError, match="41 folds"):
        cav_accuracies(sources, n_folds=41)


def test_cavs_are_saved_with_their_model_and_refused_by_others(vit, tmp_path):
    sources = {
        name: collect_activations(vit, pixels(6, seed), cache_dir=tmp_path) for seed, name in enumerate("abc")
    }
    cavs, path = fit_cavs(sources, n_draws=2)["logistic"], tmp_path / "cavs" / "relative.safetensors"
    save_cavs(cavs, path)
    loaded = load_cavs(path, vit)
    np.testing.assert_array_equal(loaded.vectors, cavs.vectors)
    np.testing.assert_array_equal(loaded.thresholds, cavs.thresholds)
    assert replace(loaded, vectors=None, thresholds=None) == replace(cavs, vectors=None, thresholds=None)
    save_cavs(replace(cavs, thresholds=None), path)
    assert load_cavs(path, vit).thresholds is None
    with safe_open(path, "np") as file:
        assert {"model_id", "layers", "concepts", "draws", "hidden"} <= set(file.metadata())
    with pytest.raises(ValueError, match="other weights"):
        load_cavs(path, build_image_classifier("vit", seed=1))
    shallow = ViTForImageClassification(ViTConfig(**{**COMMON, "num_hidden_layers": 2}))
    with pytest.raises(ValueError, match="3 layers of width 32.* has 2 of width 32"):
        load_cavs(path, shallow)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match="damaged"):
        load_cavs(path, vit)
    with pytest.raises(FileNotFoundError, match="03_concept_training"):
        load_cavs(tmp_path / "none.safetensors", vit)


def test_image_scores_are_means_of_the_derivatives_whatever_the_batch(tokenizer, tmp_path):
    model = build_text_classifier("bert", len(tokenizer))
    inputs = encode(SENTENCES, tokenizer, model)
    sources = {
        "a": planted(6, hidden=32),
        "b": planted(6, hidden=32, seed=1),
        "c": planted(6, hidden=32, seed=2),
    }
    sources = {
        name: replace(part, layers=dict.fromkeys((0, 2), part.layers[0])) for name, part in sources.items()
    }
    cavs = {
        "relative": fit_cavs(sources, 4)["logistic"],
        "random": fit_random_cavs(sources["a"], 3, 5)["logistic"],
    }
    scores = image_scores(model, inputs, "neutral", cavs, batch_size=2)
    assert scores["relative"]["plain"].shape == (2, 3, 3, 4) and scores["random"]["cls"].shape == (2, 1, 3, 5)
    for row, text in enumerate(SENTENCES):
        states, gradients, attention = token_states(model, encode([text], tokenizer, model), 2)
        assert_close(token_gradients(model, encode([text], tokenizer, model), 2)[0], gradients)
        at_cls = (torch.arange(attention[0].shape[1]) == 0)[:, None]
        for i, layer in enumerate((0, 2)):
            vectors = torch.tensor(cavs["relative"].vectors[i, 2])
            for weighting, derivatives in (
                ("attention", attention_weighted_derivatives(gradients[layer], attention[layer], vectors)),
                ("plain", plain_derivatives(gradients[layer], vectors)),
                ("cls", plain_derivatives(gradients[layer], vectors) * at_cls),
                (
                    "no cls",
                    attention_weighted_derivatives(gradients[layer], attention[layer], vectors) * ~at_cls,
                ),
                ("top", plain_derivatives(gradients[layer], vectors) * top_tokens(states[layer], vectors)),
            ):
                mine = torch.tensor(scores["relative"][weighting][i, 2, row])
                assert_close(mine, derivatives.mean(1)[0], rtol=1e-3, atol=1e-6)


# Many directions at once


def uneven(shift, n_images=30, n_draws=4, hidden=6, seed=0):
    """Images of one to nine rows, of which a third has a planted concept: rows, lengths, and both sides of
    draws.
    """
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 10, n_images)
    has = np.arange(n_images) % 3 == 0
    rows = rng.standard_normal((lengths.sum(), hidden)) * np.logspace(-0.5, 0.5, hidden) + 3
    rows[:, 1] += shift * np.repeat(has, lengths)
    positive, negative = np.zeros((2, n_images, n_draws), dtype=bool)
    for draw in range(n_draws):
        positive[rng.permutation(np.flatnonzero(has))[:8], draw] = True
        negative[rng.permutation(np.flatnonzero(~has))[:9], draw] = True
    return rows.astype(np.float32), lengths, positive, negative


def sides_of(rows, lengths, positive, negative, draw):
    return [rows[np.repeat(side[:, draw], lengths)].astype(float) for side in (positive, negative)]


@pytest.mark.parametrize("shift", [0.0, 1.0, 30.0], ids=["nothing", "overlapping", "separable"])
def test_draws_fitted_together_equal_converged_fits_of_one(shift):
    data = uneven(shift)
    found = fit_directions(*data, KINDS)
    for draw in range(4):
        rows, is_positive = np.concatenate(sides_of(*data, draw)), np.arange(1000)
        is_positive = is_positive[: len(rows)] < len(sides_of(*data, draw)[0])
        exact = (
            LogisticRegression(tol=1e-10, max_iter=10_000, solver="newton-cg").fit(rows, is_positive).coef_[0]
        )
        assert found["logistic"][0][draw] @ exact / np.linalg.norm(exact) > 1 - directions.ANGLE**2 / 2
        for kind, (vectors, thresholds) in found.items():
            vector, threshold = fit_direction(*sides_of(*data, draw), kind)
            np.testing.assert_allclose(vectors[draw], vector, atol=directions.ANGLE)
            np.testing.assert_allclose(thresholds[draw], threshold, rtol=1e-3, atol=3 * directions.ANGLE)
            assert vectors.dtype == np.float32


@pytest.mark.parametrize(("shift", "factor"), [(3.0, 1e4), (1.0, 1e6)])
def test_rows_too_coarse_for_single_precision_are_fitted_in_double(shift, factor):
    rows, lengths, *sides = uneven(shift)
    rows[:, 0] *= factor
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vectors, _ = fit_directions(rows, lengths, *sides)["logistic"]
    for draw, vector in enumerate(vectors):
        assert vector @ fit_direction(*sides_of(rows, lengths, *sides, draw))[0] > 1 - 1e-7


def test_blocks_bound_memory_and_change_nothing(monkeypatch):
    data = uneven(1.0, n_draws=5)
    whole = fit_directions(*data, KINDS)
    for name, size in (("BLOCK", 2 * len(data[0])), ("MATRICES", 2 * 6**2)):
        monkeypatch.setattr(directions, name, size)
    for kind, (vectors, thresholds) in fit_directions(*data, KINDS).items():
        np.testing.assert_allclose(vectors, whole[kind][0], atol=1e-4)
        np.testing.assert_allclose(thresholds, whole[kind][1], atol=1e-3)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_device_changes_where_and_not_what(device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU here")
    data = uneven(1.0, n_draws=5)
    there = fit_directions(*(torch.as_tensor(part) for part in data), KINDS, torch.device(device))
    for kind, (vectors, thresholds) in fit_directions(*data, KINDS).items():
        np.testing.assert_allclose(there[kind][0], vectors, atol=directions.ANGLE)
        np.testing.assert_allclose(there[kind][1], thresholds, atol=3 * directions.ANGLE)


def test_few_steps_are_enough(monkeypatch):
    monkeypatch.setattr(directions, "STEPS", 10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit_directions(*uneven(1.0, n_images=60, n_draws=20, hidden=20))


def test_fits_that_do_not_converge_are_told(monkeypatch):
    monkeypatch.setattr(directions, "STEPS", 1)
    with pytest.warns(ConvergenceWarning, match="logistic CAVs did not converge; one may be"):
        fit_directions(*uneven(30.0))


def test_bad_rows_of_many_draws_are_refused():
    rows, lengths, positive, negative = uneven(1.0)
    same = np.tile(rows[:1], (len(rows), 1))
    for arguments, message in (
        ((rows * np.nan, lengths, positive, negative), "NaN"),
        ((rows, lengths, positive, negative & False), "rows on both sides"),
        ((same, lengths, positive, negative), "alike"),
        ((rows, lengths, positive, negative, ["lasso"]), "use some of logistic"),
    ):
        with pytest.raises(ValueError, match=message):
            fit_directions(*arguments)


@pytest.mark.parametrize("kind", KINDS)
def test_held_out_accuracy_is_that_of_fits_without_the_fold(kind):
    rows, lengths, positive, negative = data = uneven(1.5)
    found = held_out_accuracy(*data, 3, [kind], seed=5)[kind]
    assert found.shape == (4, 3)
    for draw in range(4):
        images = np.flatnonzero(positive[:, draw] | negative[:, draw])
        folds = StratifiedKFold(3, shuffle=True, random_state=5).split(images, positive[images, draw])
        for fold, (train, test) in enumerate(folds):
            kept = np.isin(np.arange(len(lengths)), images[train])[:, None]
            vector, threshold = fit_direction(
                *sides_of(rows, lengths, positive & kept, negative & kept, draw), kind
            )
            tested = np.repeat(np.isin(np.arange(len(lengths)), images[test]), lengths)
            right = (rows[tested] @ vector > threshold) == np.repeat(positive[:, draw], lengths)[tested]
            np.testing.assert_allclose(found[draw, fold], right.mean(), atol=1 / tested.sum())
