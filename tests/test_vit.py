"""Patches as players: who plays, what erasing does to pixels, where a map points, which images and models are
refused.
"""

import io

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import average_precision_score
from torch.testing import assert_close
from transformers import (
    BeitConfig,
    BeitForImageClassification,
    DeiTConfig,
    DeiTForImageClassification,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersForImageClassification,
    LevitConfig,
    LevitForImageClassification,
    SiglipConfig,
    SiglipForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from helpers import baselines, images, plots
from helpers.attention import read_attention
from helpers.faithfulness import KS, erase, erased_probabilities, erasure_curves, erasure_scores
from helpers.images import patch_grid, patch_players
from helpers.localisation import localise, patches_inside
from helpers.models import load_image_classifier
from helpers.shapley import GAMES, WEIGHTINGS, attention_shapley, pairwise_matrix
from tests.conftest import SPREAD

PATCH, ROWS, COLUMNS = 4, 4, 4
PREFIX = {"vit": 1, "deit": 2, "dinov2": 1, "dinov2_with_registers": 5}


def build(kind):
    """Return a random classifier of 16 × 16 pixels in 4 × 4 patches, eager and frozen."""
    torch.manual_seed(1)
    common = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": PATCH,
    }
    common |= {"num_labels": 3, "initializer_range": SPREAD, "intermediate_size": 24}
    config, kind_of_model = {
        "vit": (ViTConfig, ViTForImageClassification),
        "deit": (DeiTConfig, DeiTForImageClassification),
        "dinov2": (Dinov2Config, Dinov2ForImageClassification),
        "dinov2_with_registers": (Dinov2WithRegistersConfig, Dinov2WithRegistersForImageClassification),
    }[kind]
    options = {"num_register_tokens": 4} if "registers" in kind else {}
    model = kind_of_model._from_config(config(**common, **options), attn_implementation="eager")
    return model.eval().requires_grad_(False)


@pytest.fixture(params=sorted(PREFIX))
def model(request):
    """Each architecture in turn."""
    return build(request.param)


@pytest.fixture
def vit():
    return build("vit")


def pixels(count=2, seed=0, size=16):
    return {"pixel_values": torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))}


class RedAtCorner(torch.nn.Module):
    """A "model" that knows one thing: the red of the patch in the second row, third column."""

    def __init__(self, vit, down=1, right=2):
        super().__init__()
        self.config, self.base_model, self.weight = (
            vit.config,
            vit.base_model,
            torch.nn.Parameter(torch.zeros(1)),
        )
        self.place = (
            slice(None),
            0,
            slice(down * PATCH, (down + 1) * PATCH),
            slice(right * PATCH, (right + 1) * PATCH),
        )
        self.eval()

    device = property(lambda self: self.weight.device)
    dtype = property(lambda self: self.weight.dtype)
    set_attn_implementation = lambda self, name: None

    def forward(self, pixel_values):
        red = pixel_values[self.place].mean((-2, -1))
        logits = torch.stack([red, -red, torch.zeros_like(red)], -1)
        return type("Output", (), {"logits": logits})()


# Players


def test_players_are_all_tokens_but_the_prefix_of_each_architecture(model):
    inputs = pixels()
    players, maps = patch_players(model, inputs), read_attention(model, inputs)
    prefix = PREFIX[model.config.model_type]
    assert players.shape == maps.weights.shape[:1] + maps.weights.shape[-1:]
    assert players.tolist() == [[False] * prefix + [True] * 16] * 2
    assert patch_grid(model, (16, 16)) == (prefix, ROWS, COLUMNS)


@pytest.mark.parametrize("registers", [0, 1, 7])
def test_prefix_is_counted_on_the_model_not_on_its_name(registers):
    config = Dinov2WithRegistersConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=PATCH,
        num_register_tokens=registers,
    )
    model = Dinov2WithRegistersForImageClassification._from_config(config, attn_implementation="eager").eval()
    assert patch_grid(model, (16, 16))[0] == 1 + registers
    model.config.num_register_tokens = 3  # the name says so, the weights do not
    assert patch_grid(model, (16, 16))[0] == 1 + registers


