"""Does the decision hang on the tokens that an explanation ranks first? Erase them, or keep only them.

Tokens are those of a text or the patches of an image; both are erased, scored and shared in the same way.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from helpers.images import PATCH_OPERATORS, erase_patches, patch_players
from helpers.labels import resolve_target
from helpers.models import check_explainable, check_players, fast_attention
from helpers.runtime import in_batches

OPERATORS = ("mask", "delete", "pad", "attention_mask")  # of tokens; those of patches are in helpers.images
KS = (0, 10, 20, 50)  # percent of the players in the rationale
BATCH_TOKENS = 1024  # tokens in one pass of erased inputs: on a CPU larger batches are slower
TIE = 1e-6  # attributions closer than this share of the largest one are equal


@dataclass
class ErasureScores:
    """Faithfulness of each input; a leading methods dimension is there when the attributions had one.

    comprehensiveness  (..., batch) Σ_k (p − p without the rationale) / (|K| + 1), higher is better
    sufficiency        (..., batch) Σ_k (p − p of the rationale alone) / (|K| + 1), lower is better
    kept_predictions   (..., batch, len(ks)) class predicted from the rationale alone
    probability        (batch,) p, the probability of the explained class on the whole input
    """

    comprehensiveness: torch.Tensor
    sufficiency: torch.Tensor | None
    kept_predictions: torch.Tensor | None
    probability: torch.Tensor


@dataclass
class ErasureCurves:
    """Probability of the explained class as more and more of the ranking is erased, or kept alone.

    ks                (K,) percent of the players in the rationale
    without           (..., batch, K) probability without the rationale: the deletion curve
    alone             (..., batch, K) probability of the rationale alone: the insertion curve
    kept_predictions  (..., batch, K) class predicted from the rationale alone
    probability       (batch,) p, the probability of the explained class on the whole input
    """

    ks: tuple[float, ...]
    without: torch.Tensor
    alone: torch.Tensor | None
    kept_predictions: torch.Tensor | None
    probability: torch.Tensor

    @property
    def deletion_area(self) -> torch.Tensor:
        """Area (..., batch) under the deletion curve, 0 to 1 where ks run from 0 to 100; lower is better."""
        return torch.trapezoid(self.without, torch.tensor(self.ks, device=self.without.device) / 100)

    @property
    def insertion_area(self) -> torch.Tensor:
        """Area (..., batch) under the insertion curve; higher is better."""
        assert self.alone is not None
        return torch.trapezoid(self.alone, torch.tensor(self.ks, device=self.alone.device) / 100)

    def scores(self, ks: Sequence[float] = KS) -> ErasureScores:
        """Return the scores over some of this curve's ks. Raises ValueError for another k."""
        if not set(ks) <= set(self.ks):
            raise ValueError(f"the curve was drawn at {self.ks}, not at all of {tuple(ks)}")
        at = [self.ks.index(k) for k in ks]
        p, divisor = self.probability[:, None], len(ks) + 1
        comprehensiveness = (p - self.without[..., at]).sum(-1) / divisor
        if self.alone is None or self.kept_predictions is None:
            return ErasureScores(comprehensiveness, None, None, self.probability)
        sufficiency = (p - self.alone[..., at]).sum(-1) / divisor
        return ErasureScores(comprehensiveness, sufficiency, self.kept_predictions[..., at], self.probability)


def rationale(attributions: torch.Tensor, players: torch.Tensor, k: float) -> torch.Tensor:
    """Return bool (..., batch, tokens): the top ⌈k·n/100⌉ of each input's n players.

    Players that tie across the cut are all left out: an explanation that does not rank them does not choose
    them. So the rationale does not depend on the order of the tokens, and a constant attribution has none
    below k = 100.
    """
    scores = attributions.masked_fill(~players, -torch.inf)
    n = players.sum(-1)
    size = torch.ceil(
        (k * n.double() / 100).round(decimals=9)
    ).long()  # 20 % of 5 is 1, not 1.0000000000000002
    padded = torch.nn.functional.pad(scores.sort(-1, descending=True).values, (0, 1), value=-torch.inf)
    first_left_out = padded.gather(-1, size.expand(scores.shape[:-1])[..., None])
    tolerance = TIE * attributions.masked_fill(~players, 0).abs().amax(-1, keepdim=True)
    return players & (scores > first_left_out + tolerance) & (size > 0)[:, None]


