"""The closed forms are the Shapley values: against enumeration, shapiq, the axioms, and sums done by hand."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from shapiq import ExactComputer
from torch.testing import assert_close

from helpers.attention import AttentionMaps
from helpers.estimators import (
    all_coalitions,
    enumerate_shapley,
    published_limit,
    published_sampling,
    sampled_shapley,
)
from helpers.shapley import GAMES, attention_shapley, coalition_values, pairwise_matrix, shapley_attributions

PAIRWISE = ("mutual", "max_mutual")
sizes = st.integers(1, 10)
seeds = st.integers(0, 2**16)
games = st.sampled_from(GAMES)


def random_matrix(n, seed):
    """Attention among n tokens: random, asymmetric, rows of different sums as gradient weighting has them."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand(n, 1, dtype=torch.double, generator=generator) * 3
    return torch.randn(n, n, dtype=torch.double, generator=generator).mul(2).softmax(-1) * scale


def random_players(n, seed):
    """Some of n tokens, at least one, token 0 (cls) among them or not."""
    generator = torch.Generator().manual_seed(seed)
    players = torch.rand(n, generator=generator) < 0.6
    players[torch.randint(n, (1,), generator=generator)] = True
    return players


def solve(matrix, players=None, game="cls"):
    players = torch.ones(len(matrix), dtype=torch.bool) if players is None else players
    return attention_shapley(matrix[None], players[None], game)[0]


def worth(matrix, members, game):
    """v(S) as the definition reads, one pair after another."""
    members, m = sorted(members), matrix.tolist()
    if game == "cls":
        return sum(m[0][i] for i in members)
    if len(members) == 1:
        return m[members[0]][members[0]]
    join = (lambda a, b: a + b) if game == "mutual" else max
    return sum(join(m[i][j], m[j][i]) for i, j in itertools.combinations(members, 2))


def game_of_players(matrix, players, game):
    """v over coalitions of the players alone, whatever other tokens there are."""

    def value(coalitions):
        everyone = torch.zeros(len(coalitions), len(matrix), dtype=torch.bool)
        everyone[:, players] = coalitions
        return coalition_values(matrix, everyone, game)

    return value


# The characteristic functions


@pytest.mark.parametrize("game", GAMES)
@pytest.mark.parametrize("n", [1, 2, 3, 6])
def test_coalitions_are_worth_what_the_definition_says(game, n):
    matrix, coalitions = random_matrix(n, seed=n), all_coalitions(n)
    literal = [worth(matrix, row.nonzero().flatten().tolist(), game) for row in coalitions]
    assert_close(coalition_values(matrix, coalitions, game), torch.tensor(literal, dtype=torch.double))


@pytest.mark.parametrize(
    ("game", "empty", "alone", "pair"),
    [("cls", 0, 0.3, 0.8), ("mutual", 0, 0.6, 0.7), ("max_mutual", 0, 0.6, 0.4)],
)
def test_empty_single_and_pair_coalitions_solved_by_hand(game, empty, alone, pair):
    matrix = torch.tensor([[0.2, 0.3, 0.5], [0.1, 0.6, 0.3], [0.4, 0.4, 0.2]], dtype=torch.double)
    coalitions = torch.tensor([[False, False, False], [False, True, False], [False, True, True]])
    expected = torch.tensor([empty, alone, pair], dtype=torch.double)
    assert_close(coalition_values(matrix, coalitions, game), expected)


def test_all_coalitions_are_visited_once():
    rows = all_coalitions(5)
    assert {tuple(row) for row in rows.tolist()} == set(itertools.product([False, True], repeat=5)) and len(
        rows
    ) == 32


# The closed forms


@pytest.mark.parametrize(
    ("game", "values"),
    [
        ("cls", [0.2, 0.3, 0.5]),
        ("mutual", [0.35 / 0.6, 0.41 / 0.6, 0.44 / 0.6]),
        ("max_mutual", [0.2 / 0.6, 0.29 / 0.6, 0.23 / 0.6]),
    ],
)
def test_three_players_solved_by_hand(game, values):
    matrix = torch.tensor([[0.2, 0.3, 0.5], [0.1, 0.6, 0.3], [0.4, 0.4, 0.2]], dtype=torch.double)
    assert_close(solve(matrix, game=game), torch.tensor(values, dtype=torch.double))