def test_wide_image_has_its_rows_and_columns_the_right_way_round():
    model = build("dinov2")  # interpolates its positions
    inputs = {"pixel_values": torch.zeros(1, 3, 8, 24)}
    assert patch_grid(model, (8, 24)) == (1, 2, 6)
    assert patch_players(model, inputs).sum() == 12 and read_attention(model, inputs).weights.shape[-1] == 13
    assert images.patch_maps(model, inputs, torch.arange(13.0)[None]).tolist() == [
        [[1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11, 12]]
    ]
    with pytest.raises(ValueError, match="values of 12 tokens do not fit images of 13"):
        images.patch_maps(model, inputs, torch.arange(12.0)[None])


# Erasing patches


@pytest.mark.parametrize("place", [(0, 0), (1, 2), (3, 0), (3, 3)])
@pytest.mark.parametrize("operator", ["mask", "mean", "blur", "noise"])
def test_erasing_a_patch_changes_its_own_pixels_and_no_other(model, place, operator):
    inputs, (down, right) = pixels(1), place
    prefix = PREFIX[model.config.model_type]
    keep = torch.ones(1, prefix + 16, dtype=torch.bool)
    keep[0, prefix + down * COLUMNS + right] = False
    erased = erase(model, inputs, torch.tensor([0]), keep, None, operator)["pixel_values"]
    changed = (erased != inputs["pixel_values"]).all(1)[0]
    expected = torch.zeros(16, 16, dtype=torch.bool)
    expected[down * PATCH : (down + 1) * PATCH, right * PATCH : (right + 1) * PATCH] = True
    assert torch.equal(changed, expected)
    assert torch.equal((erased != inputs["pixel_values"]).any(1)[0], expected)


def test_mean_paints_the_given_colour_and_zero_by_default(vit):
    inputs, keep = pixels(1), torch.zeros(1, 17, dtype=torch.bool)
    colour = torch.tensor([0.1, -0.2, 0.3])
    painted = erase(vit, inputs, torch.tensor([0]), keep, colour, "mean")["pixel_values"]
    assert_close(painted, colour[None, :, None, None].expand(1, 3, 16, 16))
    assert erase(vit, inputs, torch.tensor([0]), keep, None)["pixel_values"].abs().max() == 0


def test_blur_keeps_a_flat_image_and_the_mean_and_takes_texture_away():
    flat = torch.full((1, 3, 16, 16), 0.7)
    assert_close(images.replacement_pixels(flat, operator="blur", width=2), flat)
    stripes = torch.tensor([1.0, -1.0]).repeat(16).expand(1, 3, 32, 32)
    assert images.replacement_pixels(stripes, operator="blur", width=4)[..., 8:-8, 12:-12].abs().max() < 0.01
    step = torch.cat([torch.zeros(1, 1, 32, 16), torch.ones(1, 1, 32, 16)], -1)
    blurred = images.replacement_pixels(step, operator="blur", width=3)
    normal = torch.distributions.Normal(0, 3).cdf(torch.arange(-15.5, 16))  # what a Gaussian makes of a step
    assert_close(blurred[0, 0, 5], normal, atol=0.01, rtol=0)


def test_noise_is_the_same_for_an_image_alone_and_among_others_and_has_its_spread():
    many = pixels(3)["pixel_values"] * torch.tensor([1.0, 2.0, 3.0])[:, None, None, None]
    noise = images.replacement_pixels(many, operator="noise")
    assert_close(noise[2:], images.replacement_pixels(many[2:], operator="noise"))
    assert noise[2].std() / noise[0].std() == pytest.approx(3, rel=0.1)
    coloured = images.replacement_pixels(many, torch.tensor([5.0, 0, 0]), "noise")
    assert_close((coloured - noise).mean((0, 2, 3)), torch.tensor([5.0, 0, 0]), atol=1e-5, rtol=0)


