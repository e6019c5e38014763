"""The explanations beside the games, each against a loop, a sum done by hand, or the axiom that it
promises.
"""

import copy
import itertools

import pytest
import torch
from conftest import SENTENCES
from torch.testing import assert_close

from helpers import baselines
from helpers.attention import AttentionMaps, read_attention
from helpers.faithfulness import OPERATORS
from helpers.runtime import measure_cost
from helpers.text import encode, token_players


@pytest.fixture
def maps():
    """Two inputs of 5 tokens, the second padded after 3, in 3 layers of 2 heads."""
    generator = torch.Generator().manual_seed(0)
    scores, gradients = torch.randn(2, 2, 3, 2, 5, 5, dtype=torch.double, generator=generator)
    real = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    weights = scores.masked_fill(~real[:, None, None, None], -torch.inf).softmax(-1)
    return AttentionMaps(torch.zeros(2, 2), torch.zeros(2).long(), weights, gradients, real)


@pytest.fixture
def batch(model, tokenizer):
    """Three sentences of different lengths: (model, inputs, players, mask id)."""
    inputs = encode(SENTENCES, tokenizer, model)
    return model, inputs, token_players(inputs, tokenizer), tokenizer.mask_token_id


def probability(model, inputs, row, masked=(), mask_token_id=None, target=None):
    """p of one sentence without padding, some positions masked: one plain forward pass."""
    ids = inputs["input_ids"][row, inputs["attention_mask"][row].bool()].clone()
    whole = model(ids[None]).logits[0].softmax(-1)
    ids[list(masked)] = mask_token_id or 0
    return model(ids[None]).logits[0].softmax(-1)[whole.argmax() if target is None else target].item()


def positions(players, row):
    return players[row].nonzero().flatten().tolist()


# From attention and gradients


def test_row_sum_is_one_for_every_token(maps):
    assert_close(baselines.attention_row_sum(maps), torch.ones(2, 5, dtype=torch.double))


def test_received_attention_is_the_mean_column_over_real_queries(maps):
    by_hand = torch.zeros(2, 5, dtype=torch.double)
    for row, n in enumerate((5, 3)):
        for layer, head, query, key in itertools.product(range(3), range(2), range(n), range(n)):
            by_hand[row, key] += maps.weights[row, layer, head, query, key] / (n * 3 * 2)
    assert_close(baselines.attention_received(maps), by_hand)
    assert_close(by_hand.sum(-1), torch.ones(2, dtype=torch.double))


def test_grad_sam_is_its_sum_over_layers_heads_and_keys(maps):
    by_hand = torch.zeros(2, 5, dtype=torch.double)
    for row, n in enumerate((5, 3)):
        for layer, head, i, j in itertools.product(range(3), range(2), range(5), range(n)):
            weight, slope = maps.weights[row, layer, head, i, j], maps.gradients[row, layer, head, i, j]
            by_hand[row, i] += weight * max(slope.item(), 0) / (3 * 2 * n)
    assert_close(baselines.grad_sam(maps), by_hand)


def test_rollout_is_the_cls_row_of_the_product_of_all_layers(maps):
    for row, n in enumerate((5, 3)):
        flow = torch.eye(n, dtype=torch.double)
        for layer in range(3):
            mean = maps.weights[row, layer, :, :n, :n].mean(0)
            flow = (mean + torch.eye(n)) / 2 @ flow
        for cls in range(n):
            found = baselines.attention_rollout(maps, cls)[row]
            assert_close(found[:n], flow[cls])
            assert (found[n:] == 0).all()


@pytest.mark.parametrize("method", ["attention_received", "attention_rollout"])
def test_padding_receives_nothing_from_a_model(batch, method):
    model, inputs, _, _ = batch
    found = getattr(baselines, method)(read_attention(model, inputs))
    assert (found[inputs["attention_mask"] == 0] == 0).all()
    assert_close(found.sum(-1), torch.ones(3))


def test_maps_without_padding_need_no_mask(maps):
    maps.weights, maps.gradients, maps.real = maps.weights[:1], maps.gradients[:1], None
    masked = AttentionMaps(
        maps.logits, maps.target, maps.weights, maps.gradients, torch.ones(1, 5, dtype=torch.bool)
    )
    assert torch.equal(baselines.grad_sam(maps), baselines.grad_sam(masked))
    assert torch.equal(baselines.attention_received(maps), baselines.attention_received(masked))


def test_grad_sam_without_gradients_says_how_to_get_them(maps):
    maps.gradients = None
    with pytest.raises(ValueError, match="gradients=True"):
        baselines.grad_sam(maps)


