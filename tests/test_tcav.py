"""Gradients are the model's own, a CAV finds what was planted, derivatives and scores are solved by hand."""

import warnings

import numpy as np
import pytest
import torch
from conftest import SENTENCES
from image_models import pixels
from sklearn.linear_model import LogisticRegression
from torch.testing import assert_close

from helpers import concept_world
from helpers.activations import token_activations
from helpers.labels import find_class
from helpers.models import load_image_classifier
from helpers.paths import PROJECT_ROOT
from helpers.tcav import (
    KINDS,
    attention_weighted_derivatives,
    fit_cav,
    plain_derivatives,
    smooth_scores,
    token_gradients,
    top_tokens,
    ttcav_scores,
)
from helpers.text import encode

CONCEPT_VIT = PROJECT_ROOT / "data" / "models" / "concept_vit"


@pytest.fixture(scope="module")
def trained():
    return load_image_classifier(str(CONCEPT_VIT), "cpu")


def test_gradients_agree_with_finite_differences(classifier):
    model, inputs, blocks = classifier
    model = model.double()
    inputs = {
        name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in inputs.items()
    }
    gradients, _ = token_gradients(model, inputs, 1)
    for layer, block in enumerate(blocks):
        step = (
            1e-4
            * torch.randn(gradients[layer].shape, generator=torch.Generator().manual_seed(layer)).double()
        )
        logits = []
        for change in (step, -step):
            hook = block.register_forward_hook(lambda module, args, output, change=change: output + change)
            logits.append(model(**inputs).logits[:, 1])
            hook.remove()
        difference = (logits[0] - logits[1]) / 2
        assert difference.abs().max() > 1e-6  # some models take softmax in single precision
        assert_close((gradients[layer] * step).sum((1, 2)), difference, rtol=3e-3, atol=1e-7)


def test_cls_attention_is_the_mean_over_heads_of_the_cls_row(classifier):
    model, inputs, _ = classifier
    _, attention = token_gradients(model, inputs)
    for layer, weights in enumerate(model(**inputs, output_attentions=True).attentions):
        assert_close(attention[layer], sum(head[:, 0] for head in weights.unbind(1)) / weights.shape[1])


def test_padded_batches_equal_single_inputs(text_classifier):
    model, tokenizer = text_classifier
    inputs = encode(SENTENCES, tokenizer, model)
    batched, (gradients, attention) = token_activations(model, inputs), token_gradients(model, inputs, 2)
    assert not inputs["attention_mask"].all()
    for row, text in enumerate(SENTENCES):
        single = encode([text], tokenizer, model)
        length = single["input_ids"].shape[1]
        one, (slopes, weights) = token_activations(model, single), token_gradients(model, single, 2)
        for layer in batched:
            assert_close(batched[layer][row, :length], one[layer][0], rtol=1e-4, atol=1e-5)
            assert_close(gradients[layer][row, :length], slopes[layer][0], rtol=1e-3, atol=1e-5)
            assert_close(attention[layer][row, :length], weights[layer][0], rtol=1e-4, atol=1e-6)
            assert not gradients[layer][row, length:].any() and not attention[layer][row, length:].any()


def test_batched_images_equal_single_ones_and_frozen_weights_change_nothing(vit):
    inputs = pixels(3)
    gradients, attention = token_gradients(vit, inputs, torch.tensor([0, 2, 1]))
    for row, target in enumerate((0, 2, 1)):
        slopes, weights = token_gradients(
            vit, {"pixel_values": inputs["pixel_values"][row : row + 1]}, target
        )
        for layer in gradients:
            assert_close(gradients[layer][row], slopes[layer][0], rtol=1e-4, atol=1e-6)
            assert_close(attention[layer][row], weights[layer][0], rtol=1e-4, atol=1e-6)
    trainable, _ = token_gradients(vit.requires_grad_(True), inputs, torch.tensor([0, 2, 1]))
    assert all(torch.equal(trainable[layer], gradients[layer]) for layer in gradients)


def test_patches_of_the_last_block_have_no_gradient(vit):
    gradients, _ = token_gradients(vit, pixels(2))
    assert not gradients[2][:, 1:].any() and gradients[2][:, 0].any() and gradients[1][:, 1:].any()