def test_unknown_operator_names_those_of_patches(vit):
    whole = torch.ones(1, 17, dtype=torch.bool)
    with pytest.raises(ValueError, match="operator 'delete' is unknown; use one of mask, mean, blur, noise"):
        erased_probabilities(vit, pixels(1), torch.tensor([0]), whole, None, "delete")


def test_prefix_tokens_are_never_erased_and_such_copies_run_once(model):
    inputs, passed = pixels(1), []
    keep = torch.ones(3, PREFIX[model.config.model_type] + 16, dtype=torch.bool)
    keep[1, 0] = False
    keep[2, -1] = False
    model.register_forward_hook(lambda module, args, output: passed.append(len(output.logits)))
    whole, without_cls, without_patch = erased_probabilities(
        model, inputs, torch.tensor([0, 0, 0]), keep, None
    )
    assert torch.equal(whole, without_cls) and not torch.equal(whole, without_patch) and sum(passed) == 2


def test_whole_image_has_the_probabilities_of_the_model(model):
    inputs = pixels(3)
    whole = torch.ones_like(patch_players(model, inputs))
    probabilities = erased_probabilities(model, inputs, torch.arange(3), whole, None)
    assert_close(probabilities, model(**inputs).logits.softmax(-1), rtol=1e-4, atol=1e-5)


# Curves and scores


def curves_of(model, count=3, operator="mean", ks=(0, 10, 20, 50, 100), **options):
    inputs = pixels(count)
    players = patch_players(model, inputs)
    rows = torch.stack([baselines.random_attributions(players, seed) for seed in (0, 1)])
    return inputs, players, rows, erasure_curves(model, inputs, rows, players, None, ks, operator, **options)


@pytest.mark.parametrize("operator", ["mean", "blur", "noise"])
def test_deleting_every_patch_equals_inserting_none(model, operator):
    *_, curves = curves_of(model, operator=operator)
    assert_close(curves.without[..., -1], curves.alone[..., 0], rtol=0, atol=0)
    assert_close(curves.without[..., 0], curves.probability.expand(2, -1), rtol=0, atol=0)
    assert_close(curves.alone[..., -1], curves.probability.expand(2, -1), rtol=0, atol=0)
    assert (curves.without[..., -1] - curves.probability).abs().max() > 0.01  # erasing does something