@pytest.mark.parametrize("game", GAMES)
@pytest.mark.parametrize("n", range(1, 11))
def test_closed_form_equals_enumeration_of_all_coalitions(game, n):
    matrix = random_matrix(n, seed=100 + n)
    exact = enumerate_shapley(lambda coalitions: coalition_values(matrix, coalitions, game), n)
    assert_close(solve(matrix, game=game), exact, rtol=0, atol=1e-13)


@given(n=sizes, seed=seeds, game=games)
def test_closed_form_equals_enumeration_when_only_some_tokens_play(n, seed, game):
    matrix, players = random_matrix(n, seed), random_players(n, seed)
    exact = enumerate_shapley(game_of_players(matrix, players, game), int(players.sum()))
    assert_close(solve(matrix, players, game)[players], exact, rtol=0, atol=1e-13)


@given(n=sizes, seed=seeds, game=games)
@example(n=1, seed=0, game="mutual")
@example(n=10, seed=0, game="max_mutual")
def test_closed_form_equals_shapiq_on_the_literal_game(n, seed, game):
    matrix = random_matrix(n, seed)
    literal = lambda rows: np.array([worth(matrix, np.flatnonzero(row), game) for row in rows])
    exact = ExactComputer(literal, n_players=n)("SV", 1).get_n_order_values(1)
    assert_close(solve(matrix, game=game), torch.from_numpy(exact), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("game", "value"), [("cls", 0.2), ("mutual", 0.6), ("max_mutual", 0.6)])
def test_a_single_player_gets_what_it_is_worth_alone(game, value):
    matrix = torch.tensor([[0.7, 0.2, 0.1], [0.3, 0.6, 0.1], [0.1, 0.1, 0.8]])
    assert_close(solve(matrix, torch.tensor([False, True, False]), game), torch.tensor([0.0, value, 0.0]))


# The axioms


@given(n=sizes, seed=seeds, game=games)
def test_efficiency_values_sum_to_the_worth_of_all_players(n, seed, game):
    matrix, players = random_matrix(n, seed), random_players(n, seed)
    everyone = worth(matrix, players.nonzero().flatten().tolist(), game)
    assert solve(matrix, players, game).sum().item() == pytest.approx(everyone, abs=1e-12)


@given(n=st.integers(3, 10), seed=seeds, game=games)
def test_symmetry_interchangeable_players_get_equal_values(n, seed, game):
    matrix = random_matrix(n, seed)
    swap = [0, 2, 1, *range(3, n)]
    matrix = (matrix + matrix[swap][:, swap]) / 2
    values = solve(matrix, torch.arange(n) > 0, game)
    assert values[1].item() == pytest.approx(values[2].item(), abs=1e-14)


@given(n=st.integers(2, 10), seed=seeds)
def test_null_player_that_cls_does_not_look_at_gets_zero(n, seed):
    matrix = random_matrix(n, seed)
    matrix[0, n - 1] = 0
    assert solve(matrix, game="cls")[n - 1] == 0


@given(n=st.integers(2, 10), seed=seeds, game=st.sampled_from(PAIRWISE))
def test_null_player_gets_zero_where_no_token_looks_at_itself(n, seed, game):
    matrix = random_matrix(n, seed).fill_diagonal_(0)
    matrix[:, n - 1] = matrix[n - 1] = 0
    values = solve(matrix, game=game)
    assert values[n - 1] == 0 and (values[: n - 1].abs().sum() > 0 or n == 2)


def test_token_without_links_pays_for_the_self_attention_of_others():
    matrix = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.9, 0.0], [0.0, 0.0, 0.0]])
    values = solve(matrix, torch.tensor([False, True, True]), "mutual")
    assert_close(values, torch.tensor([0.0, 0.45, -0.45]))