def test_models_that_do_not_fit_are_refused_and_keep_no_hooks(vit):
    token_gradients(vit, pixels(1))  # transformers leaves hooks of its own at the first call
    before = [len(block._forward_hooks) for block in vit.vit.layers]
    vit.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="eager"):
        token_gradients(vit, pixels(1))
    vit.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="outside this model's 3 classes"):
        token_gradients(vit, pixels(1), 7)
    assert [len(block._forward_hooks) for block in vit.vit.layers] == before
    vit.config.num_hidden_layers = 5
    with pytest.raises(ValueError, match="0 stacks of 5 blocks"):
        token_activations(vit, pixels(1))


def test_gradients_that_are_not_finite_are_refused(vit):
    vit.classifier.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        token_gradients(vit, pixels(1), 0)


def test_targets_are_found_by_label_or_synonym(vit):
    labels = ("zebra", "fire engine, fire truck", "dalmatian, coach dog", "crane", "crane, bird")
    vit.config.id2label = dict(enumerate(labels))
    names = ("zebra", "Fire truck", "dalmatian, coach dog", "Dalmatian")
    assert [find_class(vit, label) for label in names] == [0, 1, 2, 2]
    with pytest.raises(ValueError, match="did you mean 'dalmatian, coach dog'"):
        find_class(vit, "dalmation")
    with pytest.raises(ValueError, match="several.*'crane' or 'crane, bird'"):
        find_class(vit, "Crane")
    assert_close(token_gradients(vit, pixels(1), "fire truck")[0], token_gradients(vit, pixels(1), 1)[0])


