"""The concept world: same seed, same bytes; masks true to the pixel; a committed model that uses the
concepts.
"""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

from helpers import concept_world as world

MODEL = Path(__file__).parents[1] / "data" / "models" / "concept_vit"


@pytest.fixture(scope="module")
def scenes():
    return world.draw_scenes(180, seed=11)


@pytest.fixture(scope="module")
def pairs():
    return world.draw_counterfactual_pairs(90, seed=12)


@pytest.fixture(scope="module")
def classifier():
    model = AutoModelForImageClassification.from_pretrained(MODEL, attn_implementation="eager").eval()
    return model, AutoImageProcessor.from_pretrained(MODEL)


def predict(classifier, images):
    model, processor = classifier
    with torch.inference_mode():
        return model(**processor(list(images), return_tensors="pt")).logits.argmax(-1).numpy()


def spread(pixels):
    """Mean distance of pixels (count, 3) to their mean colour, in grey levels."""
    return np.linalg.norm(pixels - pixels.mean(axis=0), axis=1).mean()


# Seeds


def test_same_seed_gives_same_bytes(scenes):
    again = world.draw_scenes(180, seed=11)
    for first, second in zip(scenes, again, strict=True):
        assert first.dtype == second.dtype
        np.testing.assert_array_equal(first, second)


def test_another_seed_gives_other_images(scenes):
    assert not (world.draw_scenes(180, seed=13).images == scenes.images).all(axis=(1, 2, 3)).any()


def test_no_scene_is_drawn_twice():
    images = world.draw_scenes(180, labels=["horse"] * 180).images
    assert len(np.unique(images.reshape(180, -1), axis=0)) == 180


def test_image_does_not_depend_on_how_many_are_drawn(scenes):
    for n_images in (1, world.BATCH, world.BATCH + 1):
        np.testing.assert_array_equal(world.draw_scenes(n_images, seed=11).images, scenes.images[:n_images])
    np.testing.assert_array_equal(
        world.draw_concept_images("dotted", 2), world.draw_concept_images("dotted", 80)[:2]
    )


