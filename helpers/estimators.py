"""Shapley values without a closed form: enumeration, unbiased sampling, the paper's own sampling."""

import math
from collections.abc import Callable

import torch

from helpers.models import check_players
from helpers.shapley import ADDITIVE_GAMES, check_game, coalition_values, pair_values, token_values


def all_coalitions(n_players: int) -> torch.Tensor:
    """Return every coalition of n players as bool (2**n, n); row r holds player i where bit i of r is set."""
    return (torch.arange(2**n_players)[:, None] >> torch.arange(n_players)) & 1 == 1


def enumerate_shapley(
    value: Callable[[torch.Tensor], torch.Tensor], n_players: int, max_players: int = 20
) -> torch.Tensor:
    """Return the exact Shapley values (n_players,) of any game by visiting all 2**n_players coalitions.

    value(coalitions) takes bool (count, n_players) and returns (count,). The sums run in double precision.
    Raises ValueError for more than `max_players` players, or none.
    """
    if not 1 <= n_players <= max_players:
        raise ValueError(
            f"enumeration of {n_players} players asked for, but it is limited to 1 to {max_players} "
            f"(2**n coalitions); raise max_players, or estimate with sampled_shapley"
        )
    coalitions = all_coalitions(n_players)
    values = value(coalitions)
    v, rows = values.double(), torch.arange(2**n_players, device=values.device)
    size = coalitions.sum(-1).to(v.device)
    orders = [math.factorial(s) * math.factorial(n_players - s - 1) for s in range(n_players)]
    weight = torch.tensor(orders, dtype=v.dtype, device=v.device) / math.factorial(n_players)
    shapley = []
    for player in range(n_players):
        without = rows[(rows >> player) & 1 == 0]
        shapley.append((weight[size[without]] * (v[without + 2**player] - v[without])).sum())
    return torch.stack(shapley).to(values.dtype if values.is_floating_point() else torch.double)


def sampled_shapley(
    value: Callable[[torch.Tensor], torch.Tensor], n_players: int, budget: int, seed: int = 0
) -> torch.Tensor:
    """Return unbiased estimates (n_players,) from at most `budget` coalitions, by permutations (shapiq).

    Source: Castro, Gómez and Tejada (2009). `value` as in `enumerate_shapley`. Raises ValueError where the
    budget does not pay for one permutation, n_players + 1 coalitions.
    """
    from shapiq import PermutationSamplingSV  # heavy, and only this function needs it

    if budget < n_players + 1:
        raise ValueError(
            f"a budget of {budget} coalitions does not pay for one permutation of {n_players} players"
        )
    estimator = PermutationSamplingSV(n_players, random_state=seed)

    def game(coalitions):
        return value(torch.from_numpy(coalitions.reshape(-1, n_players))).double().cpu().numpy()

    return torch.from_numpy(estimator.approximate(budget, game).get_n_order_values(1)).float()


def published_sampling(
    matrix: torch.Tensor,
    players: torch.Tensor,
    game: str = "max_mutual",
    n_coalitions: int = 100,
    sizes: str = "uniform",
    seed: int = 0,
) -> torch.Tensor:
    """Return the paper's sampled attributions (batch, tokens), to measure how far from exact they are.

    φ_i = Σ_S [v(S∪i) − v(S∖i)] / (n · C(n−1, |S∖i|)) over the sampled S, without the normalisation that would
    make it an unbiased estimate. sizes="uniform" lets each player in with probability ½; "kernel" draws |S|
    from the KernelSHAP kernel, (n−1) / (C(n,s) · s · (n−s)) for each coalition of size s, then the members
    evenly.
    """
    _check_sizes(sizes)
    check_players(players)
    if n_coalitions < 1:
        raise ValueError(f"n_coalitions must be at least 1, not {n_coalitions}")
    generator = torch.Generator().manual_seed(seed)
    result = torch.zeros_like(
        matrix[:, 0], dtype=torch.double
    )  # 1/C(n−1, s) underflows single precision from n ≈ 150
    for row, (attention, playing) in enumerate(zip(matrix, players, strict=True)):
        tokens = playing.nonzero().squeeze(-1)
        n = len(tokens)
        sampled = torch.zeros(n_coalitions, attention.shape[0], dtype=torch.bool, device=matrix.device)
        sampled[:, tokens] = _draw_coalitions(n, n_coalitions, sizes, generator).to(matrix.device)
        for token in tokens:
            inside, outside = sampled.clone(), sampled.clone()
            inside[:, token], outside[:, token] = True, False
            size = outside.sum(-1).double()
            log_count = math.lgamma(n) - torch.lgamma(size + 1) - torch.lgamma(n - size)  # ln C(n−1, |S∖i|)
            marginal = coalition_values(attention, inside, game) - coalition_values(attention, outside, game)
            result[row, token] = (marginal.double() * torch.exp(-log_count)).sum() / n
    return result


