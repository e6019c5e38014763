"""Does an explanation depend on what the model has learned? Randomise its weights, and look again.

Source: Adebayo et al. (2018), Sanity checks for saliency maps.
"""

import copy
from collections.abc import Iterator

import numpy as np
import torch
from scipy.stats import spearmanr

from helpers.models import transformer_blocks


def randomisation_cascade(model, seed: int = 0, group: int = 1) -> Iterator[tuple[str, torch.nn.Module]]:
    """Yield (step, model) as the weights of a copy are drawn anew, from the head down: "head", last layer,
    ..., "embeddings".

    group  layers that one step draws together, "layers 9–11" of twelve; the lowest step may hold fewer

    Every step keeps the randomness of the steps before it. Weights are drawn as the model's own class draws
    them before training. The model itself is left as it is; what is yielded is one object, changed from step
    to step. Raises ValueError for a group below 1.
    """
    if group < 1:
        raise ValueError(f"a step draws one layer or more anew, not {group}")
    randomised = copy.deepcopy(model)
    layers = transformer_blocks(randomised)
    inside = {id(module) for layer in layers for module in layer.modules()}
    modules = list(randomised.modules())  # in the order of the forward pass: embeddings, layers, head
    first = modules.index(layers[0])
    steps = [("head", [module for module in modules[first:] if id(module) not in inside])]
    for stop in range(len(layers), 0, -group):
        start = max(0, stop - group)
        name = f"layers {start}–{stop - 1}" if stop - start > 1 else f"layer {start}"
        steps.append((name, [module for layer in layers[start:stop] for module in layer.modules()]))
    steps.append(("embeddings", modules[:first]))
    for number, (name, chosen) in enumerate(steps):
        with torch.random.fork_rng():
            torch.manual_seed(1000 * seed + number)  # no step of another seed has the same
            for module in chosen:
                _draw_again(randomised, module)
        yield name, randomised


def rank_correlations(first: torch.Tensor, second: torch.Tensor, players: torch.Tensor) -> np.ndarray:
    """Return Spearman's correlation (batch,) of two attributions (batch, tokens) at each input's players.

    NaN where an input has fewer than three players, or one of the two ranks nothing there. Before a mean over
    inputs, take the size |ρ| where a reversed order counts as the same one: signs that differ from input to
    input would cancel.
    """
    found = np.full(len(players), np.nan)
    for row, (one, two, playing) in enumerate(zip(first.cpu(), second.cpu(), players.cpu(), strict=True)):
        pair = [values[playing].double().numpy() for values in (one, two)]
        if playing.sum() > 2 and min(map(np.ptp, pair)) > 0:
            found[row] = spearmanr(*pair).statistic
    return found


@torch.no_grad()
def _draw_again(model, module) -> None:
    """Draw a module's own weights as its model class does."""
    own = dict(module.named_parameters(recurse=False))
    for parameter in own.values():
        parameter._is_hf_initialized = False
    module._is_hf_initialized = False
    if own:
        model._init_weights(module)