@given(n=sizes, seed=seeds, game=st.sampled_from(("cls", "mutual")), factor=st.floats(-2, 2))
def test_cls_and_mutual_are_linear_in_the_matrix(n, seed, game, factor):
    first, second, players = random_matrix(n, seed), random_matrix(n, seed + 1), random_players(n, seed)
    together = solve(first + factor * second, players, game)
    assert_close(
        together, solve(first, players, game) + factor * solve(second, players, game), rtol=0, atol=1e-12
    )


@given(n=sizes, seed=seeds)
def test_max_mutual_and_its_min_twin_add_up_to_mutual(n, seed):
    matrix = random_matrix(n, seed)  # max(a, b) + min(a, b) = a + b, and min(a, b) = −max(−a, −b)
    total = solve(matrix, game="max_mutual") - solve(-matrix, game="max_mutual")
    assert_close(total, solve(matrix + matrix.diag().diag(), game="mutual"), rtol=0, atol=1e-12)


@given(n=sizes, seed=seeds, game=st.sampled_from(PAIRWISE))
def test_additivity_value_of_a_sum_of_games_is_the_sum_of_values(n, seed, game):
    matrix, players = random_matrix(n, seed), random_players(n, seed)
    parts = [game_of_players(matrix, players, name) for name in ("cls", game)]
    exact = enumerate_shapley(lambda coalitions: sum(part(coalitions) for part in parts), int(players.sum()))
    assert_close(
        (solve(matrix, players, "cls") + solve(matrix, players, game))[players], exact, rtol=0, atol=1e-13
    )


# Batches, order and tokens that do not play


@given(n=st.integers(2, 10), seed=seeds, game=games)
def test_permuting_the_tokens_permutes_the_values(n, seed, game):
    matrix, players = random_matrix(n, seed), random_players(n, seed)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    order = torch.cat([torch.zeros(1, dtype=torch.long), order[order > 0]])  # cls keeps its place
    permuted = solve(matrix[order][:, order], players[order], game)
    assert_close(permuted, solve(matrix, players, game)[order], rtol=0, atol=1e-13)


@given(n=st.integers(2, 10), seed=seeds, game=games)
def test_tokens_that_do_not_play_get_zero_and_change_nothing(n, seed, game):
    matrix, players = random_matrix(n, seed), random_players(n, seed)
    values, changed = solve(matrix, players, game), matrix.clone()
    changed[:, ~players] += 7
    changed[1:][~players[1:]] += 7  # the row of cls is what the cls game reads
    assert (values[~players] == 0).all()
    assert torch.equal(solve(changed, players, game), values)


@given(seed=seeds, game=games)
def test_batched_values_equal_those_of_each_input_alone(seed, game):
    matrices = torch.stack([random_matrix(7, seed + row) for row in range(4)])
    players = torch.stack([random_players(7, seed + row) for row in range(4)])
    alone = [solve(matrix, playing, game) for matrix, playing in zip(matrices, players, strict=True)]
    assert_close(attention_shapley(matrices, players, game), torch.stack(alone), rtol=0, atol=1e-14)


@given(n=st.integers(1, 6), more=st.integers(1, 5), seed=seeds, game=games)
def test_padding_to_any_width_changes_nothing(n, more, seed, game):
    matrix, players = random_matrix(n, seed), random_players(n, seed)
    wide = torch.full((n + more, n + more), 0.3, dtype=torch.double)
    wide[:n, :n] = matrix
    values = solve(wide, torch.nn.functional.pad(players, (0, more)), game)
    assert_close(values[:n], solve(matrix, players, game), rtol=0, atol=1e-14)


# Matrices


def random_maps(seed=0):
    generator = torch.Generator().manual_seed(seed)
    weights, gradients = torch.randn(2, 2, 3, 2, 4, 4, generator=generator)
    return AttentionMaps(torch.zeros(2, 2), torch.zeros(2).long(), weights.softmax(-1), gradients)


