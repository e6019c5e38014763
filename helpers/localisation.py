"""Does a heatmap point at the thing? Patch attributions against the mask of a known object."""

from dataclasses import dataclass

import torch
from sklearn.metrics import average_precision_score

from helpers.faithfulness import TIE
from helpers.images import patch_grid

INSIDE = 0.5  # a patch is inside when at least this share of its pixels is


@dataclass
class Localisation:
    """How well each attribution finds the patches inside a mask; higher is better, `chance` knows nothing.

    pointing           (..., batch) 1 where the largest attribution is inside, 0 outside, a share where
                       several tie
    average_precision  (..., batch) of ranking inside before outside
    mass_inside        (..., batch) share of the positive attribution that is inside; 0 where nothing is
                       positive
    chance             (batch,) share of the patches that are inside: what a random ranking expects of all
                       three (of the precision a little more, over few patches)
    """

    pointing: torch.Tensor
    average_precision: torch.Tensor
    mass_inside: torch.Tensor
    chance: torch.Tensor


def patches_inside(model, inputs, masks, at_least: float = INSIDE) -> torch.Tensor:
    """Return bool (batch, tokens): patches with `at_least` this share inside masks (batch, height, width).

    Masks may have another size than the encoded images, but must show the same crop.
    """
    prefix, rows, columns = patch_grid(model, inputs["pixel_values"].shape[-2:])
    masks = torch.as_tensor(masks, dtype=torch.float32, device=inputs["pixel_values"].device)
    share = torch.nn.functional.adaptive_avg_pool2d(masks, (rows, columns)).flatten(1)
    return torch.nn.functional.pad(share >= at_least - 1e-6, (prefix, 0))


def localise(attributions: torch.Tensor, players: torch.Tensor, inside: torch.Tensor) -> Localisation:
    """Compare attributions (batch, tokens) or (methods, batch, tokens) with the patches inside a mask.

    inside  bool (batch, tokens), from `patches_inside`

    Sources: Zhang et al. (2018) for the pointing game; Arras et al. (2022) for the share of mass.
    Raises ValueError for shapes that do not fit, NaN, or an image whose mask holds no patch or every patch.
    """
    if attributions.shape[-2:] != players.shape or inside.shape != players.shape:
        raise ValueError(
            f"shapes differ: {tuple(attributions.shape)}, {tuple(players.shape)}, {tuple(inside.shape)}"
        )
    if not torch.isfinite(attributions.masked_fill(~players, 0)).all():
        raise ValueError("the attributions hold NaN or infinity at a patch")
    inside = inside & players
    chance = inside.sum(-1) / players.sum(-1)
    if ((chance == 0) | (chance == 1)).any():
        row = int(((chance == 0) | (chance == 1)).nonzero()[0])
        raise ValueError(
            f"the mask of image {row} holds {int(inside[row].sum())} of {int(players[row].sum())} patches"
        )
    scores = attributions.masked_fill(~players, -torch.inf)
    tolerance = TIE * (attributions * players).abs().amax(-1, keepdim=True)
    largest = scores >= scores.amax(-1, keepdim=True) - tolerance
    pointing = (largest & inside).sum(-1) / largest.sum(-1)
    positive = attributions.clamp(min=0) * players
    mass = (positive * inside).sum(-1) / positive.sum(-1).clamp(min=torch.finfo(positive.dtype).tiny)
    precision = [
        average_precision_score(truth[playing].cpu(), values[playing].cpu())
        for method in attributions.reshape(-1, *players.shape)
        for values, playing, truth in zip(method, players, inside, strict=True)
    ]
    return Localisation(pointing, torch.tensor(precision).reshape(pointing.shape), mass, chance)