def erasure_scores(
    model,
    inputs,
    attributions: torch.Tensor,
    players: torch.Tensor,
    mask_token_id: int,
    ks: Sequence[float] = KS,
    operator: str = "mask",
    target=None,
    progress: bool = False,
    sufficiency: bool = True,
) -> ErasureScores:
    """Score attributions by comprehensiveness and sufficiency (DeYoung et al., 2020), with F1's predictions.

    Arguments and errors as in `erasure_curves`.
    """
    options = {"operator": operator, "target": target, "progress": progress, "sufficiency": sufficiency}
    return erasure_curves(model, inputs, attributions, players, mask_token_id, ks, **options).scores(ks)


def erasure_curves(
    model,
    inputs,
    attributions: torch.Tensor,
    players: torch.Tensor,
    mask_token_id: int | torch.Tensor | None,
    ks: Sequence[float] = tuple(range(0, 101, 10)),
    operator: str = "mask",
    target=None,
    progress: bool = False,
    sufficiency: bool = True,
) -> ErasureCurves:
    """Erase the rationale, and all else, at each k: deletion and insertion curves (Petsiuk et al., 2018).

    inputs         what the model takes: input_ids and attention_mask (batch, tokens), or pixel_values
    attributions   (batch, tokens), or (methods, batch, tokens): then equal erased inputs of all methods are
                   scored once
    players        bool (batch, tokens); other tokens are never erased
    mask_token_id  what an erased token becomes: the id of [MASK]; for patches a colour (channels,) in the
                   units of pixel_values, None for 0, which is the mean that most processors subtract
    ks             percents of the players in the rationale, each from 0 to 100
    operator       what erasing does, for text: "mask" by mask_token_id, "delete", "pad" by the padding token,
                   "attention_mask"; for patches: "mask" or "mean" by that colour, "blur", "noise"
    target         explained class as in `read_attention`; None is the prediction on the whole input
    sufficiency    also run the rationale alone; without it, half of the passes, `alone` and what follows are
                   None

    Raises ValueError for ks that are no percents, an unknown operator, no id to mask with, players that are
    not bool or special tokens only, attributions of another shape or with NaN, and as `check_explainable`
    does.
    """
    players = players.to(model.device)
    attributions = torch.as_tensor(attributions).to(model.device)
    _check_erasure(model, inputs, attributions, players, ks)
    batch, n_tokens = players.shape
    chosen = torch.stack([rationale(attributions, players, k) for k in ks], -2)  # (..., batch, K, tokens)
    sides = [~chosen, chosen | ~players[:, None]] if sufficiency else [~chosen]
    keep = torch.stack(sides, -4)  # (..., without or alone, batch, K, tokens)
    rows = torch.arange(batch, device=model.device)[:, None].expand(keep.shape[:-1]).reshape(-1)
    whole = torch.ones(batch, n_tokens, dtype=torch.bool, device=model.device)
    probabilities = erased_probabilities(
        model,
        inputs,
        torch.cat([rows[: batch * len(ks) : len(ks)], rows]),
        torch.cat([whole, keep.reshape(-1, n_tokens)]),
        mask_token_id,
        operator,
        progress,
    )
    explained = resolve_target(model, probabilities[:batch], target)
    p = probabilities[:batch].gather(1, explained[:, None]).squeeze(1)
    erased = probabilities[batch:].reshape(*keep.shape[:-1], -1)
    index = explained[:, None, None].expand(*erased.shape[:-1], 1)
    without, *alone = erased.gather(-1, index).squeeze(-1).unbind(-3)
    kept = erased.argmax(-1).unbind(-3)[1:]
    return ErasureCurves(tuple(ks), without, alone[0] if alone else None, kept[0] if kept else None, p)