@pytest.mark.parametrize("weighting", ["attention", "gradient"])
def test_matrix_is_the_mean_over_layers_and_heads_entry_by_entry(weighting):
    maps = random_maps()
    literal = torch.zeros(2, 4, 4)
    for b, layer, head, i, j in itertools.product(range(2), range(3), range(2), range(4), range(4)):
        slope = 1 if weighting == "attention" else max(maps.gradients[b, layer, head, i, j].item(), 0)
        literal[b, i, j] += maps.weights[b, layer, head, i, j] * slope / 6
    assert_close(pairwise_matrix(maps, weighting), literal)


# Enumeration and sampling of any game


def test_glove_game_gives_the_left_glove_two_thirds():
    pair = lambda coalitions: (coalitions[:, 0] & coalitions[:, 1:].any(-1)).double()
    assert_close(enumerate_shapley(pair, 3), torch.tensor([2 / 3, 1 / 6, 1 / 6], dtype=torch.double))


def test_airport_game_shares_each_piece_of_runway_among_its_users():
    length = torch.tensor([1.0, 2.0, 3.0, 6.0], dtype=torch.double)
    shares = enumerate_shapley(lambda coalitions: (coalitions * length).amax(-1), 4)
    assert_close(shares, torch.tensor([3 / 12, 7 / 12, 13 / 12, 49 / 12], dtype=torch.double))


@given(seed=seeds)
def test_worth_of_the_empty_coalition_is_not_shared_out(seed):
    values = torch.randn(2**4, dtype=torch.double, generator=torch.Generator().manual_seed(seed))
    shapley = enumerate_shapley(lambda coalitions: values, 4)
    assert shapley.sum().item() == pytest.approx((values[-1] - values[0]).item(), abs=1e-12)
    assert_close(enumerate_shapley(lambda coalitions: values + 5, 4), shapley)


@pytest.mark.parametrize("game", PAIRWISE)
def test_sampled_estimates_average_to_the_exact_values(game):
    matrix = random_matrix(5, seed=3)
    value = lambda coalitions: coalition_values(matrix, coalitions, game)
    draws = torch.stack([sampled_shapley(value, 5, budget=60, seed=seed) for seed in range(120)]).double()
    standard_error = draws.std(0) / math.sqrt(len(draws))
    assert (standard_error > 0).all() and (standard_error < 0.05).all()
    assert ((draws.mean(0) - solve(matrix, game=game)).abs() < 4 * standard_error).all()


def published_by_hand(matrix, players, sampled, game):
    """Σ over sampled S of [v(S∪i) − v(S∖i)] / (n · C(n−1, |S∖i|))."""
    tokens = players.nonzero().flatten().tolist()
    values = torch.zeros(len(matrix), dtype=torch.double)
    for token, coalition in itertools.product(tokens, sampled):
        rest = {tokens[position] for position in coalition} - {token}
        gain = worth(matrix, rest | {token}, game) - worth(matrix, rest, game)
        values[token] += gain / (len(tokens) * math.comb(len(tokens) - 1, len(rest)))
    return values


@pytest.mark.parametrize("game", GAMES)
def test_published_sampling_recomputed_from_the_same_coalitions(game):
    matrix, players = random_matrix(6, seed=8), torch.tensor([False, True, True, True, False, True])
    drawn = torch.rand(5, 4, generator=torch.Generator().manual_seed(2)) < 0.5
    by_hand = published_by_hand(matrix, players, [row.nonzero().flatten().tolist() for row in drawn], game)
    sampled = published_sampling(matrix[None], players[None], game, n_coalitions=5, sizes="uniform", seed=2)
    assert_close(sampled[0], by_hand)


