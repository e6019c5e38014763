"""Input that would give wrong numbers is refused before anything is computed, with the way out."""

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import SENTENCES, build_text_classifier
from PIL import Image
from torch.testing import assert_close
from transformers import (
    AutoTokenizer,
    BertModel,
    GPT2Config,
    GPT2ForSequenceClassification,
    PreTrainedTokenizerFast,
    ViTImageProcessor,
)

from helpers import baselines, statistics
from helpers.attention import read_attention
from helpers.estimators import enumerate_shapley, published_sampling
from helpers.faithfulness import erasure_scores
from helpers.images import encode_images
from helpers.models import check_explainable, load_text_classifier
from helpers.shapley import attention_shapley, pairwise_matrix
from helpers.tcav import token_gradients
from helpers.text import encode, token_players


@pytest.fixture
def saved(tmp_path, model, tokenizer):
    """A folder with a model and its tokenizer, each test spoils a part of it."""
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def never_run(model, monkeypatch):
    """The model, whose forward pass fails the test."""
    monkeypatch.setattr(model, "forward", lambda *args, **kwargs: pytest.fail("a pass was run"))
    return model


# Models


def test_folder_without_tokenizer_files(saved):
    for path in [*saved.glob("tokenizer*"), *saved.glob("vocab*"), *saved.glob("special*")]:
        path.unlink()
    with pytest.raises(FileNotFoundError, match="has no tokenizer files, .*; copy tokenizer.json"):
        load_text_classifier(str(saved))


def test_checkpoint_without_its_head(saved, model):
    BertModel.from_pretrained(saved).save_pretrained(saved)
    with pytest.raises(
        ValueError, match="no weights for classifier.bias, classifier.weight, .* drawn at random"
    ):
        load_text_classifier(str(saved))


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"num_labels": 1}, "one output"),
        ({"problem_type": "multi_label_classification"}, "several labels at once"),
    ],
)
def test_models_without_one_class_among_others(tokenizer, tmp_path, change, found):
    model = build_text_classifier("bert", len(tokenizer))
    for name, value in change.items():
        setattr(model.config, name, value)
    if "num_labels" in change:
        model.classifier = torch.nn.Linear(32, 1)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"predicts {found}"):
        load_text_classifier(str(tmp_path))


def test_models_without_a_first_cls_token(tmp_path, tokenizer):
    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=2, num_labels=3, pad_token_id=0
    )
    GPT2ForSequenceClassification(config).save_pretrained(tmp_path)
    plain = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, pad_token="[PAD]")
    plain.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="puts no classification token first"):
        load_text_classifier(str(tmp_path))


def test_tokenizer_whose_cls_token_is_not_first(never_run, tokenizer):
    turned = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, cls_token="[SEP]", sep_token="[CLS]", pad_token="[PAD]"
    )
    with pytest.raises(ValueError, match="puts no classification token first"):
        encode(SENTENCES, turned, never_run)


def test_model_in_training_mode(model, tokenizer):
    inputs = encode(SENTENCES, tokenizer, model)
    players = token_players(inputs, tokenizer)
    model.train()
    for read in (
        lambda: read_attention(model, inputs),
        lambda: token_gradients(model, inputs),
        lambda: erasure_scores(model, inputs, players.float(), players, tokenizer.mask_token_id),
        lambda: baselines.integrated_gradients(model, inputs, players, tokenizer.mask_token_id),
        lambda: baselines.leave_one_out(model, inputs, players, tokenizer.mask_token_id),
    ):
        with pytest.raises(ValueError, match=r"is in training mode, .*model.eval\(\)"):
            read()


def test_gradients_inside_inference_mode(model, tokenizer):
    inputs = encode(SENTENCES, tokenizer, model)
    players = token_players(inputs, tokenizer)
    with torch.inference_mode():
        read_attention(model, inputs)
        for read in (
            lambda: read_attention(model, inputs, gradients=True),
            lambda: token_gradients(model, inputs),
            lambda: baselines.integrated_gradients(model, inputs, players, tokenizer.mask_token_id),
        ):
            with pytest.raises(ValueError, match=r"inside torch.inference_mode\(\)"):
                read()


# Inputs


@pytest.mark.parametrize("architecture", ["bert", "roberta"])
def test_padding_side_of_the_tokenizer_changes_no_number(
    architecture, tokenizer, roberta_tokenizer, tmp_path
):
    right = roberta_tokenizer if architecture == "roberta" else tokenizer
    right.save_pretrained(tmp_path)
    left = AutoTokenizer.from_pretrained(tmp_path, padding_side="left")
    model = build_text_classifier(architecture, len(right))
    assert left.padding_side == "left" and left(SENTENCES, padding=True)["attention_mask"][1][0] == 0
    found = []
    for one in (right, left):
        inputs = encode(SENTENCES, one, model)
        players, maps = token_players(inputs, one), read_attention(model, inputs, gradients=True)
        values = attention_shapley(pairwise_matrix(maps, "gradient"), players)
        scores = erasure_scores(model, inputs, values, players, one.mask_token_id)
        shap = baselines.shap_values(model, one, SENTENCES, max_evals=30)
        assert shap.abs().sum(-1).min() > 0
        found.append((maps.logits, players, values, scores.comprehensiveness, shap))
    for one, other in zip(*found, strict=True):
        assert_close(one, other)


def test_inputs_padded_on_the_left_by_hand(never_run, tokenizer):
    inputs = tokenizer(SENTENCES, padding=True, padding_side="left", return_tensors="pt")
    players = token_players(inputs, tokenizer)
    with pytest.raises(ValueError, match="padded on the left; .*padding_side='right'"):
        read_attention(never_run, inputs)
    with pytest.raises(ValueError, match="padded on the left"):
        erasure_scores(never_run, inputs, players.float(), players, tokenizer.mask_token_id)