def test_curves_hold_the_probability_of_images_erased_by_hand(vit):
    inputs, players, rows, curves = curves_of(vit)
    for row, image in ((0, 0), (1, 2)):
        order = rows[row, image, 1:].argsort(descending=True)
        for at, size in ((1, 2), (2, 4), (3, 8)):  # ⌈10 %⌉, ⌈20 %⌉ and 50 % of 16
            without = inputs["pixel_values"][image : image + 1].clone()
            alone = torch.zeros_like(without)
            for patch in order[:size].tolist():
                place = (
                    ...,
                    slice(patch // 4 * 4, patch // 4 * 4 + 4),
                    slice(patch % 4 * 4, patch % 4 * 4 + 4),
                )
                alone[place] = without[place]
                without[place] = 0
            target = vit(pixel_values=inputs["pixel_values"]).logits[image].argmax()
            for found, picture in ((curves.without, without), (curves.alone, alone)):
                expected = vit(pixel_values=picture).logits.softmax(-1)[0, target]
                assert_close(found[row, image, at], expected, rtol=1e-4, atol=1e-5)


def test_areas_are_those_of_the_trapezoids():
    vit = build("vit")
    *_, curves = curves_of(vit, ks=(0, 50, 100))
    start, middle, end = curves.without.unbind(-1)
    assert_close(curves.deletion_area, 0.25 * start + 0.5 * middle + 0.25 * end)
    start, middle, end = curves.alone.unbind(-1)
    assert_close(curves.insertion_area, 0.25 * start + 0.5 * middle + 0.25 * end)


@pytest.mark.parametrize("operator", ["mean", "noise"])
def test_scores_taken_from_a_curve_are_those_scored_alone(model, operator):
    inputs, players, rows, curves = curves_of(model, operator=operator, ks=(100, 0, 40, 10, 50, 20))
    taken, alone = curves.scores(KS), erasure_scores(model, inputs, rows, players, None, KS, operator)
    for name in ("comprehensiveness", "sufficiency", "probability"):
        assert_close(getattr(taken, name), getattr(alone, name), rtol=1e-5, atol=1e-6)
    assert torch.equal(taken.kept_predictions, alone.kept_predictions)
    with pytest.raises(ValueError, match="not at all of"):
        curves.scores((0, 30))


def test_images_together_score_as_each_alone_and_methods_share_their_copies(vit):
    inputs, players, rows, curves = curves_of(vit)
    for image in range(3):
        one = {"pixel_values": inputs["pixel_values"][image : image + 1]}
        alone = erasure_curves(vit, one, rows[:, image : image + 1], players[:1], None, curves.ks, "mean")
        assert_close(curves.without[:, image : image + 1], alone.without, rtol=1e-4, atol=1e-5)
    passed = []
    vit.register_forward_hook(lambda module, args, output: passed.append(len(output.logits)))
    erasure_curves(vit, inputs, rows[:1].expand(5, -1, -1), players, None, curves.ks)
    assert sum(passed) == 3 * 8  # whole, none, and two for each of three ks; the same for five methods


# Baselines


def test_baselines_find_the_planted_patch_in_its_place(vit):
    planted, inputs = RedAtCorner(vit), pixels(2)
    inputs["pixel_values"][:, 0, 4:8, 8:12] = 2.0
    players = patch_players(vit, inputs)
    found = {
        "leave-one-out": baselines.leave_one_out(planted, inputs, players, None),
        "integrated gradients": baselines.integrated_gradients(planted, inputs, players, None, n_steps=8),
        "sampled": baselines.shapley_input_sampled(planted, inputs, players, None, n_permutations=2),
    }
    drop = torch.tensor([2.0, -2.0, 0]).softmax(-1)[0] - 1 / 3
    for name, values in found.items():
        expected = torch.zeros(2, 4, 4)
        expected[:, 1, 2] = drop
        assert_close(images.patch_maps(vit, inputs, values), expected, atol=2e-3, rtol=0, msg=name)
        assert not values[:, 0].any()


def test_integrated_gradients_sum_to_the_probability_gained_over_the_flat_colour(vit):
    inputs, colour = pixels(2), torch.tensor([0.3, -0.1, 0.2])
    players = patch_players(vit, inputs)
    values = baselines.integrated_gradients(vit, inputs, players, colour, target=1, n_steps=200)
    flat = {"pixel_values": colour[None, :, None, None].expand(1, 3, 16, 16)}
    gained = vit(**inputs).logits.softmax(-1)[:, 1] - vit(**flat).logits.softmax(-1)[:, 1]
    assert_close(values.sum(-1), gained, atol=2e-3, rtol=0)


def test_exact_and_sampled_shapley_of_the_input_are_efficient_and_agree():
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=8,
        patch_size=4,
        num_labels=3,
        initializer_range=SPREAD,
    )
    small, inputs = (
        ViTForImageClassification._from_config(config, attn_implementation="eager").eval(),
        pixels(2, size=8),
    )
    players = patch_players(small, inputs)
    exact = baselines.shapley_input(small, inputs, players, None, target=0)
    sampled = baselines.shapley_input_sampled(small, inputs, players, None, target=0, n_permutations=300)
    whole = erased_probabilities(small, inputs, torch.arange(2), players, None)[:, 0]
    none = erased_probabilities(small, inputs, torch.arange(2), ~players, None)[:, 0]
    assert_close(exact.sum(-1), whole - none, atol=1e-5, rtol=0)
    assert_close(sampled.sum(-1), whole - none, atol=1e-5, rtol=0)
    assert_close(sampled, exact, atol=0.005, rtol=0)
    assert exact.abs().max() > 0.04


