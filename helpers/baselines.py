"""The methods that attention games are compared with: from attention, gradients, erased inputs.

Every function returns attributions (batch, tokens). Those that take `players` are zero off them.
`mask_token_id` and `operator` say what erasing does, to tokens or to patches, as in
`faithfulness.erasure_curves`.
"""

from collections.abc import Sequence

import numpy as np
import torch
from tqdm.auto import tqdm

from helpers.attention import AttentionMaps, check_gradients
from helpers.estimators import enumerate_shapley, sampled_shapley
from helpers.faithfulness import check_mask_token, erased_probabilities
from helpers.images import replacement_pixels, sum_over_patches
from helpers.labels import resolve_target
from helpers.models import GRADIENT_SCALE, check_explainable, check_players, fast_attention
from helpers.runtime import in_batches
from helpers.text import encode, token_players

GRADIENT_TOKENS = (
    4096  # tokens in one backward pass of integrated gradients, which walks many points for each input
)


def attention_row_sum(maps: AttentionMaps) -> torch.Tensor:
    """Return each token's attention row, summed, mean over layers and heads: 1, by the softmax.

    The paper's "Att". It is constant, so any ranking made from it is an order of ties (in half precision,
    of rounding).
    """
    return maps.weights.sum(-1).mean((1, 2))


def attention_received(maps: AttentionMaps) -> torch.Tensor:
    """Return the attention that each token receives: its column's mean over real queries, layers, heads."""
    real = _real_tokens(maps).to(maps.weights.dtype)
    return torch.einsum("blhqk,bq->bk", maps.weights, real / real.sum(-1, keepdim=True)) / _n_maps(maps)


def grad_sam(maps: AttentionMaps) -> torch.Tensor:
    """Return Grad-SAM: r_i = 1/(L·H·T) Σ_{l,h} Σ_j [A ∘ ReLU(∂y/∂A)]_{ij}, T the number of real tokens.

    Source: Barkan et al. (2021), Grad-SAM. Raises ValueError where the gradients were not read, or by
    rules.
    """
    slopes = check_gradients(maps, "Grad-SAM")
    layers = zip(maps.weights.unbind(1), slopes.unbind(1), strict=True)
    relevance = sum((weights * gradients.relu()).sum((1, 3)) for weights, gradients in layers)
    return relevance / (_n_maps(maps) * _real_tokens(maps).sum(-1, keepdim=True))


def attention_rollout(maps: AttentionMaps, cls: int = 0) -> torch.Tensor:
    """Return the cls row of attention rollout: the product over layers of ½ (mean of A + identity).

    Source: Abnar and Zuidema (2020).
    """
    flow = torch.eye(maps.weights.shape[-1], dtype=maps.weights.dtype, device=maps.weights.device)[cls]
    flow = flow.expand(len(maps.weights), 1, -1)
    for layer in reversed(maps.weights.unbind(1)):  # from the last layer down, only the cls row is carried
        flow = (flow @ layer.mean(1) + flow) / 2
    return flow.squeeze(1)


def chefer_relevance(maps: AttentionMaps, signed: bool = False, cls: int = 0) -> torch.Tensor:
    """Return Chefer's relevance of each token to the class token: R = I; R ← R + mean_h ReLU(A ∘ ∂y/∂A) · R
    for each layer, the first one first; r = R[cls] − I[cls].

    signed  leave out the ReLU, so that what speaks against the class counts against

    Source: Chefer et al. (2021), generic attention explainability, arXiv 2103.15679. Raises ValueError as
    `grad_sam` does.
    """
    slopes = check_gradients(maps, "Chefer's relevance")
    start = torch.eye(maps.weights.shape[-1], dtype=maps.weights.dtype, device=maps.weights.device)[cls]
    flow = start.expand(len(maps.weights), 1, -1)
    layers = list(zip(maps.weights.unbind(1), slopes.unbind(1), strict=True))
    for weights, gradients in reversed(layers):  # only the cls row is carried, as in `attention_rollout`
        step = weights * gradients
        flow = flow + flow @ (step if signed else step.relu()).mean(1)
    return flow.squeeze(1) - start


