"""Concepts: activations and gradients are the model's own, CAVs find what was planted, scores and tests are
right.
"""

import warnings
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import SENTENCES, SPREAD, build_text_classifier
from PIL import Image
from safetensors import safe_open
from scipy import stats
from sklearn.linear_model import LogisticRegression
from torch.testing import assert_close
from transformers import (
    DeiTConfig,
    DeiTForImageClassification,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from helpers import activations as activation_module
from helpers import cavs as cavs_module
from helpers import concept_world
from helpers.activations import Activations, collect_activations, token_activations
from helpers.cavs import cav_accuracies, fit_cavs, fit_random_cavs, image_scores, load_cavs, save_cavs
from helpers.images import load_image_folder
from helpers.labels import find_class
from helpers.models import load_image_classifier, set_precision
from helpers.paths import PROJECT_ROOT
from helpers.statistics import benjamini_hochberg, bootstrap_interval, empirical_p_values, t_test
from helpers.tcav import (
    KINDS,
    attention_weighted_derivatives,
    cls_derivatives,
    fit_cav,
    plain_derivatives,
    token_gradients,
    ttcav_scores,
)
from helpers.text import encode

CONCEPT_VIT = PROJECT_ROOT / "data" / "models" / "concept_vit"
COMMON = dict(
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    image_size=16,
    patch_size=8,
    num_labels=3,
    initializer_range=SPREAD,
)
IMAGE_MODELS = {
    "vit": (ViTForImageClassification, ViTConfig(**COMMON, intermediate_size=48)),
    "deit": (DeiTForImageClassification, DeiTConfig(**COMMON, intermediate_size=48)),
    "dinov2": (Dinov2WithRegistersForImageClassification, Dinov2WithRegistersConfig(**COMMON, mlp_ratio=2)),
}
BLOCKS = {
    "vit": "vit.layers",
    "deit": "deit.layers",
    "dinov2": "dinov2_with_registers.encoder.layer",
    "bert": "bert.encoder.layer",
    "distilbert": "distilbert.transformer.layer",
    "roberta": "roberta.encoder.layer",
    "electra": "electra.encoder.layer",
}


def build_image_classifier(architecture, seed=0):
    torch.manual_seed(seed)
    model_class, config = IMAGE_MODELS[architecture]
    model = model_class._from_config(deepcopy(config), attn_implementation="eager")
    return model.eval().requires_grad_(False)


def pixels(count, seed=0):
    return {"pixel_values": torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))}


@pytest.fixture(params=sorted(BLOCKS))
def classifier(request, tokenizer, roberta_tokenizer):
    """Each architecture in turn: (model, two or three inputs of one length or padded, its blocks)."""
    if request.param in IMAGE_MODELS:
        model, inputs = build_image_classifier(request.param), pixels(2)
    else:
        chosen = roberta_tokenizer if request.param == "roberta" else tokenizer
        model = build_text_classifier(request.param, len(chosen))
        inputs = encode(SENTENCES, chosen, model)
    return model, inputs, model.get_submodule(BLOCKS[request.param])


@pytest.fixture
def vit():
    return build_image_classifier("vit")


@pytest.fixture(scope="module")
def trained():
    return load_image_classifier(str(CONCEPT_VIT), "cpu")


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


# Activations and gradients


def test_activations_are_what_forward_hooks_see(classifier):
    model, inputs, blocks = classifier
    seen = []
    hooks = [
        block.register_forward_hook(lambda module, args, output: seen.append(output.clone()))
        for block in blocks
    ]
    activations = token_activations(model, inputs)
    for hook in hooks:
        hook.remove()
    assert list(activations) == list(range(len(blocks)))
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(activations.values(), seen, strict=True))
    assert not any(block._forward_hooks for block in blocks)


def test_the_last_activations_precede_the_final_layer_norm(vit):
    last = token_activations(vit, pixels(2))[2]
    assert_close(vit.classifier(vit.vit.layernorm(last)[:, 0]), vit(**pixels(2)).logits)


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


# The cache


def test_activations_in_half_precision_do_not_pass_for_the_others(vit, tmp_path):
    whole = collect_activations(vit, pixels(2), cache_dir=tmp_path)
    set_precision(vit, "bfloat16")
    half = collect_activations(vit, pixels(2), cache_dir=tmp_path)
    set_precision(vit, "float32")
    np.testing.assert_allclose(half.layers[2], whole.layers[2], rtol=0.2, atol=0.2)
    assert (half.layers[2] != whole.layers[2]).any() and half.model_key == whole.model_key
    assert np.array_equal(collect_activations(vit, pixels(2), cache_dir=tmp_path).layers[2], whole.layers[2])