# Orientation


@pytest.mark.parametrize("kind", sorted(PREFIX))
def test_patch_that_all_tokens_look_at_comes_out_at_its_place_in_every_game(kind):
    """Attention is planted: every query of every head looks at the patch in row 1, column 2."""
    model, inputs = build(kind), pixels(1)
    maps, players = read_attention(model, inputs, gradients=True), patch_players(model, inputs)
    at = PREFIX[kind] + 1 * COLUMNS + 2
    maps.weights[...] = 0.2 / (maps.weights.shape[-1] - 1)
    maps.weights[..., at] = 0.8
    maps.gradients[...] = 1.0
    matrices = [pairwise_matrix(maps, weighting) for weighting in WEIGHTINGS]
    rows = [attention_shapley(matrix, players, game) for matrix in matrices for game in GAMES]
    for values in [*rows, baselines.attention_received(maps), baselines.attention_rollout(maps)]:
        heatmap = images.patch_maps(model, inputs, values * players)[0]
        assert (heatmap == heatmap.max()).nonzero().tolist() == [[1, 2]]


def test_grad_sam_points_at_the_query_whose_gradient_was_planted(vit):
    inputs = pixels(1)
    maps = read_attention(vit, inputs, gradients=True)
    maps.gradients[...] = 0
    maps.gradients[..., 1 + 3 * COLUMNS + 1, :] = 1
    heatmap = images.patch_maps(vit, inputs, baselines.grad_sam(maps))[0]
    assert (heatmap == heatmap.max()).nonzero().tolist() == [[3, 1]]


# Localisation


def test_patches_are_inside_from_half_of_their_pixels_on(vit):
    mask = np.zeros((1, 16, 16), bool)
    mask[0, 4:8, 8:12] = True  # row 1, column 2, whole
    mask[0, 12:16, 0:2] = True  # row 3, column 0, half
    mask[0, 0:3, 0:2] = True  # row 0, column 0, six of sixteen pixels
    inside = patches_inside(vit, pixels(1), mask)
    assert inside[0].nonzero().flatten().tolist() == [1 + 6, 1 + 12]
    assert patches_inside(vit, pixels(1), mask, at_least=1e-3)[0].nonzero().flatten().tolist() == [1, 7, 13]
    doubled = mask.repeat(2, 1).repeat(2, 2)  # a mask of another size
    assert torch.equal(patches_inside(vit, pixels(1), doubled), inside)


def test_localisation_by_hand():
    players = torch.tensor([[False, True, True, True, True]])
    inside = torch.tensor([[False, True, False, True, False]])
    rows = [9.0, 4.0, 3.0, 1.0, -2.0], [9.0, 1.0, 4.0, 4.0, 0.0], [9.0, -1.0, 2.0, -3.0, 0.0]
    attributions = torch.tensor(rows)[:, None]
    found = localise(attributions, players, inside)
    assert_close(found.chance, torch.tensor([0.5]))
    assert_close(found.pointing[:, 0], torch.tensor([1.0, 0.5, 0.0]))  # the second: a tie, one of two inside
    assert_close(found.mass_inside[:, 0], torch.tensor([5 / 8, 5 / 9, 0.0]))
    # ranks of the inside patches: 1 and 3; tied 1-2 and 3; 3 and 4
    expected = torch.tensor([(1 / 1 + 2 / 3) / 2, (1 / 2 + 2 / 3) / 2, (1 / 3 + 2 / 4) / 2])
    assert_close(found.average_precision[:, 0].float(), expected)
    assert found.average_precision[0, 0] == pytest.approx(
        average_precision_score([1, 0, 1, 0], [4, 3, 1, -2])
    )


