"""Erasure scores: the identities of the protocol, a plain implementation beside them, ties, and bad input."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import SENTENCES
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from helpers.baselines import random_attributions
from helpers.faithfulness import KS, OPERATORS, erase, erased_probabilities, erasure_scores, rationale
from helpers.runtime import measure_cost
from helpers.statistics import mean_interval
from helpers.text import encode, token_players

ROUNDING = {"rtol": 0, "atol": 1e-6}
seeds = st.integers(0, 2**16)


@pytest.fixture
def batch(model, tokenizer):
    """Three sentences of different lengths: (model, inputs, players, mask id)."""
    inputs = encode(SENTENCES, tokenizer, model)
    return model, inputs, token_players(inputs, tokenizer), tokenizer.mask_token_id


def only(inputs, row):
    """One sentence of a batch, without its padding."""
    length = int(inputs["attention_mask"][row].sum())
    return {name: tensor[row : row + 1, :length] for name, tensor in inputs.items()}


def seen_inputs(model):
    """A list that fills with the ids and attention mask of every forward pass."""
    seen = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(
            (kwargs["input_ids"].clone(), kwargs["attention_mask"].clone())
        ),
        with_kwargs=True,
    )
    return seen


# A plain implementation


def plain_probabilities(model, ids, gone, operator, mask_token_id):
    """Erase the positions `gone` from one sentence and ask the model, one forward pass."""
    ids, attention = list(ids), [1] * len(ids)
    if operator == "delete":
        ids = [token for position, token in enumerate(ids) if position not in gone]
        attention = [1] * len(ids)
    else:
        for position in gone:
            ids[position] = {"mask": mask_token_id, "pad": model.config.pad_token_id}.get(
                operator, ids[position]
            )
            attention[position] = int(operator != "attention_mask")
    return model(torch.tensor([ids]), attention_mask=torch.tensor([attention])).logits[0].softmax(-1)


def plain_scores(model, ids, attribution, players, operator, mask_token_id, ks=KS):
    """Comprehensiveness, sufficiency and kept predictions of one sentence without ties, k after k."""
    whole = plain_probabilities(model, ids, [], operator, mask_token_id)
    target, comp, suff, kept = whole.argmax(), 0.0, 0.0, []
    ranked = sorted(players, key=lambda position: -attribution[position])
    for k in ks:
        top = ranked[: -(-k * len(players) // 100)]
        rest = [position for position in players if position not in top]
        without = plain_probabilities(model, ids, top, operator, mask_token_id)
        alone = plain_probabilities(model, ids, rest, operator, mask_token_id)
        comp += (whole[target] - without[target]).item() / (len(ks) + 1)
        suff += (whole[target] - alone[target]).item() / (len(ks) + 1)
        kept.append(alone.argmax().item())
    return comp, suff, kept


@pytest.mark.parametrize("operator", OPERATORS)
def test_scores_equal_a_plain_loop_over_sentences(text_classifier, operator):
    model, tokenizer = text_classifier
    inputs = encode(SENTENCES, tokenizer, model)
    players, mask = token_players(inputs, tokenizer), tokenizer.mask_token_id
    attributions = random_attributions(players, seed=3) - 0.5 * players
    scores = erasure_scores(model, inputs, attributions, players, mask, operator=operator)
    for row in range(3):
        ids = only(inputs, row)["input_ids"][0].tolist()
        positions = players[row].nonzero().flatten().tolist()
        comp, suff, kept = plain_scores(model, ids, attributions[row].tolist(), positions, operator, mask)
        assert scores.comprehensiveness[row].item() == pytest.approx(comp, abs=1e-6)
        assert scores.sufficiency[row].item() == pytest.approx(suff, abs=1e-6)
        assert scores.kept_predictions[row].tolist() == kept
    assert scores.comprehensiveness.abs().min() > 1e-4


def test_probability_is_that_of_the_explained_class(batch):
    model, inputs, players, mask = batch
    own = model(**inputs).logits.softmax(-1)
    attributions = random_attributions(players)
    assert_close(
        erasure_scores(model, inputs, attributions, players, mask).probability, own.amax(-1), **ROUNDING
    )
    named = erasure_scores(model, inputs, attributions, players, mask, target="neutral")
    numbered = erasure_scores(model, inputs, attributions, players, mask, target=torch.tensor([0, 2, 1]))
    assert_close(named.probability, own[:, 2], **ROUNDING)
    assert_close(numbered.probability, own[[0, 1, 2], [0, 2, 1]], **ROUNDING)
    assert (named.comprehensiveness - numbered.comprehensiveness)[[0, 2]].abs().min() > 1e-4


# Identities


@pytest.mark.parametrize("operator", OPERATORS)
def test_all_erased_is_comprehensiveness_at_100_and_sufficiency_at_0(batch, operator):
    model, inputs, players, mask = batch
    attributions = random_attributions(players)
    at_100 = erasure_scores(model, inputs, attributions, players, mask, ks=(100,), operator=operator)
    at_0 = erasure_scores(model, inputs, attributions, players, mask, ks=(0,), operator=operator)
    assert torch.equal(at_100.comprehensiveness, at_0.sufficiency)
    assert at_0.sufficiency.abs().min() > 1e-4
    assert (at_0.comprehensiveness == 0).all() and (at_100.sufficiency == 0).all()


def test_divisor_is_the_number_of_ks_plus_one(batch):
    model, inputs, players, mask = batch
    attributions = random_attributions(players)
    one, two, both = (
        erasure_scores(model, inputs, attributions, players, mask, ks=ks) for ks in ((20,), (50,), (20, 50))
    )
    assert_close(
        3 * both.comprehensiveness, 2 * one.comprehensiveness + 2 * two.comprehensiveness, **ROUNDING
    )
    assert_close(3 * both.sufficiency, 2 * one.sufficiency + 2 * two.sufficiency, **ROUNDING)


def test_batched_equals_single(batch):
    model, inputs, players, mask = batch
    attributions = random_attributions(players)
    together = erasure_scores(model, inputs, attributions, players, mask)
    for row in range(3):
        alone = only(inputs, row)
        n = alone["input_ids"].shape[1]
        scores = erasure_scores(model, alone, attributions[[row], :n], players[[row], :n], mask)
        assert_close(together.comprehensiveness[[row]], scores.comprehensiveness, **ROUNDING)
        assert_close(together.sufficiency[[row]], scores.sufficiency, **ROUNDING)
        assert torch.equal(together.kept_predictions[[row]], scores.kept_predictions)


@pytest.mark.parametrize("batch_tokens", [1, 40, 10_000])
def test_probabilities_do_not_depend_on_the_size_of_batches(batch, batch_tokens):
    model, inputs, players, mask = batch
    rows = torch.tensor([2, 0, 1, 0, 2, 2])
    keep = random_attributions(players)[rows] > torch.linspace(0.2, 0.8, 6)[:, None]
    keep = keep | ~players[rows]
    plain = [
        plain_probabilities(
            model,
            only(inputs, row)["input_ids"][0].tolist(),
            (~kept).nonzero().flatten().tolist(),
            "mask",
            mask,
        )
        for row, kept in zip(rows.tolist(), keep, strict=True)
    ]
    found = erased_probabilities(model, inputs, rows, keep, mask, batch_tokens=batch_tokens)
    assert_close(found, torch.stack(plain), **ROUNDING)


def test_order_of_inputs_does_not_matter(batch):
    model, inputs, players, mask = batch
    attributions, order = random_attributions(players), [2, 0, 1]
    scores = erasure_scores(model, inputs, attributions, players, mask)
    shuffled = {name: tensor[order] for name, tensor in inputs.items()}
    moved = erasure_scores(model, shuffled, attributions[order], players[order], mask)
    assert_close(moved.comprehensiveness, scores.comprehensiveness[order], **ROUNDING)
    assert_close(moved.sufficiency, scores.sufficiency[order], **ROUNDING)


def test_methods_scored_together_equal_methods_scored_apart(batch):
    model, inputs, players, mask = batch
    methods = torch.stack([random_attributions(players, seed) for seed in range(4)])
    together = erasure_scores(model, inputs, methods, players, mask)
    for method, attributions in enumerate(methods):
        apart = erasure_scores(model, inputs, attributions, players, mask)
        assert_close(together.comprehensiveness[method], apart.comprehensiveness, **ROUNDING)
        assert_close(together.sufficiency[method], apart.sufficiency, **ROUNDING)
        assert torch.equal(together.kept_predictions[method], apart.kept_predictions)
        assert_close(together.probability, apart.probability, **ROUNDING)


# Cost


def test_equal_masked_inputs_of_all_methods_are_scored_once(batch):
    model, inputs, players, mask = batch
    attributions = random_attributions(players)
    with measure_cost(model) as one:
        erasure_scores(model, inputs, attributions, players, mask)
    methods = torch.stack([attributions, 3 * attributions, attributions + players])  # one ranking
    with measure_cost(model) as many:
        erasure_scores(model, inputs, methods, players, mask)
    assert many.forwards == one.forwards
    with measure_cost(model) as ends:
        erasure_scores(model, inputs, attributions, players, mask, ks=(0, 100))
    assert ends.forwards == 2 * 3 and ends.backwards == 0  # whole and all erased, each of three sentences


def test_copies_that_differ_only_at_padding_are_equal(batch):
    model, inputs, players, mask = batch
    keep = torch.stack([torch.ones(players.shape[1], dtype=torch.bool), inputs["attention_mask"][1].bool()])
    with measure_cost(model) as cost:
        found = erased_probabilities(model, inputs, torch.tensor([1, 1]), keep, mask)
    assert cost.forwards == 1 and torch.equal(found[0], found[1])


def test_no_batch_is_larger_than_allowed(batch):
    model, inputs, players, mask = batch
    lengths = inputs["attention_mask"].sum(-1)
    assert lengths.max() > 2 * lengths.min()
    rows = torch.tensor([1] * 7 + [2] * 2 + [0] * 2)
    keep = random_attributions(players)[rows] > torch.linspace(0.1, 0.9, 11)[:, None]
    seen = seen_inputs(model)
    erased_probabilities(model, inputs, rows, keep | ~players[rows], mask, batch_tokens=30)
    assert max(ids.numel() for ids, _ in seen) <= 30 and len(seen) < len(rows)


def test_where_memory_runs_out_copies_go_through_in_smaller_batches(batch):
    model, inputs, players, mask = batch[0], batch[1], batch[2], batch[3]
    keep = torch.rand(40, players.shape[1], generator=torch.Generator().manual_seed(0)) < 0.5
    rows = torch.arange(40) % len(players)
    expected = erased_probabilities(model, inputs, rows, keep, mask)

    def full_above_five(module, args, kwargs):
        if len(kwargs["input_ids"]) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    hook = model.register_forward_pre_hook(full_above_five, with_kwargs=True)
    with pytest.warns(UserWarning, match="do not fit into memory; going on with"):
        found = erased_probabilities(model, inputs, rows, keep, mask)
    hook.remove()
    assert_close(found, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("operator", OPERATORS)
def test_special_tokens_are_never_erased(batch, tokenizer, operator):
    model, inputs, players, mask = batch
    seen = seen_inputs(model)
    erasure_scores(
        model, inputs, random_attributions(players), players, mask, ks=(0, 50, 100), operator=operator
    )
    for ids, attention in seen:
        last = ids.shape[1] - 1 - attention.flip(-1).argmax(-1)
        assert (ids[:, 0] == tokenizer.cls_token_id).all() and (attention[:, 0] == 1).all()
        assert (ids[torch.arange(len(ids)), last] == tokenizer.sep_token_id).all()


def test_four_operators_on_two_tokens_by_hand(model, tokenizer):
    inputs = encode(["clever film"], tokenizer, model)
    cls, clever, film, sep = inputs["input_ids"][0].tolist()
    keep = torch.tensor([[True, False, True, True]])
    pad, mask = model.config.pad_token_id, tokenizer.mask_token_id
    by_hand = {
        "mask": ([cls, mask, film, sep], [1, 1, 1, 1]),
        "delete": ([cls, film, sep], [1, 1, 1]),
        "pad": ([cls, pad, film, sep], [1, 1, 1, 1]),
        "attention_mask": ([cls, clever, film, sep], [1, 0, 1, 1]),
    }
    for operator, (ids, attention) in by_hand.items():
        erased = erase(model, inputs, torch.tensor([0]), keep, mask, operator)
        real = len(ids)
        assert erased["input_ids"][0, :real].tolist() == ids
        assert erased["attention_mask"][0, :real].tolist() == attention
        assert erased["attention_mask"][0, real:].sum() == 0


# The rationale


def test_rationale_size_is_the_exact_ceiling_for_every_length_and_percent():
    players = torch.arange(1, 61)[:, None] > torch.arange(60)
    attributions = torch.rand(60, 60, dtype=torch.double, generator=torch.Generator().manual_seed(0)) - 0.5
    n = np.arange(1, 61)
    for k in range(101):
        np.testing.assert_array_equal(
            rationale(attributions, players, k).sum(-1).numpy(), -(-k * n // 100), f"k = {k}"
        )


def test_rationale_is_the_top_of_the_players_with_signs_counted():
    attributions = torch.tensor([[9.0, -3.0, 2.0, 0.0, -1.0, 9.0]])
    players = torch.tensor([[False, True, True, True, True, False]])
    chosen = [
        rationale(attributions, players, k)[0].nonzero().flatten().tolist() for k in (0, 1, 50, 51, 100)
    ]
    assert chosen == [[], [2], [2, 3], [2, 3, 4], [1, 2, 3, 4]]


@given(seed=seeds, k=st.integers(0, 100))
def test_rationale_moves_with_the_tokens_even_where_they_tie(seed, k):
    generator = torch.Generator().manual_seed(seed)
    attributions = torch.randint(4, (1, 12), generator=generator) / 3
    players, order = torch.rand(1, 12, generator=generator) < 0.8, torch.randperm(12, generator=generator)
    moved = rationale(attributions[:, order], players[:, order], k)
    assert torch.equal(moved, rationale(attributions, players, k)[:, order])


def test_players_that_tie_across_the_cut_are_all_left_out():
    attributions, players = torch.tensor([[0.5, 0.2, 0.2, 0.2, 0.1]]), torch.ones(1, 5, dtype=torch.bool)
    sizes = [rationale(attributions, players, k).sum().item() for k in (20, 40, 60, 80, 100)]
    assert sizes == [1, 1, 1, 4, 5]


def test_rounding_noise_is_a_tie_and_a_small_difference_is_not():
    players = torch.ones(1, 2, dtype=torch.bool)
    noise = torch.tensor([[0.1 + 0.2, 0.3]], dtype=torch.double)
    assert noise[0, 0] != noise[0, 1] and not rationale(noise, players, 50).any()
    assert not rationale(noise.flip(-1), players, 50).any() and rationale(noise, players, 100).all()
    assert rationale(torch.tensor([[0.3001, 0.3]]), players, 50).tolist() == [[True, False]]
    assert rationale(torch.tensor([[3.001e-20, 3e-20]]), players, 50).tolist() == [[True, False]]


def test_ranking_does_not_depend_on_the_unit():
    attributions, players = torch.tensor([[0.9, 0.1, 0.5, 0.4999, -0.2]]), torch.ones(1, 5, dtype=torch.bool)
    for scale in (1e-12, 1.0, 1e12):
        assert rationale(attributions * scale, players, 40)[0].nonzero().flatten().tolist() == [0, 2]


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("constant", [1.0, 0.0, -0.3])
def test_constant_attribution_has_exactly_zero_comprehensiveness(batch, constant, operator):
    model, inputs, players, mask = batch
    scores = erasure_scores(model, inputs, constant * players, players, mask, operator=operator)
    assert (scores.comprehensiveness == 0).all()
    all_erased = erasure_scores(model, inputs, constant * players, players, mask, ks=(0,), operator=operator)
    assert_close(scores.sufficiency * 5 / 4, all_erased.sufficiency * 2, **ROUNDING)  # all erased at every k


def test_attributions_of_nearly_one_everywhere_tie(batch):
    model, inputs, players, mask = batch
    nearly_one = players * (1 + 2e-7 * torch.randn(players.shape, generator=torch.Generator().manual_seed(0)))
    assert nearly_one[players].unique().numel() > 2
    assert (erasure_scores(model, inputs, nearly_one, players, mask).comprehensiveness == 0).all()


# Means and intervals


def test_interval_covers_the_true_mean_as_often_as_it_says():
    samples = np.random.default_rng(0).exponential(size=(60, 300))  # 300 studies of 60 inputs, true mean 1
    interval = mean_interval(samples, confidence=0.9)
    covered = ((interval["low"] <= 1) & (interval["high"] >= 1)).mean()
    assert 0.83 <= covered <= 0.93
    np.testing.assert_allclose(interval["mean"], samples.mean(0))
    normal = 2 * 1.645 * samples.std(0) / math.sqrt(60)
    assert abs(((interval["high"] - interval["low"]) / normal).mean() - 1) < 0.05


def test_interval_is_the_same_for_the_same_seed():
    scores = pd.DataFrame({"a": np.random.default_rng(1).normal(size=30)})
    pd.testing.assert_frame_equal(mean_interval(scores, seed=3), mean_interval(scores, seed=3))
    assert not mean_interval(scores, seed=3).equals(mean_interval(scores, seed=4))


def test_methods_share_their_resamples():
    a = np.random.default_rng(2).normal(size=40)
    interval = mean_interval(pd.DataFrame({"a": a, "shifted": a + 2, "mirrored": -a}))
    np.testing.assert_allclose(interval.loc["shifted"] - interval.loc["a"], 2)
    assert interval.loc["mirrored", "low"] == pytest.approx(-interval.loc["a", "high"], abs=1e-12)
    alone = mean_interval(pd.DataFrame({"a": a})).loc["a"]
    np.testing.assert_allclose(interval.loc["a"], alone)


def test_one_input_has_a_mean_and_no_interval():
    interval = mean_interval(pd.DataFrame({"a": [0.25]})).loc["a"]
    assert interval["mean"] == 0.25 and np.isnan(interval[["low", "high"]]).all()


# Bad input


@pytest.mark.parametrize("ks", [(), (-1,), (0, 101), (math.nan,)])
def test_percents_outside_0_to_100_are_refused(batch, ks):
    model, inputs, players, mask = batch
    with pytest.raises(ValueError, match="percents of the players, each from 0 to 100"):
        erasure_scores(model, inputs, random_attributions(players), players, mask, ks=ks)


def test_unknown_operator_is_named_with_the_known_ones(batch):
    model, inputs, players, mask = batch
    with pytest.raises(ValueError, match="'remove' is unknown; use one of mask, delete, pad, attention_mask"):
        erasure_scores(model, inputs, random_attributions(players), players, mask, operator="remove")


@pytest.mark.parametrize("shape", [(3, 4), (2, 9), (1, 1, 3, 9), (9,)])
def test_attributions_of_another_shape_are_refused(batch, shape):
    model, inputs, players, mask = batch
    with pytest.raises(ValueError, match="do not fit players"):
        erasure_scores(model, inputs, torch.zeros(shape), players, mask)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_attribution_at_a_player_is_refused_and_elsewhere_ignored(batch, bad):
    model, inputs, players, mask = batch
    attributions = random_attributions(players)
    scores = erasure_scores(model, inputs, attributions, players, mask)
    elsewhere = erasure_scores(model, inputs, attributions.masked_fill(~players, bad), players, mask)
    assert torch.equal(scores.comprehensiveness, elsewhere.comprehensiveness)
    attributions[1, 1] = bad
    with pytest.raises(ValueError, match="NaN or infinity"):
        erasure_scores(model, inputs, attributions, players, mask)


def test_input_without_players_is_named(batch):
    model, inputs, players, mask = batch
    players[2] = False
    with pytest.raises(ValueError, match="input 2 has no players"):
        erasure_scores(model, inputs, torch.zeros(players.shape), players, mask)