def test_where_memory_runs_out_images_go_through_in_smaller_batches(vit, tmp_path, monkeypatch):
    cavs = fit_random_cavs(collect_activations(vit, pixels(12), cache_dir=tmp_path / "all"), 3, 2)
    expected = image_scores(vit, pixels(7), 1, {"random": cavs})
    activations = collect_activations(vit, pixels(7), cache_dir=tmp_path / "all").layers
    for module, name in ((activation_module, "token_activations"), (cavs_module, "token_gradients")):
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


def test_cached_activations_equal_uncached_ones(vit, tmp_path):
    inputs = pixels(7)
    first = collect_activations(vit, inputs, batch_size=3, cache_dir=tmp_path)
    direct = token_activations(vit, inputs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(activation_module, "_encode", None)  # a second encoding would fail
        second = collect_activations(vit, inputs, batch_size=4, cache_dir=tmp_path)
    for layer in range(3):
        assert_close(
            torch.tensor(np.array(first.layers[layer])), direct[layer].flatten(0, 1), rtol=1e-4, atol=1e-5
        )
        np.testing.assert_array_equal(first.layers[layer], second.layers[layer])
    np.testing.assert_array_equal(first.part(1, [5]).rows[25:30], first.layers[1][5 * 5 : 6 * 5])
    assert len(first) == 7 and list(first.offsets) == list(range(0, 40, 5))


def test_rows_of_texts_are_their_real_tokens(tokenizer, tmp_path):
    model = build_text_classifier("bert", len(tokenizer))
    inputs = encode(SENTENCES, tokenizer, model)
    collected = collect_activations(model, inputs, batch_size=2, cache_dir=tmp_path, layers=[1])
    lengths = inputs["attention_mask"].sum(-1).tolist()
    assert np.diff(collected.offsets).tolist() == lengths and list(collected.layers) == [1]
    for row, text in enumerate(SENTENCES):
        single = token_activations(model, encode([text], tokenizer, model))[1][0]
        mine = collected.layers[1][collected.offsets[row] : collected.offsets[row + 1]]
        assert_close(torch.tensor(np.array(mine)), single, rtol=1e-4, atol=1e-5)


def test_other_weights_settings_or_images_are_other_entries(vit, tmp_path):
    collect_activations(vit, pixels(2), cache_dir=tmp_path)
    key = activation_module.model_key(vit)
    collect_activations(vit, pixels(2, seed=1), cache_dir=tmp_path)
    assert len(list((tmp_path / key).iterdir())) == 2
    vit.config.layer_norm_eps = 1e-3
    assert activation_module.model_key(vit) != key
    vit.config.layer_norm_eps = 1e-12
    assert activation_module.model_key(vit) == key
    vit.vit.layers[0].layernorm_before.bias[3] += 1e-3
    assert activation_module.model_key(vit) != key


@pytest.mark.parametrize("damage", ["cut", "garbage", "empty", "flipped bit"])
def test_damaged_cache_files_are_rebuilt_with_a_note(vit, tmp_path, damage):
    before = collect_activations(vit, pixels(4), cache_dir=tmp_path)
    expected = {layer: np.array(rows) for layer, rows in before.layers.items()}
    [path] = tmp_path.rglob("layer_01.safetensors")
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.unlink()
    path.write_bytes(
        {"cut": content[:-40], "garbage": b"junk" * 99, "empty": b"", "flipped bit": content}[damage]
    )
    with pytest.warns(UserWarning, match="layer_01.safetensors are damaged and are rebuilt"):
        after = collect_activations(vit, pixels(4), cache_dir=tmp_path)
    for layer in range(3):
        np.testing.assert_array_equal(after.layers[layer], expected[layer])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        collect_activations(vit, pixels(4), cache_dir=tmp_path)


def test_an_interrupted_encoding_leaves_nothing_behind(vit, tmp_path, monkeypatch):
    batches = [token_activations(vit, pixels(1))]
    monkeypatch.setattr(activation_module, "token_activations", lambda model, batch: batches.pop())
    with pytest.raises(IndexError):
        collect_activations(vit, pixels(2), batch_size=1, cache_dir=tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_unknown_layers_are_refused(vit, tmp_path):
    with pytest.raises(ValueError, match="0 to 2"):
        collect_activations(vit, pixels(1), layers=[1, 3], cache_dir=tmp_path)


# CAVs


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


def test_relative_cavs_contrast_with_as_many_images_of_the_other_concepts():
    sources = {name: one_hot(6, 18, 6 * i) for i, name in enumerate("abc")}
    cavs = fit_cavs(sources, n_draws=8, kind="mean_difference", n_jobs=1)
    assert cavs.vectors.shape == (1, 3, 8, 18) and cavs.concepts == ("a", "b", "c")
    for i, draws in enumerate(cavs.vectors[0]):
        own = np.arange(18) // 6 == i
        assert (
            (draws[:, own] > 0).all()
            and ((draws[:, ~own] < 0).sum(1) == 6).all()
            and (draws[:, ~own] <= 0).all()
        )
        assert len(np.unique(draws < 0, axis=0)) > 4


def test_random_images_take_the_place_of_other_concepts():
    sources = {"a": one_hot(6, 18, 0)}
    [[draws]] = fit_cavs(sources, 4, random=one_hot(12, 18, 6), kind="mean_difference", n_jobs=1).vectors
    assert (draws[:, :6] > 0).all() and ((draws[:, 6:] < 0).sum(1) == 6).all()


def test_random_cavs_split_random_images_in_disjoint_halves():
    [[draws]] = fit_random_cavs(one_hot(15, 15, 0), 6, n_draws=5, kind="mean_difference", n_jobs=1).vectors
    assert ((draws > 0).sum(1) == 6).all() and ((draws < 0).sum(1) == 6).all()
    assert len(np.unique(draws > 0, axis=0)) == 5
    with pytest.raises(ValueError, match="need 16"):
        fit_random_cavs(one_hot(15, 15, 0), 8)


def test_cavs_are_the_same_for_a_seed_whatever_the_number_of_draws_or_workers():
    sources = {
        name: planted(8, shift, seed=i) for i, (name, shift) in enumerate({"a": 2, "b": 0, "c": -1}.items())
    }
    cavs = fit_cavs(sources, n_draws=3, n_jobs=1)
    np.testing.assert_array_equal(fit_cavs(sources, n_draws=3, n_jobs=2).vectors, cavs.vectors)
    np.testing.assert_array_equal(fit_cavs(sources, n_draws=2, n_jobs=1).vectors, cavs.vectors[:, :, :2])
    later = fit_cavs(sources, n_draws=2, seed=1, n_jobs=1).vectors  # the same contrasts, from another start
    np.testing.assert_allclose(later, cavs.vectors[:, :, 1:], atol=1e-4)
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
            fit_cavs(sources, random=random, n_draws=2, n_jobs=1)
    with pytest.warns(UserWarning, match="its 2 draws are all equal"):
        cavs = fit_cavs({"striped": ten, "dotted": planted(10, 1, seed=1)}, n_draws=2, n_jobs=1)
    np.testing.assert_allclose(cavs.vectors[:, :, 0], cavs.vectors[:, :, 1], atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_held_out_accuracy_of_a_planted_concept(kind):
    sources = {"a": planted(20, 2.0), "b": planted(20, -2.0, seed=1)}
    accuracies = cav_accuracies(sources, n_folds=4, kind=kind, n_jobs=1)
    assert accuracies.shape == (1, 2, 4) and accuracies.mean() > 0.95
    off_centre = {name: replace(source, layers={0: source.layers[0] + 9}) for name, source in sources.items()}
    np.testing.assert_allclose(
        cav_accuracies(off_centre, n_folds=4, kind=kind, n_jobs=1), accuracies, atol=0.02
    )


def test_folds_keep_the_tokens_of_an_image_together():
    rng = np.random.default_rng(0)

    def images_without_concept():  # every token is its image and a little noise: a fold that splits images scores 1
        rows = np.repeat(rng.standard_normal((40, 64)), 5, axis=0) + 0.01 * rng.standard_normal((200, 64))
        return Activations({0: rows.astype(np.float32)}, np.arange(41) * 5, "model", "m", 1)

    sources = {"a": images_without_concept(), "b": images_without_concept()}
    assert 0.3 < cav_accuracies(sources, n_folds=4, n_jobs=1).mean() < 0.7
    with pytest.raises(ValueError, match="41 folds"):
        cav_accuracies(sources, n_folds=41, n_jobs=1)


def test_cavs_are_saved_with_their_model_and_refused_by_others(vit, tmp_path):
    sources = {
        name: collect_activations(vit, pixels(6, seed), cache_dir=tmp_path) for seed, name in enumerate("abc")
    }
    cavs, path = fit_cavs(sources, n_draws=2, n_jobs=1), tmp_path / "cavs" / "relative.safetensors"
    save_cavs(cavs, path)
    loaded = load_cavs(path, vit)
    np.testing.assert_array_equal(loaded.vectors, cavs.vectors)
    assert replace(loaded, vectors=None) == replace(cavs, vectors=None)
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


# Directional derivatives and scores

GRADIENTS = torch.tensor([[[3.0, 0.0], [-4.0, 0.0]], [[1.0, 2.0], [1.0, 2.0]]])
ATTENTION = torch.tensor([[0.8, 0.6], [0.5, 0.5]])
AXES = torch.eye(2)


def test_derivatives_solved_by_hand():
    # image 0, cav 0: s = (3, -4), a = (.8, .6), ‖a‖/‖s‖ = 1/5, d = (.8·.6, -.6·.8)
    # image 1, cav 1: s = (2, 2), a = (.5, .5), ‖a‖/‖s‖ = ¼, d = (.25, .25)
    expected = torch.tensor([[[0.48, 0.0], [-0.48, 0.0]], [[0.25, 0.25], [0.25, 0.25]]])
    assert_close(attention_weighted_derivatives(GRADIENTS, ATTENTION, AXES), expected)
    assert_close(plain_derivatives(GRADIENTS, AXES), GRADIENTS)
    assert_close(cls_derivatives(GRADIENTS, AXES), GRADIENTS * torch.tensor([1.0, 0.0])[:, None])
    assert_close(attention_weighted_derivatives(GRADIENTS, ATTENTION, AXES.numpy()), expected)
    plain, at_cls = (ttcav_scores(f(GRADIENTS, AXES)) for f in (plain_derivatives, cls_derivatives))
    assert plain.tolist() == [0.5, 0.5] and at_cls.tolist() == [1.0, 0.5]
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
        "relative": fit_cavs(sources, 4, n_jobs=1),
        "random": fit_random_cavs(sources["a"], 3, 5, n_jobs=1),
    }
    scores = image_scores(model, inputs, "neutral", cavs, batch_size=2)
    assert scores["relative"]["plain"].shape == (2, 3, 3, 4) and scores["random"]["cls"].shape == (2, 1, 3, 5)
    for row, text in enumerate(SENTENCES):
        gradients, attention = token_gradients(model, encode([text], tokenizer, model), 1)
        for i, layer in enumerate((0, 2)):
            vectors = torch.tensor(cavs["relative"].vectors[i, 2])
            for weighting, derivatives in (
                ("attention", attention_weighted_derivatives(gradients[layer], attention[layer], vectors)),
                ("plain", plain_derivatives(gradients[layer], vectors)),
                ("cls", cls_derivatives(gradients[layer], vectors)),
            ):
                mine = torch.tensor(scores["relative"][weighting][i, 2, row])
                assert_close(mine, derivatives.mean(1)[0], rtol=1e-3, atol=1e-6)


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
            assert ttcav_scores(cls_derivatives(gradients[5], cav[None])) >= 0.9


# Tests and intervals


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


# Folders of images


@pytest.fixture
def folder(tmp_path):
    for name in ("dotted", "striped"):
        (tmp_path / name).mkdir()
        for number in range(6):
            Image.new("L" if number else "RGBA", (8 + number, 8), number).save(
                tmp_path / name / f"{number}.png"
            )
    (tmp_path / "striped" / ".DS_Store").write_text("hidden")
    return tmp_path


def test_image_folders_are_read_in_order(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        images = load_image_folder(folder)
    assert list(images) == ["dotted", "striped"]
    assert [image.size[0] for image in images["striped"]] == [8, 9, 10, 11, 12, 13]
    assert {image.mode for image in images["striped"]} == {"RGB"}
    assert len(load_image_folder(folder, max_images=5)["dotted"]) == 5


def test_unreadable_files_are_named_skipped_and_counted(folder):
    content = (folder / "striped" / "1.png").read_bytes()
    (folder / "striped" / "1.png").write_bytes(content[: len(content) // 2])
    (folder / "striped" / "notes.txt").write_text("no image")
    with pytest.warns(UserWarning, match=r"'striped': skipped 2 unreadable files \(1.png, notes.txt\)"):
        assert len(load_image_folder(folder)["striped"]) == 5
    with pytest.raises(
        ValueError, match=r"'striped' has 5 images and needs at least 6 beside 2 unreadable files \(1.png"
    ):
        load_image_folder(folder, min_images=6)


def test_fewer_images_than_are_needed_cannot_be_asked_for(folder):
    with pytest.raises(
        ValueError, match="at least 5 images of each folder are needed, more than the 2 asked for"
    ):
        load_image_folder(folder, max_images=2)


def test_missing_or_flat_folders_are_refused(folder):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_image_folder(folder / "nowhere")
    with pytest.raises(ValueError, match="striped/<name>"):
        load_image_folder(folder / "striped")