@pytest.mark.parametrize("sizes", ["uniform", "kernel"])
def test_published_sampling_converges_to_its_own_expectation(sizes):
    n, count, game = 5, 50_000, "max_mutual"
    matrix, players = random_matrix(n, seed=9) + 2 * torch.eye(n), torch.ones(n, dtype=torch.bool)
    subsets = [subset for size in range(n + 1) for subset in itertools.combinations(range(n), size)]
    chance = dict.fromkeys(subsets, 1 / 2**n)
    if sizes == "kernel":
        kernel = {s: (n - 1) / (s * (n - s)) for s in range(1, n)}  # of all coalitions of size s together
        chance = {s: kernel.get(len(s), 0) / math.comb(n, len(s)) / sum(kernel.values()) for s in subsets}
    terms = {subset: published_by_hand(matrix, players, [subset], game) for subset in subsets}
    expected = sum(chance[subset] * terms[subset] for subset in subsets)
    variance = sum(chance[subset] * (terms[subset] - expected) ** 2 for subset in subsets)
    sampled = published_sampling(matrix[None], players[None], game, count, sizes, seed=0)[0] / count
    assert ((sampled - expected).abs() < 4 * (variance / count).sqrt()).all()
    assert_close(published_limit(matrix[None], players[None], game, sizes)[0], expected)
    exact = solve(matrix, game=game)
    if sizes == "uniform":  # right up to a factor that grows with the budget
        assert_close(expected, exact / 2 ** (n - 1))
    else:  # not even that: the proportions are off
        assert (expected / expected.norm() - exact / exact.norm()).abs().max() > 0.04


@pytest.mark.parametrize("game", GAMES)
@pytest.mark.parametrize("n", [1, 2, 3, 8])
@pytest.mark.parametrize("sizes", ["uniform", "kernel"])
def test_limit_of_published_sampling_is_its_mean_over_all_coalitions(sizes, n, game):
    matrix, players = (
        random_matrix(n + 2, seed=n),
        torch.arange(n + 2) % (n + 1) > 0,
    )  # neither the first plays nor the last
    chance = (
        {1: 1.0} if n == 1 else {s: 1 / (s * (n - s)) for s in range(1, n)}
    )  # of all coalitions of a size together
    chance = {s: share / sum(chance.values()) / math.comb(n, s) for s, share in chance.items()}
    expected = torch.zeros(n + 2, dtype=torch.double)
    for size in range(n + 1):
        for subset in itertools.combinations(range(n), size):
            share = 1 / 2**n if sizes == "uniform" else chance.get(size, 0)
            expected += share * published_by_hand(matrix, players, [subset], game)
    assert_close(published_limit(matrix[None], players[None], game, sizes)[0], expected)
    if sizes == "uniform":
        assert_close(expected, solve(matrix, players, game) / 2 ** (n - 1))


@pytest.mark.parametrize("n", [1, 2, 40, 300])
@pytest.mark.parametrize("sizes", ["uniform", "kernel"])
def test_published_sampling_stays_finite_and_off_non_players_at_any_length(n, sizes):
    matrix = random_matrix(n + 1, seed=n)
    values = published_sampling(matrix[None], (torch.arange(n + 1) > 0)[None], n_coalitions=6, sizes=sizes)[0]
    assert torch.isfinite(values).all() and values[0] == 0 and (values != 0).any()


def test_same_seed_same_samples():
    matrix, players = random_matrix(6, seed=1)[None], torch.ones(1, 6, dtype=torch.bool)
    draw = lambda seed: published_sampling(matrix, players, n_coalitions=20, seed=seed)
    assert torch.equal(draw(4), draw(4)) and not torch.equal(draw(4), draw(5))
    value = lambda coalitions: coalition_values(matrix[0], coalitions, "max_mutual")
    assert torch.equal(sampled_shapley(value, 6, 40, seed=4), sampled_shapley(value, 6, 40, seed=4))
    assert not torch.equal(sampled_shapley(value, 6, 40, seed=4), sampled_shapley(value, 6, 40, seed=5))


# Bad input