def test_bare_string(never_run, tokenizer):
    with pytest.raises(ValueError, match="texts is one string, 'a film'; give a list of texts"):
        encode("a film", tokenizer, never_run)


def test_empty_batch(never_run, tokenizer):
    empty = {name: part[:0] for name, part in encode(SENTENCES, tokenizer, never_run).items()}
    with pytest.raises(ValueError, match="the batch is empty"):
        read_attention(never_run, empty)
    players = torch.zeros(0, 5, dtype=torch.bool)
    with pytest.raises(ValueError, match="the batch is empty"):
        erasure_scores(never_run, empty, players.float(), players, tokenizer.mask_token_id)


@pytest.mark.parametrize("batch", [np.zeros((2, 16, 16, 3)), [np.zeros((16, 16, 3), np.float32)]])
def test_float_images(image_model, batch):
    with pytest.raises(ValueError, match="image 0 holds float(32|64); give PIL images, or uint8 arrays"):
        encode_images(batch, ViTImageProcessor(size={"height": 16, "width": 16}), image_model)


@pytest.mark.parametrize("image", [Image.new("RGB", (16, 16)), np.zeros((16, 16, 3), np.uint8)])
def test_one_image_in_place_of_a_list(image_model, image):
    with pytest.raises(ValueError, match="images is one image; give a list"):
        encode_images(image, ViTImageProcessor(), image_model)


# Players, percents, scores


def test_no_token_to_mask_with(never_run, tokenizer):
    inputs = encode(SENTENCES, tokenizer, never_run)
    players = token_players(inputs, tokenizer)
    for method in (baselines.leave_one_out, baselines.integrated_gradients, baselines.shapley_input):
        with pytest.raises(ValueError, match="mask_token_id is None, .* delete, pad or attention_mask"):
            method(never_run, inputs, players, None, 0)
    with pytest.raises(ValueError, match="mask_token_id is None"):
        erasure_scores(never_run, inputs, players.float(), players, None)


def test_operators_without_a_mask_token_need_none(model, tokenizer):
    inputs = encode(SENTENCES, tokenizer, model)
    players = token_players(inputs, tokenizer)
    scores = erasure_scores(model, inputs, torch.rand(players.shape), players, None, operator="delete")
    assert torch.isfinite(scores.comprehensiveness).all()


def test_players_that_are_not_bool(never_run, tokenizer):
    inputs = encode(SENTENCES, tokenizer, never_run)
    numbers = token_players(inputs, tokenizer).long()
    matrix = torch.rand(*numbers.shape, numbers.shape[1])
    for use in (
        lambda: attention_shapley(matrix, numbers),
        lambda: published_sampling(matrix, numbers),
        lambda: erasure_scores(never_run, inputs, numbers.float(), numbers, tokenizer.mask_token_id),
        lambda: baselines.leave_one_out(never_run, inputs, numbers, tokenizer.mask_token_id),
        lambda: baselines.shapley_input(never_run, inputs, numbers, tokenizer.mask_token_id),
        lambda: baselines.integrated_gradients(never_run, inputs, numbers, tokenizer.mask_token_id),
    ):
        with pytest.raises(ValueError, match=r"players are bool \(batch, tokens\), not torch.int64"):
            use()


def test_players_that_are_special_tokens_only(never_run, tokenizer):
    inputs = encode(SENTENCES, tokenizer, never_run)
    special = inputs["attention_mask"].bool() & ~token_players(inputs, tokenizer)
    with pytest.raises(
        ValueError, match="players of input 0 are special tokens only; take those of token_players"
    ):
        erasure_scores(never_run, inputs, special.float(), special, tokenizer.mask_token_id)


@pytest.mark.parametrize("ks", [(0, 0.1, 0.2, 0.5), (1,), (0.0, 1.0)])
def test_percents_that_look_like_shares(never_run, tokenizer, ks):
    inputs = encode(SENTENCES, tokenizer, never_run)
    players = token_players(inputs, tokenizer)
    with pytest.raises(ValueError, match="look like shares; give 20 for a fifth"):
        erasure_scores(never_run, inputs, players.float(), players, tokenizer.mask_token_id, ks)


def test_fewer_than_one_permutation(never_run, tokenizer):
    inputs = encode(SENTENCES, tokenizer, never_run)
    players = token_players(inputs, tokenizer)
    with pytest.raises(ValueError, match="n_permutations must be at least 1, not 0"):
        baselines.shapley_input_sampled(
            never_run, inputs, players, tokenizer.mask_token_id, 0, n_permutations=0
        )


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_scores_that_are_no_numbers(bad):
    scores = pd.DataFrame({"good": [0.1, 0.2, 0.3], "bad": [0.1, bad, 0.2]})
    for use in (
        statistics.mean_interval,
        statistics.tied_with_best,
        lambda s: statistics.paired_tests(s, "good"),
    ):
        with pytest.raises(ValueError, match="1 inputs have no finite score of 'bad'; leave out"):
            use(scores)


def test_check_names_the_model(model):
    with pytest.raises(ValueError, match="^BertForSequenceClassification is in training mode"):
        check_explainable(model.train())


# Payoffs


def majority(coalitions):
    return (2 * coalitions.sum(-1) > coalitions.shape[1]).long()


def test_enumeration_of_a_payoff_of_whole_numbers_or_bools():
    expected = torch.full((3,), 1 / 3, dtype=torch.double)
    assert_close(enumerate_shapley(majority, 3), expected)
    assert_close(enumerate_shapley(lambda coalitions: majority(coalitions) > 0, 3), expected)