def random_attributions(players: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """Return uniform noise at the players: what an explanation scores that knows nothing."""
    noise = torch.rand(players.shape, generator=torch.Generator().manual_seed(seed))
    return noise.to(players.device) * players


def shapley_input(
    model,
    inputs,
    players: torch.Tensor,
    mask_token_id: int,
    target=None,
    max_players: int = 12,
    operator: str = "mask",
    progress: bool = False,
) -> torch.Tensor:
    """Return exact Shapley values of the explained class's probability when absent tokens are erased.

    Costs 2**n forwards for n players. Raises ValueError before any pass where an input has more than
    `max_players`.
    """
    counts = players.sum(-1).tolist()
    if max(counts) > max_players:
        row = counts.index(max(counts))
        raise ValueError(
            f"input {row} has {counts[row]} players, 2**{counts[row]} forwards; the limit is "
            f"max_players={max_players}: shorten the input, raise it, or use shapley_input_sampled"
        )

    def solve(value, n, row):
        return enumerate_shapley(value, n, max_players)

    return _solve_input_game(model, inputs, players, mask_token_id, target, operator, progress, solve)


def shapley_input_sampled(
    model,
    inputs,
    players: torch.Tensor,
    mask_token_id: int,
    target=None,
    n_permutations: int = 10,
    operator: str = "mask",
    seed: int = 0,
    progress: bool = False,
) -> torch.Tensor:
    """Return unbiased estimates of `shapley_input` for any number of players: permutation sampling of shapiq.

    Costs n_permutations · (n − 1) + 2 forwards for n players; input i draws its orders with 10,000 · seed +
    i. Raises ValueError for fewer than one permutation.
    """
    if n_permutations < 1:
        raise ValueError(f"n_permutations must be at least 1, not {n_permutations}")

    def solve(value, n, row):
        return sampled_shapley(value, n, max(n + 1, n_permutations * (n - 1) + 2), 10_000 * seed + row)

    return _solve_input_game(model, inputs, players, mask_token_id, target, operator, progress, solve)


def _solve_input_game(
    model, inputs, players, mask_token_id, target, operator, progress, solve
) -> torch.Tensor:
    """Solve, by solve(value, n, row), the game of the explained class's probability on partial inputs."""
    check_players(players)
    target = _explained_class(model, inputs, target)
    attributions = torch.zeros(players.shape, device=players.device)
    for row, playing in enumerate(tqdm(players, desc="Shapley-Input", disable=not progress, leave=False)):

        def value(coalitions, row=row, playing=playing):
            keep = ~playing.expand(len(coalitions), -1).clone()
            keep[:, playing] = coalitions.to(playing.device)
            rows = torch.full((len(coalitions),), row, device=playing.device)
            return erased_probabilities(model, inputs, rows, keep, mask_token_id, operator)[:, target[row]]

        attributions[row, playing] = solve(value, int(playing.sum()), row).to(attributions)
    return attributions


def leave_one_out(
    model, inputs, players: torch.Tensor, mask_token_id: int, target=None, operator: str = "mask"
) -> torch.Tensor:
    """Return how much the class's probability falls when each player alone is erased: n + 1 forwards."""
    check_players(players)
    rows, tokens = players.nonzero(as_tuple=True)
    batch, n_tokens = players.shape
    keep = torch.ones(batch + len(rows), n_tokens, dtype=torch.bool, device=players.device)
    keep[batch + torch.arange(len(rows), device=players.device), tokens] = False
    every = torch.cat([torch.arange(batch, device=players.device), rows])
    probabilities = erased_probabilities(model, inputs, every, keep, mask_token_id, operator)
    chosen = resolve_target(model, probabilities[:batch], target)
    p = probabilities.gather(1, chosen[every][:, None]).squeeze(1)
    attributions = torch.zeros(players.shape, device=players.device)
    attributions[rows, tokens] = p[:batch][rows] - p[batch:]
    return attributions


def integrated_gradients(
    model,
    inputs,
    players: torch.Tensor,
    mask_token_id: int,
    target=None,
    n_steps: int = 20,
    batch_size: int = 32,
) -> torch.Tensor:
    """Return integrated gradients of the class's probability from an input whose players are all erased.

    Captum integrates over the embeddings, or the pixels, with `n_steps` points; each token gets the sum over
    its width, each patch the sum over its pixels. The start is [MASK] at every player, or the colour
    `mask_token_id` all over. Source: Sundararajan et al. (2017).
    """
    from captum.attr import IntegratedGradients, LayerIntegratedGradients  # heavy, used here alone

    check_explainable(model, inputs, gradients=True)
    check_players(players)
    images = "pixel_values" in inputs
    if not images:
        check_mask_token(mask_token_id)
    target = _explained_class(model, inputs, target)
    changing = "pixel_values" if images else "input_ids"
    rest = {name: tensor for name, tensor in inputs.items() if name != changing}

    def probability(changed, *others):
        logits = model(**{changing: changed}, **dict(zip(rest, others, strict=True))).logits
        return logits.softmax(-1) * GRADIENT_SCALE

    points = max(
        1, GRADIENT_TOKENS // (players.shape[1] * min(batch_size, len(players)))
    )  # of each input at once
    if images:
        method = IntegratedGradients(probability)
    else:
        method = LayerIntegratedGradients(probability, model.get_input_embeddings())

    def integrate(places):
        part = slice(places.start, places.stop)
        whole = inputs[changing][part]
        if images:
            erased = replacement_pixels(whole, mask_token_id)
        else:
            erased = whole.masked_fill(players[part], mask_token_id)
        fine = method.attribute(
            whole,
            erased,
            target=target[part],
            n_steps=n_steps,
            additional_forward_args=tuple(tensor[part] for tensor in rest.values()),
            internal_batch_size=len(places) * points,
        )
        fine = fine.detach() / GRADIENT_SCALE
        return sum_over_patches(model, fine) if images else fine.sum(-1)

    with fast_attention(model):
        attributions = [part for _, part in in_batches(integrate, range(len(players)), batch_size)]
    return torch.cat(attributions).to(model.dtype) * players


def shap_values(
    model, tokenizer, texts: Sequence[str], target=None, max_evals: int = 500, progress: bool = False
) -> torch.Tensor:
    """Return SHAP's values of the class's probability: its partition explainer over [MASK]ed tokens.

    The hierarchy of tokens is shap's own, so these are Owen values. `max_evals` bounds the masked inputs per
    text. The values stand in the columns of `encode(texts, tokenizer, model)`. Source: Lundberg and Lee
    (2017).
    """
    import shap  # heavy, and only this function needs it

    inputs = encode(texts, tokenizer, model)
    check_mask_token(tokenizer.mask_token_id)
    target = _explained_class(model, inputs, target)
    masker = shap.maskers.Text(tokenizer, collapse_mask_token=False, output_type="token_ids")
    attributions = torch.zeros(inputs["input_ids"].shape, device=model.device)
    for row, text in enumerate(tqdm(texts, desc="SHAP", disable=not progress, leave=False)):
        n_tokens = int(inputs["attention_mask"][row].sum())
        text = text[: int(_last_character(tokenizer, text, n_tokens))]

        def probability(ids, row=row):
            ids = torch.as_tensor(np.stack(list(ids)).astype(np.int64), device=model.device)
            with torch.inference_mode(), fast_attention(model):
                logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
            return logits.softmax(-1)[:, target[row]].float().cpu().numpy()

        explainer = shap.explainers.Partition(probability, masker)
        explanation = explainer(
            [text], max_evals=max(max_evals, 2 * n_tokens + 1), batch_size=64, silent=True
        )
        attributions[row, :n_tokens] = torch.as_tensor(explanation.values[0], dtype=torch.float32)
    return attributions * token_players(inputs, tokenizer)


def _real_tokens(maps: AttentionMaps) -> torch.Tensor:
    """Return bool (batch, tokens), False at padding."""
    batch, *_, tokens = maps.weights.shape
    if maps.real is not None:
        return maps.real
    return torch.ones(batch, tokens, dtype=torch.bool, device=maps.weights.device)


def _n_maps(maps: AttentionMaps) -> int:
    return maps.weights.shape[1] * maps.weights.shape[2]


def _explained_class(model, inputs, target) -> torch.Tensor:
    """Return (batch,) class numbers; only the prediction, target=None, costs a forward pass."""
    if target is None or isinstance(target, str):
        with torch.inference_mode(), fast_attention(model):
            return resolve_target(model, model(**inputs).logits, target).clone()
    batch = len(next(iter(inputs.values())))
    return resolve_target(model, torch.zeros(batch, model.config.num_labels, device=model.device), target)


def _last_character(tokenizer, text: str, n_tokens: int) -> int:
    """Return where the text ends for the model: its length, or the cut that `encode` made."""
    offsets = tokenizer(text, return_offsets_mapping=True, truncation=True, max_length=n_tokens)[
        "offset_mapping"
    ]
    return (
        max(end for _, end in offsets)
        if len(tokenizer(text, verbose=False)["input_ids"]) > n_tokens
        else len(text)
    )