def test_constant_map_scores_chance_everywhere():
    players = torch.arange(17)[None] > 0
    inside = torch.arange(17)[None] > 12
    found = localise(torch.ones(1, 17), players, inside)
    for measure in (found.pointing, found.average_precision, found.mass_inside):
        assert measure.item() == pytest.approx(0.25)


def test_map_without_a_positive_value_puts_nothing_inside():
    players = torch.ones(1, 4, dtype=torch.bool)
    found = localise(-torch.ones(1, 4), players, torch.tensor([[True, False, False, False]]))
    assert found.mass_inside.item() == 0


@pytest.mark.parametrize("inside", [[False] * 5, [False, True, True, True, True]])
def test_mask_without_a_patch_or_of_all_patches_is_refused(inside):
    players = torch.tensor([[False, True, True, True, True]])
    with pytest.raises(ValueError, match="the mask of image 0 holds"):
        localise(torch.rand(1, 5), players, torch.tensor([inside]))
    with pytest.raises(ValueError, match="NaN"):
        localise(torch.full((1, 5), torch.nan), players, torch.tensor([[False, True, False, False, False]]))


# Images that people bring


def save(path, image=None, content=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    if image is None:
        path.write_bytes(content)
    else:
        image.save(path)


def test_folder_is_read_with_subfolders_in_order_and_hidden_files_passed_over(tmp_path):
    for name, shade in (("zebra/b.png", 10), ("a.jpg", 200), ("horse/c.png", 90)):
        save(tmp_path / name, Image.new("RGB", (8, 8), (shade, 0, 0)))
    save(tmp_path / ".DS_Store", content=b"junk")
    save(tmp_path / ".cache/d.png", content=b"junk")
    found = images.load_images(tmp_path)
    assert list(found) == ["a.jpg", "horse/c.png", "zebra/b.png"]
    assert found["zebra/b.png"].getpixel((0, 0)) == (10, 0, 0)
    two = images.load_images(tmp_path, 2, seed=3)
    assert list(two) == list(images.load_images(tmp_path, 2, seed=3)) and len(two) == 2


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("L", 77, (77, 77, 77)),
        ("RGBA", (10, 20, 30, 255), (10, 20, 30)),
        ("RGBA", (10, 20, 30, 0), (255, 255, 255)),
        ("LA", (50, 255), (50, 50, 50)),
        ("P", 0, None),
        ("CMYK", (0, 0, 0, 0), (255, 255, 255)),
        ("1", 1, (255, 255, 255)),
    ],
)
def test_every_colour_mode_becomes_rgb(tmp_path, mode, colour, expected):
    save(tmp_path / ("image.tif" if mode == "CMYK" else "image.png"), Image.new(mode, (8, 8), colour))
    [image] = images.load_images(tmp_path).values()
    assert image.mode == "RGB" and (expected is None or image.getpixel((3, 3)) == expected)


def jpeg(size=64):
    noise = np.random.default_rng(0).integers(0, 255, (size, size, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "jpeg")
    return buffer.getvalue()


@pytest.mark.parametrize("content", [b"just words", b"", jpeg()[:700], jpeg()[:-400]])
def test_file_that_is_no_whole_image_is_skipped_with_a_note(tmp_path, content):
    save(tmp_path / "good.png", Image.new("RGB", (8, 8)))
    save(tmp_path / "photo.jpg", content=content)
    reason = (
        r"skipped 1 unreadable files \(photo.jpg\): 'photo\.jpg' is not a whole image .*; replace or remove"
    )
    with pytest.warns(UserWarning, match=reason):
        assert list(images.load_images(tmp_path)) == ["good.png"]
    with pytest.warns(
        UserWarning, match="photo.jpg"
    ):  # the one that is asked for is the one that can be read
        assert [list(images.load_images(tmp_path, 1, seed)) for seed in range(4)] == [["good.png"]] * 4


def test_sixteen_bit_image_is_named_and_not_clipped_to_white(tmp_path):
    save(tmp_path / "scan.png", Image.fromarray(np.full((8, 8), 30_000, np.uint16)))
    with pytest.raises(ValueError, match=r"'scan\.png' has I;16 pixels; save it with 8 bits"):
        images.load_images(tmp_path)


def test_photo_is_turned_upright(tmp_path):
    image = Image.new("RGB", (16, 8), "blue")
    exif = image.getexif()
    exif[0x0112] = 6  # the camera was held upright
    image.save(tmp_path / "portrait.jpg", exif=exif)
    [image] = images.load_images(tmp_path).values()
    assert image.size == (8, 16)


def test_folder_is_found_from_the_working_directory_too(tmp_path, monkeypatch):
    save(tmp_path / "my" / "good.png", Image.new("RGB", (8, 8)))
    monkeypatch.chdir(tmp_path)
    assert list(images.load_images("my")) == ["good.png"]


def test_missing_and_empty_folders_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="folder .*nowhere' does not exist"):
        images.load_images(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="has 0 images and needs at least 1"):
        images.load_images(tmp_path)


