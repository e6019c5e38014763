"""Activations are the model's own, and the cache gives back what was put in, or says that it cannot."""

import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import SENTENCES, build_text_classifier
from image_models import pixels
from torch.testing import assert_close

from helpers import activations as activation_module
from helpers.activations import collect_activations, pooled, token_activations
from helpers.models import set_precision
from helpers.text import encode


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


def test_activations_in_half_precision_do_not_pass_for_the_others(vit, tmp_path):
    whole = collect_activations(vit, pixels(2), cache_dir=tmp_path)
    set_precision(vit, "bfloat16")
    half = collect_activations(vit, pixels(2), cache_dir=tmp_path)
    set_precision(vit, "float32")
    np.testing.assert_allclose(half.layers[2], whole.layers[2], rtol=0.2, atol=0.2)
    assert (half.layers[2] != whole.layers[2]).any() and half.model_key == whole.model_key
    assert np.array_equal(collect_activations(vit, pixels(2), cache_dir=tmp_path).layers[2], whole.layers[2])


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
    rows, lengths = pooled([first, second], 1)
    np.testing.assert_array_equal(rows, np.concatenate([first.layers[1], first.layers[1]]))
    assert list(lengths) == [5] * 14
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
    assert len([path for path in (tmp_path / key).iterdir() if path.is_dir()]) == 2
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
    [path] = tmp_path.rglob("layer_01.npy")
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.unlink()
    path.write_bytes(
        {"cut": content[:-40], "garbage": b"junk" * 99, "empty": b"", "flipped bit": content}[damage]
    )
    with pytest.warns(UserWarning, match="layer_01.npy are damaged and are rebuilt"):
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
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".lock"]


def test_of_two_that_want_the_same_at_once_one_encodes_and_both_have_it(vit, tmp_path, monkeypatch):
    encode, encoded = activation_module._encode, []

    def slow(*arguments):
        encoded.append(1)
        time.sleep(0.2)
        encode(*arguments)

    monkeypatch.setattr(activation_module, "_encode", slow)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: collect_activations(vit, pixels(3), cache_dir=tmp_path), range(4)))
    assert len(encoded) == 1
    assert all(np.array_equal(each.layers[2], found[0].layers[2]) for each in found)


def test_unknown_layers_are_refused(vit, tmp_path):
    with pytest.raises(ValueError, match="0 to 2"):
        collect_activations(vit, pixels(1), layers=[1, 3], cache_dir=tmp_path)