def test_concept_images_are_deterministic_and_differ_between_concepts():
    first, second = (world.draw_concept_images("striped", 3, seed=1) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert (first != world.draw_concept_images("striped", 3, seed=2)).any(axis=(1, 2, 3)).all()
    assert (first != world.draw_concept_images("zigzagged", 3, seed=1)).any(axis=(1, 2, 3)).all()


DRAWN_BEFORE_SIZES = {  # sha256 of what was drawn when every scene had 64 pixels a side
    "scenes": "3362c0682bb2a3bba3ddf5d64f42cc7aafa28d021d52f8c7dd7b8e2643cefa74",
    "pairs": "f281740ebfa17cd20a80127108d7cec771e60eb7fe2114c88c967bec9a577b90",
    "striped": "694459d280b835dd826f22881686c0932e3a57a60d59d06d1ecf5877d9ccd951",
    "dotted": "edb8ae1202d7cebc9359d00d1763877eeefea6d965929194ff1e28f1e147755c",
    "zigzagged": "d1cab92748dc61e6d456d74116fc88e9b46c57f8334d4b5b001c6762dffc1ea4",
    "red": "908c95182e5560cb284ef54ebcb39c283324c8e8543dc35bc6939e1e2197ef46",
    "random": "b34ef2012e207169b833b1ac9672035a72330f22c21ae35e48d15c3acd5602b6",
    "red striped": "c70326ed52f500c41e141121a935f76c13a87c263953bde7983c4acef552d7db",
}


@pytest.mark.parametrize("what", DRAWN_BEFORE_SIZES)
def test_default_size_keeps_its_bytes(what):
    if what == "scenes":
        arrays = world.draw_scenes(130, seed=5, decoys=0.5)
    elif what == "pairs":
        arrays = [array for member in world.draw_counterfactual_pairs(66, seed=7) for array in member]
    else:
        arrays = [world.draw_concept_images(what, 66, seed=3)]
    drawn = hashlib.sha256(b"".join(np.ascontiguousarray(array).tobytes() for array in arrays))
    assert drawn.hexdigest() == DRAWN_BEFORE_SIZES[what]


# Sizes


def shrunk(images, size=64):
    """Images as they look at another size: each pixel the mean over its area."""
    return np.stack([np.asarray(Image.fromarray(image).resize((size, size), Image.BOX)) for image in images])


@pytest.mark.parametrize("size", [32, 112, 128])
def test_scene_looks_the_same_at_another_size(size, scenes):
    other = world.draw_scenes(30, seed=11, size=size)
    assert other.images.shape == (30, size, size, 3) and other.concept_masks.shape == (30, size, size)
    at_64 = world.Scenes(*(column[:30] for column in scenes))
    common = min(size, 64)
    difference = np.abs(shrunk(other.images, common).astype(float) - shrunk(at_64.images, common))
    strangers = np.abs(shrunk(other.images, common).astype(float)[1:] - shrunk(at_64.images, common)[:-1])
    assert difference.mean() < 8 and strangers.mean() > 40
    for mine, theirs in zip(other[2:], at_64[2:], strict=True):
        np.testing.assert_allclose(mine.mean(axis=(1, 2)), theirs.mean(axis=(1, 2)), atol=0.06)


@pytest.mark.parametrize("concept", ["striped", "dotted", "zigzagged", "red", "random", "red striped"])
def test_concept_looks_the_same_at_another_size(concept):
    images, large = (world.draw_concept_images(concept, 20, seed=3, size=size) for size in (64, 128))
    assert large.shape == (20, 128, 128, 3)
    assert np.abs(shrunk(large).astype(float) - images).mean() < 12  # of about 80 between other images


def test_edges_of_a_texture_are_one_pixel_wide_at_every_size():
    blended = []
    for size in (64, 128):
        grey = world.draw_concept_images("striped", 20, size=size).mean(axis=3)
        low, high = (pick(grey, axis=(1, 2), keepdims=True) for pick in (np.min, np.max))
        share = (grey - low) / (high - low)
        blended.append(((share > 0.05) & (share < 0.95)).mean())
    assert 0.4 < blended[1] / blended[0] < 0.6


def test_edges_of_an_object_are_one_pixel_wide_at_every_size():
    pose = world._draw_pose(np.random.default_rng(0))[:, :12]
    shapes = np.arange(12) % 3
    blended = []
    for size in (64, 128):
        covers = np.stack(world._place_silhouettes(size, shapes, *pose))
        blended.append(((covers > 0) & (covers < 1)).mean())
    assert 0.4 < blended[1] / blended[0] < 0.6


def test_background_of_a_large_scene_is_as_rough_as_its_law_says():
    """Amplitude 1/f to 1/f^1.6 up to the finest waves: an enlarged image would have none of them."""
    power = np.abs(np.fft.fft2(world._noise(np.random.default_rng(0), 112))) ** 2
    frequency = np.hypot(np.fft.fftfreq(112)[:, None], np.fft.fftfreq(112)) * 112
    middle, fine = (power[:, (frequency > low) & (frequency < low + 6)].mean() for low in (20, 44))
    assert (23 / 47) ** 3.3 < fine / middle < (23 / 47) ** 1.9


def test_pairs_at_112_differ_inside_the_concept_mask_alone_and_all_over_it():
    with_concept, without = world.draw_counterfactual_pairs(60, seed=12, size=112)
    assert with_concept.images.shape == without.images.shape == (60, 112, 112, 3)
    np.testing.assert_array_equal(with_concept.object_masks, without.object_masks)
    np.testing.assert_array_equal(with_concept.concept_masks, without.concept_masks)
    changed = (with_concept.images != without.images).any(axis=3)
    assert not (changed & ~with_concept.concept_masks).any()
    share = changed.sum(axis=(1, 2)) / with_concept.concept_masks.sum(axis=(1, 2))
    trucks = with_concept.labels == 4
    assert share[trucks].min() > 0.95 and share[~trucks].min() > 0.15 and share[~trucks].max() < 0.85


def test_object_mask_at_112_is_true_to_the_pixel():
    horse, van = (world.draw_scenes(40, 3, [name] * 40, size=112) for name in ("horse", "van"))
    differs = (horse.images != van.images).any(axis=3)
    assert not differs[~horse.object_masks & ~van.object_masks].any()
    assert differs[horse.object_masks ^ van.object_masks].mean() > 0.98


def test_bad_size():
    for draw in (world.draw_scenes, world.draw_counterfactual_pairs):
        with pytest.raises(ValueError, match="at least 16 pixels a side, not 8"):
            draw(1, size=8)
    with pytest.raises(ValueError, match="at least 16 pixels a side, not 0"):
        world.draw_concept_images("red", 1, size=0)


# Labels


def test_classes_are_balanced(scenes):
    np.testing.assert_array_equal(np.bincount(scenes.labels), 30)
    assert np.ptp(np.bincount(world.draw_scenes(100).labels)) <= 1


def test_labels_may_be_names_or_indices():
    named, numbered = world.draw_scenes(2, 5, ["van", "zebra"]), world.draw_scenes(2, 5, [5, 0])
    np.testing.assert_array_equal(named.labels, [5, 0])
    np.testing.assert_array_equal(named.images, numbered.images)


def test_shape_follows_the_label():
    zebra, horse, dalmatian, dog, engine, van = (world.draw_scenes(20, 3, [label] * 20) for label in range(6))
    for with_concept, without in ((zebra, horse), (dalmatian, dog), (engine, van)):
        np.testing.assert_array_equal(with_concept.object_masks, without.object_masks)
    heights = [scene.object_masks.any(axis=2).sum(axis=1) for scene in (horse, dog, van)]
    assert (heights[0] > 1.1 * heights[1]).all() and (heights[0] > 1.1 * heights[2]).all()
    areas = [scene.object_masks.sum(axis=(1, 2)) for scene in (horse, dog, van)]
    assert (areas[2] > 1.1 * areas[0]).all() and (areas[0] > 1.1 * areas[1]).all()


# Masks


def test_masks_have_sensible_areas(scenes):
    objects, concepts = (masks.mean(axis=(1, 2)) for masks in (scenes.object_masks, scenes.concept_masks))
    assert objects.min() > 0.10 and objects.max() < 0.55
    assert (concepts > 0.25 * objects).all() and (concepts < 0.9 * objects).all()
    assert not (scenes.concept_masks & ~scenes.object_masks).any()


def test_objects_stay_in_the_frame(scenes):
    inner = np.zeros((64, 64), bool)
    inner[1:-1, 1:-1] = True
    cut = (scenes.object_masks & ~inner).sum(axis=(1, 2)) / scenes.object_masks.sum(axis=(1, 2))
    assert cut.max() < 0.05 and (cut > 0).mean() < 0.4


def test_object_mask_parts_object_from_background():
    horse, van = (world.draw_scenes(60, 3, [name] * 60) for name in ("horse", "van"))
    differs = (horse.images != van.images).any(axis=3)
    assert not differs[
        ~horse.object_masks & ~van.object_masks
    ].any()  # the background does not know the class
    assert (
        differs[horse.object_masks ^ van.object_masks].mean() > 0.98
    )  # a faint edge may round to the background


def test_pairs_differ_inside_the_concept_mask_alone(pairs):
    with_concept, without = pairs
    np.testing.assert_array_equal(with_concept.labels + 1, without.labels)
    np.testing.assert_array_equal(with_concept.object_masks, without.object_masks)
    np.testing.assert_array_equal(with_concept.concept_masks, without.concept_masks)
    changed = (with_concept.images != without.images).any(axis=3)
    assert not (changed & ~with_concept.concept_masks).any()
    share = changed.sum(axis=(1, 2)) / with_concept.concept_masks.sum(axis=(1, 2))
    trucks = with_concept.labels == 4
    assert share[trucks].min() > 0.95 and share[~trucks].min() > 0.15 and share[~trucks].max() < 0.85


def test_texture_shows_both_of_its_colours(pairs):
    with_concept, without = (scene.images.astype(float) for scene in pairs)
    labels, masks = pairs[0].labels, pairs[0].concept_masks
    for label, image, plain, mask in zip(labels, with_concept, without, masks, strict=True):
        if label < 4:
            distance = np.linalg.norm(image[mask] - np.median(plain[mask], axis=0), axis=1)
            assert (distance < 20).mean() > 0.15 and (distance > 100).mean() > 0.1
            assert spread(image[mask]) > 2 * spread(plain[mask])


def roundness(scenes, plain):
    """Weakest over strongest direction of the texture's gradients inside the coat: 0 for stripes, 1 for
    discs.
    """
    texture = np.abs(scenes.images.astype(float) - plain.images).sum(axis=3)
    inner = scenes.concept_masks & np.all(
        [np.roll(scenes.concept_masks, shift, axis) for shift in (-1, 1) for axis in (1, 2)], axis=0
    )
    down, right = (np.where(inner, gradient, 0) for gradient in np.gradient(texture, axis=(1, 2)))
    tensor = np.array([[down * down, down * right], [down * right, right * right]]).sum(axis=(3, 4)).T
    low, high = np.linalg.eigvalsh(tensor).T
    return low / high


def test_horses_wear_stripes_and_dogs_dots(pairs):
    with_concept, without = (
        world.Scenes(*(column[pairs[0].labels < 4] for column in scenes)) for scenes in pairs
    )
    measured = roundness(with_concept, without)
    assert measured[with_concept.labels == 0].max() < 0.25 < measured[with_concept.labels == 2].min()


def test_decoys_wear_a_foreign_texture():
    labels = ["horse", "dog"] * 60
    plain = world.draw_scenes(120, 6, labels)
    for share in (0.5, 1):
        decoys = world.draw_scenes(120, 6, labels, decoys=share)
        np.testing.assert_array_equal(decoys.labels, plain.labels)
        changed = (decoys.images != plain.images).any(axis=3)
        assert not (changed & ~plain.concept_masks).any()
        assert abs(changed.any(axis=(1, 2)).mean() - share) < 0.15
    assert (roundness(decoys, plain)[::2] > 0.25).all()  # dots and zigzags on the horses, no stripes
    assert 0.25 < (roundness(decoys, plain)[1::2] < 0.25).mean() < 0.75  # stripes on some of the dogs
    others = ["zebra", "dalmatian", "fire engine", "van"] * 10
    with_decoys, without = (world.draw_scenes(40, 6, others, decoys=share) for share in (1, 0))
    np.testing.assert_array_equal(with_decoys.images, without.images)


def test_only_fire_engines_have_red_walls(pairs):
    for scene, red in zip(pairs, (True, False), strict=True):
        trucks = scene.labels // 2 == 2
        for image, mask in zip(scene.images[trucks], scene.concept_masks[trucks], strict=True):
            r, g, b = np.median(image[mask].astype(float), axis=0)
            assert (r > 2 * max(g, b)) == red


# Concept images


def test_flat_colours_are_flat_and_of_their_hue():
    for concept, channels in (("red", [0]), ("green", [1]), ("blue", [2]), ("yellow", [0, 1])):
        images = world.draw_concept_images(concept, 50)
        assert (images == images[:, :1, :1]).all()
        colours = images[:, 0, 0].astype(float)
        others = np.delete(colours, channels, axis=1)
        assert (colours[:, channels].min(axis=1) > 1.4 * others.max(axis=1)).all()
        assert len(np.unique(colours, axis=0)) > 45


@pytest.mark.parametrize("concept", ["striped", "dotted", "zigzagged"])
def test_textures_have_two_colours_and_a_period(concept):
    images = world.draw_concept_images(concept, 50).astype(float)
    assert images.shape == (50, 64, 64, 3)
    assert min(spread(image.reshape(-1, 3)) for image in images) > 50
    grey = images.mean(axis=3)
    power = np.abs(np.fft.fft2(grey - grey.mean(axis=(1, 2), keepdims=True))) ** 2
    frequency = np.hypot(np.fft.fftfreq(64)[:, None], np.fft.fftfreq(64))
    strongest = frequency.ravel()[power.reshape(50, -1).argmax(axis=1)]
    assert (strongest > 1 / 10).all() and (strongest < 1 / 3).all()


def test_stripes_have_one_direction_and_zigzags_two():
    shares = []
    for concept in ("striped", "zigzagged"):
        grey = world.draw_concept_images(concept, 50).astype(float).mean(axis=3)
        down, right = np.gradient(grey, axis=(1, 2))
        tensor = np.array([[down * down, down * right], [down * right, right * right]]).sum(axis=(3, 4)).T
        low, high = np.linalg.eigvalsh(tensor).T
        shares.append(low / high)
    assert shares[0].max() < shares[1].min()


def test_coloured_texture_shows_its_colour():
    for image in world.draw_concept_images("red striped", 20).astype(float):
        red = (image[..., 0] > 2 * image[..., 1:].max(axis=2)).mean()
        assert red > 0.25


def test_concepts_are_drawn_independently():
    red, blue = (world.draw_concept_images(concept, 50)[:, 0, 0].max(axis=1) for concept in ("red", "blue"))
    assert (red == blue).mean() < 0.1  # brightness


def test_every_concept_can_be_drawn():
    for concept in world.CONCEPTS:
        images = world.draw_concept_images(concept, 2)
        assert images.shape == (2, 64, 64, 3) and images.dtype == np.uint8


# Bad input


@pytest.mark.parametrize(
    "draw",
    [world.draw_scenes, world.draw_counterfactual_pairs, lambda n: world.draw_concept_images("red", n)],
)
@pytest.mark.parametrize("count", [0, -3])
def test_bad_count(draw, count):
    with pytest.raises(ValueError, match=f"at least one.*{count}"):
        draw(count)


def test_unknown_names():
    with pytest.raises(ValueError, match="unknown concept 'stripped'.*mean 'striped'.*zigzagged"):
        world.draw_concept_images("stripped", 1)
    with pytest.raises(ValueError, match="unknown class 'zebras'.*mean 'zebra'.*fire engine"):
        world.draw_scenes(1, labels=["zebras"])
    for index in (-1, 6):
        with pytest.raises(ValueError, match=f"unknown class {index}"):
            world.draw_scenes(1, labels=[index])


def test_names_that_cannot_be_drawn_are_told_with_the_parameter_and_the_way_out(tmp_path):
    world.check_names("concepts", ["red", "random", "red striped"])
    world.check_names("targets", world.CLASSES, what="class")
    said = "concepts: unknown concept 'boxy'.*zigzagged.*for images of your own give concepts_dir"
    with pytest.raises(ValueError, match=said):
        world.check_names("concepts", ["red", "boxy"])
    said = "targets: unknown class 'circle'.*zebra.*for images of your own give targets_dir"
    with pytest.raises(ValueError, match=said):
        world.check_names("targets", ["circle"], what="class")
    (tmp_path / "boxy").mkdir()
    world.check_names("concepts", ["boxy"], tmp_path)
    with pytest.raises(ValueError, match="concepts names red, but concepts_dir .* it has boxy"):
        world.check_names("concepts", ["red", "boxy"], tmp_path)


def test_bad_labels_and_decoys():
    with pytest.raises(ValueError, match="1 labels were given for 2 images"):
        world.draw_scenes(2, labels=["van"])
    with pytest.raises(ValueError, match="between 0 and 1, not 2"):
        world.draw_scenes(2, decoys=2)


# The committed model


def test_model_folder_is_small_and_has_no_pickle():
    files = {path.name: path.stat().st_size for path in MODEL.iterdir() if path.is_file()}
    assert set(files) == {
        "train.py",
        "config.json",
        "preprocessor_config.json",
        "model.safetensors",
        "accuracy.json",
    }
    assert sum(files.values()) <= 5_000_000


def test_model_names_held_out_scenes(classifier):
    scenes = world.draw_scenes(300, seed=101)
    assert (predict(classifier, scenes.images) == scenes.labels).mean() >= 0.93


def test_model_follows_the_concept(classifier):
    pairs = world.draw_counterfactual_pairs(150, seed=102)
    flipped = np.all([predict(classifier, scenes.images) == scenes.labels for scenes in pairs], axis=0)
    assert flipped.mean() >= 0.93


def test_model_is_not_fooled_by_foreign_textures(classifier):
    decoys = world.draw_scenes(200, seed=103, labels=["horse", "dog"] * 100, decoys=1)
    assert (predict(classifier, decoys.images) == decoys.labels).mean() >= 0.9


def test_model_gives_attention_and_names(classifier, scenes):
    model, processor = classifier
    assert tuple(model.config.id2label.values()) == world.CLASSES
    inputs = processor(list(scenes.images[:2]), return_tensors="pt")
    expected = torch.from_numpy(scenes.images[:2]).permute(0, 3, 1, 2) / 127.5 - 1
    torch.testing.assert_close(inputs["pixel_values"], expected, atol=1e-5, rtol=0)
    with torch.inference_mode():
        attentions = model(**inputs, output_attentions=True).attentions
    assert [tuple(weights.shape) for weights in attentions] == [(2, 4, 65, 65)] * 6
    torch.testing.assert_close(attentions[0].sum(-1), torch.ones(2, 4, 65))