@pytest.fixture
def processor():
    return ViTImageProcessor(
        size={"height": 16, "width": 16}, image_mean=[0.2, 0.4, 0.6], image_std=[0.5, 0.25, 0.1]
    )


def test_encoding_and_looking_again_give_the_same_picture(vit, processor):
    picture = np.random.default_rng(0).integers(0, 255, (16, 16, 3), np.uint8)
    inputs = images.encode_images([picture, Image.fromarray(picture)], processor, vit)
    assert torch.equal(inputs["pixel_values"][0], inputs["pixel_values"][1])
    np.testing.assert_allclose(images.seen_images(inputs, processor)[0], picture / 255, atol=1e-5)
    with pytest.raises(ValueError, match="no image to explain"):
        images.encode_images([], processor, vit)


def test_processor_whose_size_does_not_divide_is_refused(vit):
    odd = ViTImageProcessor(size={"height": 18, "width": 16})
    with pytest.raises(ValueError, match="images of 18 × 16 pixels do not divide into patches of 4"):
        images.encode_images([np.zeros((16, 16, 3), np.uint8)], odd, vit)


# Models that cannot be explained


def unsupported():
    swin = {
        "image_size": 32,
        "patch_size": 4,
        "embed_dim": 8,
        "depths": [1, 1],
        "num_heads": [1, 1],
        "window_size": 4,
    }
    vision = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 4,
    }
    text = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 99,
        "intermediate_size": 16,
    }
    yield "swin has windowed attention", SwinForImageClassification(SwinConfig(**swin))
    siglip = SiglipConfig(vision_config=vision | {"intermediate_size": 16}, text_config=text)
    yield "siglip has no single patch_size", SiglipForImageClassification(siglip)
    vit = ViTConfig(**vision | {"image_size": 18}, intermediate_size=16)
    yield "images of 18 × 18 pixels do not divide into patches of 4", ViTForImageClassification(vit)


@pytest.mark.parametrize(("message", "model"), list(unsupported()), ids=["swin", "no cls", "size"])
def test_model_that_cannot_be_explained_is_named_with_what_is_supported(message, model, tmp_path):
    model.save_pretrained(tmp_path / "mine")
    with pytest.raises(ValueError, match=f"model '.*mine' cannot be explained here: .*{message}") as error:
        load_image_classifier(str(tmp_path / "mine"))
    assert "use a ViT, DeiT or DINOv2 classifier" in str(error.value) or "resize" in str(error.value)


def test_model_without_classification_token_is_refused(vit):
    del vit.base_model.embeddings.cls_token
    with pytest.raises(
        ValueError, match="vit has no classification token; use a ViT, DeiT or DINOv2 classifier"
    ):
        patch_players(vit, pixels())