def test_unknown_game_is_named_with_the_known_ones():
    matrix, players = random_matrix(3, seed=0), torch.ones(1, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="'shapley' is unknown; use one of cls, mutual, max_mutual"):
        attention_shapley(matrix[None], players, "shapley")
    with pytest.raises(ValueError, match="'shapley' is unknown"):
        coalition_values(matrix, players, "shapley")
    with pytest.raises(ValueError, match="'shapley' is unknown"):
        published_sampling(matrix[None], players, "shapley")


def test_unknown_weighting_is_named_with_the_known_ones():
    with pytest.raises(ValueError, match="'gradients' is unknown; use one of attention, gradient"):
        pairwise_matrix(random_maps(), "gradients")


def test_gradient_weighting_without_gradients_says_how_to_get_them():
    maps = random_maps()
    maps.gradients = None
    with pytest.raises(ValueError, match="gradients=True"):
        pairwise_matrix(maps, "gradient")


@pytest.mark.parametrize("n", [0, 7])
def test_enumeration_outside_its_limit_is_refused_before_the_game_is_played(n):
    def value(coalitions):
        pytest.fail("the game was played")

    with pytest.raises(ValueError, match=f"{n} players asked for, but it is limited to 1 to 6"):
        enumerate_shapley(value, n, max_players=6)


@pytest.mark.parametrize("game", GAMES)
def test_input_without_players_is_named(game):
    players = torch.tensor([[True, True], [False, False]])
    with pytest.raises(ValueError, match="input 1 has no players"):
        attention_shapley(torch.rand(2, 2, 2), players, game)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_attention_is_refused(bad):
    matrix = torch.rand(1, 3, 3)
    matrix[0, 1, 2] = bad
    with pytest.raises(ValueError, match="NaN or infinity"):
        attention_shapley(matrix, torch.ones(1, 3, dtype=torch.bool), "mutual")


@pytest.mark.parametrize(
    ("matrix", "players"), [((3, 3), (3,)), ((1, 3, 3), (1, 4)), ((1, 3, 4), (1, 3)), ((2, 3, 3), (1, 3))]
)
def test_shapes_that_do_not_fit_are_refused(matrix, players):
    with pytest.raises(ValueError, match="must be"):
        attention_shapley(torch.rand(matrix), torch.ones(players, dtype=torch.bool))


def test_coalitions_of_another_width_are_refused():
    with pytest.raises(ValueError, match="coalitions of 4 players do not fit a matrix of 3 tokens"):
        coalition_values(torch.rand(3, 3), all_coalitions(4), "mutual")


def test_bad_sampling_arguments_are_refused():
    matrix, players = torch.rand(1, 3, 3), torch.ones(1, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="'normal' is unknown; use 'uniform' or 'kernel'"):
        published_sampling(matrix, players, sizes="normal")
    with pytest.raises(ValueError, match="sizes 'normal' is unknown"):
        published_limit(matrix, players, sizes="normal")
    with pytest.raises(ValueError, match="n_coalitions must be at least 1, not 0"):
        published_sampling(matrix, players, n_coalitions=0)
    with pytest.raises(
        ValueError, match="budget of 3 coalitions does not pay for one permutation of 3 players"
    ):
        sampled_shapley(lambda coalitions: coalitions.sum(-1), 3, budget=3)


def test_the_papers_attributions_go_by_their_names():
    maps, players = random_maps(), torch.tensor([[False, True, True, True, False]]).expand(2, -1)
    players = players[:, : maps.weights.shape[-1]]
    found = shapley_attributions(maps, players)
    named = {"Att": "attention", "Grad-Att": "gradient"}
    games = {"CLS": "cls", "Mutual": "mutual", "Max-Mutual": "max_mutual"}
    assert list(found) == [f"Shapley-{kind}-{game}" for kind in named for game in games]
    for (kind, weighting), (name, game) in itertools.product(named.items(), games.items()):
        expected = attention_shapley(pairwise_matrix(maps, weighting), players, game)
        assert_close(found[f"Shapley-{kind}-{name}"], expected)
    maps.gradients = None
    assert list(shapley_attributions(maps, players)) == [f"Shapley-Att-{game}" for game in games]