def test_random_rankings_follow_their_seed_and_stay_on_the_players(batch):
    players = batch[2]
    first, again, other = (baselines.random_attributions(players, seed) for seed in (1, 1, 2))
    assert torch.equal(first, again) and (first != other)[players].all()
    assert (first[~players] == 0).all() and first[players].unique().numel() == players.sum()


# From erased inputs


@pytest.mark.parametrize("operator", OPERATORS)
def test_leave_one_out_is_the_fall_of_the_probability(batch, operator):
    model, inputs, players, mask = batch
    found = baselines.leave_one_out(model, inputs, players, mask, operator=operator)
    assert (found[~players] == 0).all() and found[players].abs().min() > 0
    if operator == "mask":
        for row in range(3):
            p = probability(model, inputs, row)
            falls = [
                p - probability(model, inputs, row, [position], mask) for position in positions(players, row)
            ]
            assert found[row, players[row]].tolist() == pytest.approx(falls, abs=1e-6)


def test_shapley_input_of_two_tokens_by_hand(model, tokenizer):
    inputs = encode(["clever film", "a"], tokenizer, model)
    players, mask = token_players(inputs, tokenizer), tokenizer.mask_token_id
    found = baselines.shapley_input(model, inputs, players, mask)
    worth = {masked: probability(model, inputs, 0, masked, mask) for masked in ((), (1,), (2,), (1, 2))}
    clever = (worth[2,] - worth[1, 2] + worth[()] - worth[1,]) / 2
    film = (worth[1,] - worth[1, 2] + worth[()] - worth[2,]) / 2
    alone = probability(model, inputs, 1) - probability(model, inputs, 1, [1], mask)
    assert_close(found, torch.tensor([[0, clever, film, 0], [0, alone, 0, 0]]), rtol=0, atol=1e-6)
    assert abs(clever - film) > 1e-3


def test_shapley_input_shares_out_the_fall_from_whole_to_all_masked(batch):
    model, inputs, players, mask = batch
    for target in (None, 0):
        found = baselines.shapley_input(model, inputs, players, mask, target)
        for row in range(3):
            whole = probability(model, inputs, row, (), mask, target)
            rest = probability(model, inputs, row, positions(players, row), mask, target)
            assert found[row].sum().item() == pytest.approx(whole - rest, abs=1e-6)
        assert (found[~players] == 0).all()


def test_shapley_input_costs_two_to_the_players_forwards(batch):
    model, inputs, players, mask = batch
    with measure_cost(model) as cost:
        baselines.shapley_input(model, inputs, players, mask, target=1)
    assert cost.forwards == sum(2**n for n in players.sum(-1).tolist()) and cost.backwards == 0


def test_too_long_an_input_is_refused_before_any_forward_pass(batch):
    model, inputs, players, mask = batch
    with (
        measure_cost(model) as cost,
        pytest.raises(ValueError, match=r"input 2 has 10 players, 2\*\*10 forwards.*=9"),
    ):
        baselines.shapley_input(model, inputs, players, mask, max_players=9)
    assert cost.forwards == 0


# From gradients of the input


def test_integrated_gradients_follow_the_path_of_embeddings_by_hand(precise_model, tokenizer):
    model, mask = precise_model, tokenizer.mask_token_id
    inputs = encode(["clever film"], tokenizer, model)
    players = token_players(inputs, tokenizer)
    embed = model.get_input_embeddings()
    end, start = embed(inputs["input_ids"]), embed(inputs["input_ids"].masked_fill(players, mask))
    mean_slope, steps = torch.zeros_like(end), 400
    for step in range(steps):  # midpoints of the path
        point = (start + (step + 0.5) / steps * (end - start)).requires_grad_()
        logits = model(inputs_embeds=point, attention_mask=inputs["attention_mask"]).logits
        mean_slope += torch.autograd.grad(logits.softmax(-1)[0, 1], point)[0] / steps
    by_hand = (mean_slope * (end - start)).sum(-1)
    found = baselines.integrated_gradients(model, inputs, players, mask, target=1, n_steps=60)
    assert_close(found, by_hand, rtol=0, atol=1e-5)
    assert by_hand[players].abs().min() > 1e-3


def test_integrated_gradients_add_up_better_with_more_steps(batch):
    model, inputs, players, mask = batch
    fall = [
        probability(model, inputs, row) - probability(model, inputs, row, positions(players, row), mask)
        for row in range(3)
    ]
    coarse, fine = (
        (
            baselines.integrated_gradients(model, inputs, players, mask, n_steps=steps).sum(-1)
            - torch.tensor(fall)
        ).abs()
        for steps in (2, 64)
    )
    assert fine.max() < 2e-4 < coarse.max()