def erased_probabilities(
    model,
    inputs,
    rows: torch.Tensor,
    keep: torch.Tensor,
    mask_token_id: int | torch.Tensor | None,
    operator: str = "mask",
    progress: bool = False,
    batch_tokens: int = BATCH_TOKENS,
) -> torch.Tensor:
    """Return class probabilities (count, classes) of partly erased inputs.

    rows  (count,) which input each erased copy starts from
    keep  bool (count, tokens), True for tokens that stay; padding and the tokens before an image's patches
          always do

    Equal copies run once, sorted by length in batches of about `batch_tokens` tokens, in inference mode and
    under fused attention. Results do not depend on the order or number of the copies beyond floating-point
    rounding.
    """
    images = "pixel_values" in inputs
    known = ("mask", *PATCH_OPERATORS) if images else OPERATORS
    if operator not in known:
        raise ValueError(f"operator {operator!r} is unknown; use one of {', '.join(known)}")
    if operator == "mask" and not images:
        check_mask_token(mask_token_id)
    check_explainable(model, inputs)
    real = patch_players(model, inputs) if images else inputs["attention_mask"].bool()
    keep = keep | ~real[rows]  # padding stays as it is, so copies that differ only there are equal
    packed = np.packbits(keep.cpu().numpy(), axis=1)
    key = np.concatenate([rows.cpu().numpy()[:, None].astype(np.int64).view(np.uint8), packed], axis=1)
    _, first, inverse = np.unique(key, axis=0, return_index=True, return_inverse=True)
    lengths = real.sum(-1)[rows].cpu().numpy()
    order = first[np.argsort(-lengths[first], kind="stable")].tolist()  # longest first: it bounds its batch
    position = np.empty(len(key), dtype=np.int64)
    position[order] = np.arange(len(order))

    def run(part):
        part = torch.as_tensor(part, device=rows.device)
        erased = erase(model, inputs, rows[part], keep[part], mask_token_id, operator)
        return model(**erased).logits.float().softmax(-1)

    with torch.inference_mode(), fast_attention(model):
        batches = in_batches(
            run, order, batch_tokens, lambda copy: int(lengths[copy]), "erasing" if progress else None
        )
        results = [probabilities for _, probabilities in batches]
    found = torch.as_tensor(position[first[inverse.reshape(-1)]], device=rows.device)
    return torch.cat(results).clone()[found]


def erase(
    model, inputs, rows: torch.Tensor, keep: torch.Tensor, mask_token_id, operator: str = "mask"
) -> dict:
    """Return the inputs of chosen rows, what is outside `keep` erased, texts cut to the longest."""
    if "pixel_values" in inputs:
        return erase_patches(model, inputs["pixel_values"][rows], keep, mask_token_id, operator)
    rows = rows.to(inputs["input_ids"].device)
    width = int(inputs["attention_mask"][rows].sum(-1).max())
    erased = {name: tensor[rows, :width] for name, tensor in inputs.items()}
    gone = ~keep[:, :width] & erased["attention_mask"].bool()
    ids, attention = erased["input_ids"], erased["attention_mask"]
    if operator == "mask":
        erased["input_ids"] = ids.masked_fill(gone, mask_token_id)
    elif operator == "pad":
        erased["input_ids"] = ids.masked_fill(gone, model.config.pad_token_id)
    elif operator == "attention_mask":
        erased["attention_mask"] = attention.masked_fill(gone, 0)
    else:  # delete: what stays moves left, in order
        order = (gone | ~attention.bool()).to(torch.uint8).argsort(dim=-1, stable=True)
        erased = {name: tensor.gather(1, order) for name, tensor in erased.items()}
        left = (~gone & attention.bool()).sum(-1)
        erased["attention_mask"] = (torch.arange(width, device=left.device) < left[:, None]).to(
            attention.dtype
        )
    return erased


def check_mask_token(mask_token_id: int | torch.Tensor | None) -> None:
    """Raise ValueError where there is no token to mask with."""
    if mask_token_id is None:
        raise ValueError(
            "mask_token_id is None, so there is no token to mask with; give tokenizer.mask_token_id, or "
            "where the "
            "tokenizer has none, erase by another operator: delete, pad or attention_mask"
        )


def check_percents(ks: Sequence[float]) -> None:
    """Raise ValueError for ks that are no percents of the players: outside 0 to 100, or all shares of 1."""
    if not len(ks) or any(not 0 <= k <= 100 for k in ks):
        raise ValueError(f"ks are percents of the players, each from 0 to 100, not {tuple(ks)}")
    if 0 < max(ks) <= 1:
        raise ValueError(
            f"ks are percents of the players, and {tuple(ks)} look like shares; give 20 for a fifth"
        )


def _check_erasure(
    model, inputs, attributions: torch.Tensor, players: torch.Tensor, ks: Sequence[float]
) -> None:
    check_explainable(model, inputs)
    check_percents(ks)
    check_players(players)
    if attributions.shape[-2:] != players.shape or attributions.ndim > 3:
        raise ValueError(
            f"attributions {tuple(attributions.shape)} do not fit players {tuple(players.shape)}"
        )
    if not torch.isfinite(attributions.masked_fill(~players, 0)).all():
        raise ValueError("the attributions hold NaN or infinity at a player")
    if "attention_mask" in inputs:  # [CLS] comes first and the separator last
        inner = inputs["attention_mask"].bool().clone()
        inner[:, 0] = False
        inner[torch.arange(len(inner)), inputs["attention_mask"].sum(-1) - 1] = False
        if (special := inner.any(-1) & ~(players & inner).any(-1)).any():
            row = special.nonzero()[0].item()
            raise ValueError(
                f"the players of input {row} are special tokens only; take those of token_players"
            )
