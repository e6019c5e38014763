"""Weights are drawn anew from the head down, in a copy; ranks are compared over players alone."""

import math
import re

import pytest
import torch
from conftest import SENTENCES, SPREAD
from scipy.stats import spearmanr

from helpers.sanity import randomisation_cascade, rank_correlations
from helpers.text import encode, token_players


def move_away(model):
    """Shift all weights, as training would: then also biases and norms differ from those of an untrained
    model.
    """
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    return model


def step_of(name):
    """Return the step that draws a weight anew, read from the weight's name."""
    if layer := re.search(r"\.layers?\.(\d+)\.", name):
        return f"layer {layer[1]}"
    return "embeddings" if "embeddings" in name else "head"


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def check_cascade(model):
    before = weights(move_away(model))
    layers = [f"layer {number}" for number in reversed(range(model.config.num_hidden_layers))]
    order = ["head", *layers, "embeddings"]
    names = [name for name, _ in model.named_parameters()]
    assert {step_of(name) for name in names} == set(order)
    seen, last = [], before
    for step, randomised in randomisation_cascade(model):
        seen.append(step)
        now = weights(randomised)
        changed = {name for name in names if not torch.equal(now[name], last[name])}
        assert changed == {name for name in names if step_of(name) == step}
        last = now
    assert seen == order
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_each_step_draws_its_own_weights_in_a_copy_from_head_to_embeddings(text_classifier):
    check_cascade(text_classifier[0])


def test_a_step_may_draw_some_layers_together(model):
    move_away(model)
    names = [step for step, _ in randomisation_cascade(model, group=2)]
    assert names == ["head", "layers 1–2", "layer 0", "embeddings"]
    before, seen = weights(model), {}
    for step, changed in randomisation_cascade(model, group=2):
        now = weights(changed)
        seen[step] = {
            step_of(name) for name, _ in model.named_parameters() if not torch.equal(now[name], before[name])
        }
        before = now
    assert seen["layers 1–2"] == {"layer 1", "layer 2"} and seen["layer 0"] == {"layer 0"}
    with pytest.raises(ValueError, match="one layer or more anew, not 0"):
        next(randomisation_cascade(model, group=0))


def test_each_step_draws_its_own_weights_of_an_image_classifier(image_model):
    check_cascade(image_model)


def test_weights_that_were_loaded_from_a_folder_are_drawn_too(model, tmp_path):
    model.save_pretrained(tmp_path)
    check_cascade(type(model).from_pretrained(tmp_path).eval().requires_grad_(False))


def test_weights_are_those_of_an_untrained_model(text_classifier):
    model, _ = text_classifier
    *_, (_, randomised) = randomisation_cascade(move_away(model))
    for name, value in randomised.named_parameters():
        if value.ndim == 1:
            assert (value == (1 if "norm" in name.lower() and name.endswith("weight") else 0)).all(), name
        elif value.numel() > 300:
            assert abs(value.mean()) < 0.05 and value.std() == pytest.approx(SPREAD, rel=0.15), name


def test_randomised_model_still_runs_as_the_model_did(model, tokenizer):
    inputs = encode(SENTENCES, tokenizer, model)
    logits = [
        model(**inputs).logits,
        *(changed(**inputs).logits for _, changed in randomisation_cascade(model)),
    ]
    assert all(not torch.allclose(one, two) for one, two in zip(logits, logits[1:], strict=False))
    for _, changed in randomisation_cascade(model):
        assert not changed.training and not any(parameter.requires_grad for parameter in changed.parameters())


def test_seed_decides_the_weights(model):
    def drawn(seed):
        return [weights(changed)["classifier.weight"] for _, changed in randomisation_cascade(model, seed)]

    first, again, other = drawn(3), drawn(3), drawn(4)
    assert all(torch.equal(one, two) for one, two in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0]) and torch.equal(first[0], first[-1])


def test_global_generator_is_left_as_it_is(model):
    state = torch.get_rng_state()
    assert len(list(randomisation_cascade(model))) == 5
    assert torch.equal(torch.get_rng_state(), state)


def test_draws_between_the_steps_and_the_steps_leave_each_other_alone(model):
    plain = [weights(changed) for _, changed in randomisation_cascade(model)]
    torch.manual_seed(5)
    expected, drawn = torch.rand(5), []
    torch.manual_seed(5)
    for (_, changed), known in zip(randomisation_cascade(model), plain, strict=True):
        assert all(torch.equal(value, known[name]) for name, value in changed.state_dict().items())
        drawn.append(torch.rand(()))
    assert torch.equal(torch.stack(drawn), expected)


# Ranks of players


def test_same_and_reversed_order_correlate_with_one_and_minus_one():
    first = torch.tensor([[0.1, 0.2, 0.5, 0.3]])
    players = torch.ones(1, 4, dtype=torch.bool)
    assert rank_correlations(first, first.exp(), players) == pytest.approx([1])
    assert rank_correlations(first, -first, players) == pytest.approx([-1])


def test_inputs_are_ranked_apart():
    first = torch.tensor([[1.0, 2, 3], [10, 20, 30], [1, 2, 3]])
    second = torch.tensor([[5.0, 6, 7], [3, 2, 1], [3, 1, 2]])
    assert rank_correlations(first, second, torch.ones(3, 3, dtype=torch.bool)) == pytest.approx(
        [1, -1, -0.5]
    )


def test_ties_share_their_rank_as_in_scipy():
    first, second = torch.tensor([[1.0, 1, 2, 5, 5, 7]]), torch.tensor([[3.0, 1, 1, 1, 8, 2]])
    expected = spearmanr(first[0], second[0]).statistic
    assert rank_correlations(first, second, torch.ones(1, 6, dtype=torch.bool)) == pytest.approx([expected])


def test_what_does_not_play_does_not_count(model, tokenizer):
    players = token_players(encode(SENTENCES, tokenizer, model), tokenizer)
    first = torch.rand(players.shape, generator=torch.Generator().manual_seed(0))
    second = torch.where(players, 2 * first + 1, -100 * first)
    assert rank_correlations(first, second, players) == pytest.approx([1] * len(SENTENCES))
    assert rank_correlations(first, second.masked_fill(~players, torch.nan), players) == pytest.approx(
        [1] * len(SENTENCES)
    )


def test_attribution_that_ranks_nothing_has_no_correlation():
    first, everyone = torch.tensor([[1.0, 2, 3], [1, 2, 3]]), torch.ones(2, 3, dtype=torch.bool)
    second = torch.tensor([[1.0, 1, 1], [1, 2, 3]])
    assert rank_correlations(first, second, everyone) == pytest.approx([math.nan, 1], nan_ok=True)
    for few in ([True, True, False], [False, False, False]):
        players = torch.tensor([few, [True, True, True]])
        assert rank_correlations(first, first, players) == pytest.approx([math.nan, 1], nan_ok=True)


def test_draws_of_all_seeds_and_steps_are_different(model, monkeypatch):
    seeds, seed_all = [], torch.manual_seed
    monkeypatch.setattr(torch, "manual_seed", lambda seed: (seeds.append(seed), seed_all(seed)))
    for seed in range(3):
        steps = [name for name, _ in randomisation_cascade(model, seed)]
    assert len(set(seeds)) == len(seeds) == 3 * len(steps)