def closed_form(kind, noise, shift):
    """The direction that unlimited normal rows give, with equal covariance on both sides and means ± shift /
    2.
    """
    total = noise + np.outer(shift, shift) / 4
    fisher = np.linalg.solve(noise, shift)
    return {"logistic": fisher, "fisher": fisher, "pattern": total @ fisher, "mean_difference": shift}[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_fit_cav_recovers_a_planted_direction(kind):
    rng = np.random.default_rng(0)
    mixing = rng.standard_normal((5, 5))
    shift = np.array([2.0, 0, -1, 0, 0.5])
    rows = rng.standard_normal((2, 20000, 5)) @ mixing.T + 7
    expected = closed_form(kind, mixing @ mixing.T, shift)
    cav = fit_cav(rows[0] + shift / 2, rows[1] - shift / 2, kind=kind)
    assert cav.shape == (5,) and cav.dtype == torch.float64
    assert_close(cav.norm().item(), 1.0)
    assert cav.numpy() @ expected / np.linalg.norm(expected) > 0.999
    if kind in ("logistic", "fisher"):
        assert cav.numpy() @ shift / np.linalg.norm(shift) < 0.9  # so that the kinds are told apart
    assert_close(fit_cav(rows[1] - shift / 2, rows[0] + shift / 2, kind=kind), -cav)


@pytest.mark.parametrize("shift", [0.3, 30.0], ids=["overlapping", "separable"])
def test_logistic_cav_is_the_optimum_also_in_single_precision_and_off_centre(shift):
    rng = np.random.default_rng(1)
    rows = rng.standard_normal((400, 8)) * np.logspace(-1, 1, 8) + 50
    rows[:200, 3] += shift
    exact = (
        LogisticRegression(tol=1e-10, max_iter=100_000, solver="newton-cg")
        .fit(rows, np.arange(400) < 200)
        .coef_[0]
    )
    cav = fit_cav(
        torch.tensor(rows[:200], dtype=torch.float32), torch.tensor(rows[200:], dtype=torch.float32)
    )
    assert cav.dtype == torch.float32
    assert cav.numpy() @ exact / np.linalg.norm(exact) > 1 - 1e-5


def test_rows_too_coarse_for_single_precision_are_fitted_in_double_without_a_warning():
    rng = np.random.default_rng(2)
    rows = (rng.standard_normal((300, 4)) * [1e4, 1, 1, 1]).astype(np.float32)
    rows[:150, 1] += 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cav = fit_cav(rows[:150], rows[150:])
    assert cav[1] > 0.98


def test_bfloat16_and_more_columns_than_rows_are_fine():
    rows = torch.randn(20, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    for kind in KINDS:
        assert_close(fit_cav(rows[:10], rows[10:], kind=kind).norm().item(), 1.0)


def test_fit_cav_refuses_bad_rows():
    rows = np.ones((4, 3))
    for positive, negative, kind, message in (
        (rows, rows[:, :2], "logistic", "must both be"),
        (rows, rows[:0], "logistic", "both sides"),
        (rows, rows * np.nan, "mean_difference", "NaN"),
        (rows, rows, "mean_difference", "alike"),
        (rows, rows, "fisher", "alike"),
        (rows, rows, "logistic", "alike"),
        (rows, rows, "lasso", "use one of logistic"),
    ):
        with pytest.raises(ValueError, match=message):
            fit_cav(positive, negative, kind=kind)


GRADIENTS = torch.tensor([[[3.0, 0.0], [-4.0, 0.0]], [[1.0, 2.0], [1.0, 2.0]]])


ATTENTION = torch.tensor([[0.8, 0.6], [0.5, 0.5]])


AXES = torch.eye(2)


def test_derivatives_solved_by_hand():
    # image 0, cav 0: s = (3, -4), a = (.8, .6), ‖a‖/‖s‖ = 1/5, d = (.8·.6, -.6·.8)
    # image 1, cav 1: s = (2, 2), a = (.5, .5), ‖a‖/‖s‖ = ¼, d = (.25, .25)
    expected = torch.tensor([[[0.48, 0.0], [-0.48, 0.0]], [[0.25, 0.25], [0.25, 0.25]]])
    assert_close(attention_weighted_derivatives(GRADIENTS, ATTENTION, AXES), expected)
    assert_close(plain_derivatives(GRADIENTS, AXES), GRADIENTS)
    assert_close(attention_weighted_derivatives(GRADIENTS, ATTENTION, AXES.numpy()), expected)
    assert ttcav_scores(plain_derivatives(GRADIENTS, AXES)).tolist() == [0.5, 0.5]
    assert ttcav_scores(plain_derivatives(GRADIENTS[:, :1], AXES)).tolist() == [1.0, 0.5]  # of the cls token
    shifted = attention_weighted_derivatives(GRADIENTS, ATTENTION + torch.tensor([0.1, 0.0]), AXES)
    assert ttcav_scores(shifted).tolist() == [1.0, 0.5]  # attention to the cls token turns image 0 for cav 0


def test_zero_gradients_give_zero_and_tiny_ones_keep_their_sign():
    zero = attention_weighted_derivatives(torch.zeros(2, 3, 4), torch.full((2, 3), 1 / 3), torch.eye(4))
    assert torch.equal(zero, torch.zeros(2, 3, 4)) and ttcav_scores(zero).tolist() == [0] * 4
    no_attention = attention_weighted_derivatives(torch.ones(1, 3, 2), torch.zeros(1, 3), AXES)
    assert torch.equal(no_attention, torch.zeros(1, 3, 2))
    for scale in (1e-30, 1e30):
        scaled = attention_weighted_derivatives(GRADIENTS * scale, ATTENTION, AXES)
        assert_close(scaled, attention_weighted_derivatives(GRADIENTS, ATTENTION, AXES))


def test_scores_do_not_change_under_the_positive_rescaling():
    generator = torch.Generator().manual_seed(3)
    gradients, cavs = torch.randn(40, 9, 12, generator=generator), torch.randn(7, 12, generator=generator)
    attention = torch.rand(40, 9, generator=generator).softmax(-1)
    scores = ttcav_scores(attention_weighted_derivatives(gradients, attention, cavs))
    assert torch.equal(ttcav_scores(attention[..., None] * plain_derivatives(gradients, cavs)), scores)
    factors = torch.rand(40, 1, 1, generator=generator) + 0.1
    assert torch.equal(
        ttcav_scores(attention_weighted_derivatives(factors * gradients, attention, 5 * cavs)), scores
    )
    assert scores.min() < scores.max()


def test_planted_concept_scores_one_its_opposite_zero_and_random_ones_a_half():
    rng = np.random.default_rng(0)
    concept = rng.standard_normal(64) / 8
    rows = rng.standard_normal((2, 2000, 64))
    cav = fit_cav(rows[0] + 2 * concept, rows[1])
    noise = torch.tensor(rng.standard_normal((400, 10, 64)))
    gradients = (
        2 * torch.tensor(concept) + noise
    )  # every token is pushed along the concept, and somewhere else
    attention = torch.tensor(rng.random((400, 10))).softmax(-1)
    random = torch.tensor(rng.standard_normal((300, 64)))
    random -= torch.outer(random @ cav, cav)
    cavs = torch.cat([cav[None], -cav[None], random])
    weighted = attention_weighted_derivatives(gradients, attention, cavs)
    for derivatives in (weighted, plain_derivatives(gradients, cavs)):
        scores = ttcav_scores(derivatives)
        assert scores[0] == 1 and scores[1] == 0
        assert abs(scores[2:].mean() - 0.5) < 0.02 and (scores[2:] - 0.5).abs().max() < 0.35


def test_empty_scores_are_refused():
    with pytest.raises(ValueError, match="no image"):
        ttcav_scores(torch.zeros(0, 3, 2))


@pytest.mark.parametrize(
    "pair", [("zebra", "horse"), ("dalmatian", "dog"), ("fire engine", "van")], ids="/".join
)
def test_directions_between_classes_of_the_concept_world_raise_the_class(trained, pair):
    """At images of one class, the logit of the other rises towards it; at its own images the last norm
    saturates.
    """
    model, processor = trained
    scenes = {label: concept_world.draw_scenes(40, seed=3, labels=[label] * 40).images for label in pair}
    inputs = {label: processor(list(images), return_tensors="pt") for label, images in scenes.items()}
    cls = {label: token_activations(model, inputs[label])[5][:, 0] for label in pair}
    for target, other in (pair, pair[::-1]):
        elsewhere = processor(
            list(concept_world.draw_scenes(20, 5, [other] * 20).images), return_tensors="pt"
        )
        gradients, _ = token_gradients(model, elsewhere, target)
        for kind in ("logistic", "mean_difference"):
            cav = fit_cav(cls[target], cls[other], kind=kind)
            assert ttcav_scores(plain_derivatives(gradients[5][:, :1], cav[None])) >= 0.9


def test_top_tokens_are_the_furthest_along_each_cav_and_never_padding():
    states = torch.tensor([[[3.0, 0], [1, 5], [2, 4], [9, 9]], [[1.0, 2], [4, 1], [9, 9], [9, 9]]])
    real = torch.tensor([[True, True, True, False], [True, True, False, False]])
    chosen = top_tokens(states, torch.eye(2), real, share=0.5)  # two of three, one of two
    expected = [[[1, 0], [0, 1], [1, 1], [0, 0]], [[0, 1], [1, 0], [0, 0], [0, 0]]]
    assert chosen.int().tolist() == expected
    assert top_tokens(states, torch.eye(2), real, share=0.01).sum((0, 1)).tolist() == [2, 2]
    assert top_tokens(states, torch.eye(2))[:, 3].all()  # without a mask all are real


def test_smooth_scores_tend_to_signs_and_to_one_half():
    means = np.random.default_rng(0).standard_normal((3, 50, 4))
    np.testing.assert_allclose(smooth_scores(means, 1e9), (means > 0).mean(1))
    np.testing.assert_allclose(smooth_scores(means, 0), 0.5)
    np.testing.assert_allclose(smooth_scores(7 * means, 2), smooth_scores(means, 2))  # no unit
    assert (smooth_scores(np.abs(means)) > 0.5).all()
    np.testing.assert_allclose(smooth_scores(0 * means), 0.5)
    by_hand = 1 / (1 + np.exp(-2 * np.array([1.0, -3.0]) / np.sqrt(5)))
    np.testing.assert_allclose(smooth_scores(np.array([[1.0], [-3.0]]), 2), [by_hand.mean()])