def test_integrated_gradients_go_on_in_smaller_passes_where_memory_runs_out(model, tokenizer, monkeypatch):
    inputs = encode(SENTENCES, tokenizer, model)
    players = token_players(inputs, tokenizer)
    expected = baselines.integrated_gradients(
        model, inputs, players, tokenizer.mask_token_id, target=1, n_steps=8
    )
    rows = []

    def full_above_two(module, args, kwargs):
        rows.append(len(kwargs["input_ids"]))
        if rows[-1] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    hook = model.register_forward_pre_hook(full_above_two, with_kwargs=True)
    monkeypatch.setattr(baselines, "GRADIENT_TOKENS", 1)  # one point of each input at a time
    with pytest.warns(UserWarning, match="^3 inputs at a time do not fit into memory; going on with 1$"):
        found = baselines.integrated_gradients(
            model, inputs, players, tokenizer.mask_token_id, target=1, n_steps=8
        )
    hook.remove()
    assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert rows[0] == 3 and set(rows[1:]) == {1}


def test_integrated_gradients_do_not_depend_on_the_batch(batch):
    model, inputs, players, mask = batch
    whole = baselines.integrated_gradients(model, inputs, players, mask, target=1, n_steps=8)
    halves = baselines.integrated_gradients(model, inputs, players, mask, target=1, n_steps=8, batch_size=2)
    assert_close(halves, whole, rtol=0, atol=1e-6)
    length = int(inputs["attention_mask"][1].sum())
    alone = {name: tensor[1:2, :length] for name, tensor in inputs.items()}
    single = baselines.integrated_gradients(model, alone, players[1:2, :length], mask, target=1, n_steps=8)
    assert_close(whole[1:2, :length], single, rtol=0, atol=1e-6)
    assert not whole.requires_grad and (whole[~players] == 0).all()


# SHAP


def test_shap_of_two_tokens_is_their_shapley_value(text_classifier):
    model, tokenizer = text_classifier
    texts = ["a film", "a"]
    inputs = encode(texts, tokenizer, model)
    players = token_players(inputs, tokenizer)
    assert players.sum(-1).tolist() == [2, 1]
    exact = baselines.shapley_input(model, inputs, players, tokenizer.mask_token_id, target=1)
    assert_close(baselines.shap_values(model, tokenizer, texts, target=1), exact, rtol=0, atol=1e-6)


def test_shap_shares_out_the_fall_and_is_zero_off_the_players(batch, tokenizer):
    model, inputs, players, mask = batch
    found = baselines.shap_values(model, tokenizer, SENTENCES)
    assert (found[~players] == 0).all() and (found[players] != 0).all()
    for row in range(3):
        fall = probability(model, inputs, row) - probability(
            model, inputs, row, positions(players, row), mask
        )
        assert found[row].sum().item() == pytest.approx(fall, abs=1e-5)


def test_shap_of_a_cut_text_explains_the_part_that_was_read(model, tokenizer):
    short_sighted = copy.deepcopy(tokenizer)
    short_sighted.model_max_length = 6
    with pytest.warns(UserWarning, match="text 0: explained 6 of 9 tokens"):
        cut = baselines.shap_values(model, short_sighted, SENTENCES[:1], target=1)
    assert_close(
        cut, baselines.shap_values(model, tokenizer, ["a clever but not"], target=1), rtol=0, atol=1e-6
    )


def test_each_input_of_a_later_batch_is_explained_for_its_own_class(batch):
    model, inputs, players, mask = batch
    target = torch.tensor([2, 0, 1])
    whole = baselines.integrated_gradients(model, inputs, players, mask, target, n_steps=4)
    parts = baselines.integrated_gradients(model, inputs, players, mask, target, n_steps=4, batch_size=1)
    other = baselines.integrated_gradients(model, inputs, players, mask, target.flip(0), n_steps=4)
    assert_close(parts, whole, rtol=1e-4, atol=1e-5)
    assert (whole - other).abs().sum(-1)[[0, 2]].min() > 1e-3


def test_seeds_of_sampled_orders_do_not_overlap(model, tokenizer):
    inputs = encode([SENTENCES[0]] * 2, tokenizer, model)
    players = token_players(inputs, tokenizer)
    first, second = (
        baselines.shapley_input_sampled(
            model, inputs, players, tokenizer.mask_token_id, n_permutations=1, seed=seed
        )
        for seed in (0, 1)
    )
    assert not torch.equal(first[1], second[0]) and not torch.equal(first[0], first[1])