def published_limit(
    matrix: torch.Tensor, players: torch.Tensor, game: str = "max_mutual", sizes: str = "uniform"
) -> torch.Tensor:
    """Return what a coalition adds to `published_sampling` on average, (batch, tokens): its limit.

    With t players of S beside i, which happens with probability q_t, a pairwise game gives
    E φ_i = Σ_t q_t / (n · C(n−1, t)) · [t/(n−1) Σ_{j≠i} w_ij + (t=0) M[i,i] − (t=1) Σ_{j≠i} M[j,j]/(n−1)].
    For "uniform" sizes that is the exact value, divided by 2^(n−1). Ours. Raises ValueError as
    `published_sampling` does.
    """
    _check_sizes(sizes)
    check_game(game)
    result = torch.zeros_like(matrix[:, 0], dtype=torch.double)
    for row, (attention, playing) in enumerate(zip(matrix.double(), players, strict=True)):
        n, others = int(playing.sum()), max(int(playing.sum()) - 1, 1)
        t, weight = torch.arange(n).to(attention), torch.full_like(attention[0, :n], 2.0 ** (1 - n) / n)
        if sizes == "kernel":
            s, p = torch.arange(1, max(n, 2)).to(attention), attention.new_zeros(n + 1)  # p of the sizes of S
            p[1 : max(n, 2)] = 1 / (s * (n - s).clamp(min=1))
            q = (p[1:] * (t + 1) + p[:-1] * (n - t)) / (n * p.sum())  # i was in S, or it was not
            weight = q / n / torch.exp(math.lgamma(n) - torch.lgamma(t + 1) - torch.lgamma(n - t))
        if game in ADDITIVE_GAMES:
            result[row, playing] = token_values(attention, game)[playing] * weight.sum()
            continue
        own, pairs = (
            attention.diagonal()[playing],
            pair_values(attention[playing][:, playing], game).sum(-1) / others,
        )
        result[row, playing] = (
            pairs * (weight * t).sum() + own * weight[0] - (own.sum() - own) / others * weight[1:2].sum()
        )
    return result


def _check_sizes(sizes: str) -> None:
    if sizes not in ("uniform", "kernel"):
        raise ValueError(f"sizes {sizes!r} is unknown; use 'uniform' or 'kernel'")


def _draw_coalitions(n: int, count: int, sizes: str, generator: torch.Generator) -> torch.Tensor:
    if sizes == "uniform":
        return torch.rand(count, n, generator=generator) < 0.5
    if n < 3:  # the kernel has no proper size to choose between
        return torch.eye(n, dtype=torch.bool)[torch.randint(n, (count,), generator=generator)]
    size = torch.arange(1, n, dtype=torch.double)
    drawn = 1 + torch.multinomial(1 / (size * (n - size)), count, replacement=True, generator=generator)
    order = torch.rand(count, n, generator=generator).argsort(-1).argsort(-1)  # a random rank for each player
    return order < drawn[:, None]