def test_beit_which_has_a_classification_token_still_works():
    config = BeitConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=16,
        patch_size=4,
        num_labels=3,
    )
    beit = BeitForImageClassification._from_config(config, attn_implementation="eager").eval()
    assert read_attention(beit, pixels()).weights.shape[-1] == patch_players(beit, pixels()).shape[-1] == 17


def test_levit_without_square_patches_is_refused():
    three = {
        "hidden_sizes": [16, 16, 16],
        "num_attention_heads": [1, 1, 1],
        "depths": [1, 1, 1],
        "key_dim": [8, 8, 8],
    }
    levit = LevitForImageClassification(LevitConfig(image_size=32, **three))
    with pytest.raises(ValueError, match="levit has no classification token"):
        patch_players(levit, {"pixel_values": torch.zeros(1, 3, 32, 32)})


# Drawing


@pytest.fixture
def picture():
    yield np.zeros((16, 16, 3), np.uint8)
    plt.close("all")


def drawn(axis):
    """The values that a heatmap shows, with its limits."""
    [image] = axis.get_images()
    return np.asarray(image.get_array()), image.get_clim()


def test_each_map_is_divided_by_its_own_largest_value_and_centred_on_zero(picture):
    first, second = np.array([[1.0, -2.0], [0.0, 4.0]]), np.array([[-0.1, 0.0], [0.0, 0.05]])
    figure, axes = plots.patch_heatmaps([("zebra", picture, {"Shapley-Att-CLS": first, "other": second})])
    assert axes.shape == (1, 3) and axes[0, 0].get_ylabel() == "zebra"
    for axis, values in ((axes[0, 1], first / 4), (axes[0, 2], second / 0.1)):
        shown, limits = drawn(axis)
        np.testing.assert_allclose(shown, values)
        assert limits == (-1, 1) and axis.get_images()[0].get_interpolation() == "nearest"
        assert axis.get_images()[0].get_extent() == [0, 16, 16, 0]  # the first row of patches is at the top
    white = axes[0, 1].get_images()[0].to_rgba(np.array([[0.0]]))[0, 0, :3]
    assert white.min() > 0.95 and len(figure.axes) == 4 and "attribution" in figure.axes[3].get_xlabel()


def test_shared_maps_of_a_column_keep_their_proportions(picture):
    rows = [
        ("before", picture, {"a": np.array([[2.0, 0]])}),
        ("after", picture, {"a": np.array([[-0.5, 0]])}),
    ]
    _, axes = plots.patch_heatmaps(rows, shared=True)
    assert [drawn(axis)[0].tolist() for axis in axes[:, 1]] == [[[1, 0]], [[-0.25, 0]]]


def test_unsigned_columns_have_a_scale_and_a_bar_of_their_own_and_outlines_stay_off_them(picture):
    rows = [("one", picture, {"a": np.eye(2), "patch norm": np.full((2, 2), 3.0)})]
    rows += [("two", picture, {"a": np.eye(2), "patch norm": np.full((2, 2), 6.0)})]
    mask = np.zeros((16, 16), bool)
    mask[4:8, 8:12] = True
    figure, axes = plots.patch_heatmaps(
        rows, outlines=[mask, mask], unsigned={"patch norm": "norm / largest"}
    )
    assert [drawn(axis)[0].max() for axis in axes[:, 2]] == [0.5, 1] and drawn(axes[0, 2])[1] == (0, 1)
    assert len(figure.axes) == 6 + 2 and "norm / largest" in [axis.get_xlabel() for axis in figure.axes]
    assert len(axes[0, 1].collections) == 1 and not axes[0, 2].collections
    border = np.concatenate([path.vertices for path in axes[0, 1].collections[0].get_paths()])
    np.testing.assert_allclose(
        [border.min(0), border.max(0)], [[8, 4], [12, 8]], atol=0.01
    )  # x right, y down


def test_map_of_zeros_is_drawn_white(picture):
    _, axes = plots.patch_heatmaps([("none", picture, {"a": np.zeros((2, 2))})])
    assert not drawn(axes[0, 1])[0].any()
