"""Concept activation vectors by the many: draws of images, random ones, scores of targets, save and load."""

import json
import os
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from tqdm.auto import tqdm

from helpers.activations import (
    Activations,
    input_range,
    model_key,
    model_name,
    pooled,
    select_images,
    take_rows,
)
from helpers.directions import fit_directions, held_out_accuracy
from helpers.images import MIN_IMAGES
from helpers.labels import find_class
from helpers.models import transformer_blocks
from helpers.runtime import in_batches
from helpers.tcav import attention_scale, plain_derivatives, token_states, top_tokens

DAMAGE = (SafetensorError, OSError, KeyError, TypeError, ValueError)  # what reading a broken file raises


@dataclass(frozen=True)
class Cavs:
    """Concept activation vectors of one kind, and the model that they belong to.

    vectors     (layers, concepts, draws, hidden) float32, unit norm
    layers      number of each layer, counted from 0
    concepts    name of each concept
    kind        one of KINDS; model_id, model_key and n_layers as in Activations
    thresholds  (layers, concepts, draws) where along each vector the border lies, or None where nobody asked
    n_images    images on either side of a fit, the fewest of any concept; a null should have as many
    """

    vectors: np.ndarray
    layers: tuple[int, ...]
    concepts: tuple[str, ...]
    kind: str
    model_id: str
    model_key: str
    n_layers: int
    thresholds: np.ndarray | None = None
    n_images: int = 0


def fit_cavs(
    activations: Mapping[str, Activations],
    n_draws: int = 50,
    random: Activations | None = None,
    kinds: Sequence[str] = ("logistic",),
    concepts: Sequence[str] | None = None,
    seed: int = 0,
    progress: bool = False,
    device="cpu",
) -> dict[str, Cavs]:
    """Fit {kind: CAVs}, one for each layer, concept and draw: its tokens against those of other images.

    activations  {concept: its activations}
    random       activations of random images to contrast with; None contrasts with the other concepts
                 ("relative" CAVs)
    concepts     those to fit CAVs for, all by default
    device       where to fit; a GPU takes all draws of a concept and layer at once, too

    Draw k contrasts with as many images as the concept has, drawn without replacement with seed + k. Warns
    where only one such draw is possible, and as `fit_directions` does. Raises ValueError for one concept
    without random images, too few images on either side, or activations of different models.
    """
    draws = _draw_contrasts(activations, random, concepts, n_draws, seed)
    return _fit(next(iter(activations.values())), draws, kinds, progress, device)


def fit_random_cavs(
    random: Activations,
    n_images: int,
    n_draws: int = 50,
    kinds: Sequence[str] = ("logistic",),
    seed: int = 0,
    progress: bool = False,
    device="cpu",
) -> dict[str, Cavs]:
    """Fit {kind: CAVs} of `n_images` random images against as many others, for the empirical null.

    The random images are dealt into pools of 2 · n_images, every draw halves one of them, and the pools take
    turns. So all draws of a pool share their rows, and hundreds cost little more than one. The one concept is
    "random". Raises ValueError where there are fewer than 2 · n_images random images.
    """
    n_pools = len(random) // (2 * max(n_images, 1))
    if n_images < 1 or n_draws < 1 or not n_pools:
        raise ValueError(
            f"{n_images} random images against others need {2 * n_images} of them, not {len(random)}"
        )
    pools = np.random.default_rng(seed).permutation(len(random))[: n_pools * 2 * n_images]
    fits = []
    for number, pool in enumerate(pools.reshape(n_pools, -1)[:n_draws]):
        draws = range(number, n_draws, n_pools)
        orders = [np.random.default_rng([seed, draw]).permutation(len(pool)) for draw in draws]
        positive = np.stack(orders, axis=1) < n_images
        part = select_images(random, np.sort(pool))
        fits.append(_fit(random, {"random": ([part], positive, ~positive)}, kinds, progress, device))
    order = np.argsort(np.concatenate([np.arange(k, n_draws, n_pools) for k in range(len(fits))]))
    joined = {}
    for kind in kinds:
        vectors, thresholds = (
            np.concatenate([getattr(fit[kind], name) for fit in fits], axis=2)[:, :, order]
            for name in ("vectors", "thresholds")
        )
        joined[kind] = replace(fits[0][kind], vectors=vectors, thresholds=thresholds)
    return joined


def equal_draws(cavs: Cavs) -> np.ndarray:
    """Return bool (layers, concepts): whether all draws are one vector, so that their scores cannot vary."""
    vectors = cavs.vectors.astype(np.float64)
    return ((vectors * vectors[:, :, :1]).sum(-1) > 1 - 1e-6).all(-1)


def cav_accuracies(
    activations: Mapping[str, Activations],
    n_folds: int = 5,
    n_draws: int = 1,
    kinds: Sequence[str] = ("logistic",),
    concepts: Sequence[str] | None = None,
    seed: int = 0,
    progress: bool = False,
    device="cpu",
) -> dict[str, np.ndarray]:
    """Return {kind: (layers, concepts, draws, folds)}: held-out accuracies on the draws of `fit_cavs`.

    Folds are by image, see `held_out_accuracy`; all draws are folded with `seed`.
    """
    draws = _draw_contrasts(activations, None, concepts, n_draws, seed)
    layers = next(iter(activations.values())).layers
    found = [
        held_out_accuracy(*pooled(sources, layer), positive, negative, n_folds, kinds, seed, device)
        for layer in tqdm(layers, desc="accuracy", disable=not progress, leave=False)
        for sources, positive, negative in draws.values()
    ]
    shape = len(layers), len(draws), n_draws, n_folds
    return {kind: np.reshape([part[kind] for part in found], shape) for kind in kinds}


def _fit(
    source: Activations, draws: Mapping[str, tuple], kinds: Sequence[str], progress: bool, device
) -> dict[str, Cavs]:
    """Return {kind: CAVs} of {concept: (sources, positive, negative)}, with the model of `source`."""
    found = [
        fit_directions(*pooled(sources, layer), positive, negative, kinds, device)
        for layer in tqdm(source.layers, desc="CAVs", disable=not progress, leave=False)
        for sources, positive, negative in draws.values()
    ]
    cavs, n_images = {}, min(int(positive.sum(0).min()) for _, positive, _ in draws.values())
    for kind in kinds:
        vectors, thresholds = (np.stack(part) for part in zip(*(part[kind] for part in found), strict=True))
        shape = len(source.layers), len(draws)
        vectors, thresholds = (part.reshape(*shape, *part.shape[1:]) for part in (vectors, thresholds))
        model = source.model_id, source.model_key, source.n_layers
        cavs[kind] = Cavs(vectors, tuple(source.layers), tuple(draws), kind, *model, thresholds, n_images)
    return cavs


def _pool(
    activations: Mapping[str, Activations], concept: str, random: Activations | None
) -> list[Activations]:
    """Return the sets of images that a concept is contrasted with."""
    return [random] if random is not None else [part for name, part in activations.items() if name != concept]


def _draw_contrasts(activations, random, concepts, n_draws: int, seed: int) -> dict[str, tuple]:
    """Return {concept: (sources, positive, negative)}: its set and its pool, bool (images, draws) of both."""
    _check_draws(activations, random, n_draws)
    drawn = {}
    for concept in concepts or activations:
        sources = [activations[concept], *_pool(activations, concept, random)]
        n_images, total = len(sources[0]), sum(map(len, sources))
        positive, negative = np.zeros((2, total, n_draws), dtype=bool)
        positive[:n_images] = True
        for draw in range(n_draws):
            chosen = np.random.default_rng(seed + draw).choice(total - n_images, n_images, replace=False)
            negative[n_images + chosen, draw] = True
        drawn[concept] = sources, positive, negative
    return drawn


WEIGHTINGS = ("attention", "plain", "cls", "no cls", "top")


def image_scores(
    model, inputs, target, cavs: Mapping[str, Cavs], batch_size: int = 32, progress: bool = False
) -> dict[str, dict[str, np.ndarray]]:
    """Return {name: {weighting: (layers, concepts, images, draws)}}, mean derivatives over the real tokens.

    inputs  the target images (or texts), any number of rows
    target  as in `token_gradients`, one for all
    cavs    {name: CAVs}, so that several kinds and the random ones share one forward and one backward pass

    The weightings are attention; plain; cls, the classification token alone; no cls, attention at all other
    tokens; and top, only the tokens of `top_tokens`. TTCAV scores are `(scores > 0).mean(-2)`, (layers,
    concepts, draws).
    """
    target = find_class(model, target) if isinstance(target, str) else target
    collected: dict[str, dict[str, list]] = {name: {w: [] for w in WEIGHTINGS} for name in cavs}

    def score(places):
        """Return {(name, weighting): (layers, concepts, images, draws)} of some images."""
        batch, found = take_rows(model, inputs, places), {}
        states, gradients, attention = token_states(model, batch, target)
        real = batch.get("attention_mask", states[0].new_ones(states[0].shape[:2])).bool()
        for name, group in cavs.items():
            layers = [
                _image_means(states[layer], gradients[layer], attention[layer], real, vectors)
                for layer, vectors in zip(group.layers, group.vectors, strict=True)
            ]
            for weighting in WEIGHTINGS:
                found[name, weighting] = np.stack([means[weighting] for means in layers])
        return found

    for _, found in in_batches(score, input_range(inputs), batch_size, desc="images" if progress else None):
        for (name, weighting), part in found.items():
            collected[name][weighting].append(part)
    return {
        name: {weighting: np.concatenate(parts, axis=2) for weighting, parts in weightings.items()}
        for name, weightings in collected.items()
    }


def _image_means(states, gradients, cls_attention, real, vectors) -> dict[str, np.ndarray]:
    """Return {weighting: means over tokens (concepts, images, draws)}, vectors (concepts, draws, hidden)."""
    cavs = vectors.reshape(-1, vectors.shape[-1])
    s = plain_derivatives(gradients, cavs)
    a, scale = cls_attention.to(s), attention_scale(s, cls_attention)
    sums = {
        "attention": torch.einsum("bt,btn->bn", a, s) * scale,
        "no cls": torch.einsum("bt,btn->bn", a[:, 1:], s[:, 1:]) * scale,
        "plain": s.sum(1),
        "cls": s[:, 0],
        "top": (s * top_tokens(states, cavs, real)).sum(1),
    }
    means = {weighting: part.float().T / real.sum(1) for weighting, part in sums.items()}
    return {
        weighting: part.unflatten(0, vectors.shape[:2]).transpose(1, 2).cpu().numpy()
        for weighting, part in means.items()
    }


def save_cavs(cavs: Cavs, path: str | Path) -> None:
    """Write CAVs as safetensors, with the model, layers, concepts, draws and width in its metadata."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {
        "model_id": cavs.model_id,
        "model_key": cavs.model_key,
        "n_layers": str(cavs.n_layers),
        "kind": cavs.kind,
        "layers": json.dumps(cavs.layers),
        "concepts": json.dumps(cavs.concepts),
        "draws": str(cavs.vectors.shape[2]),
        "hidden": str(cavs.vectors.shape[3]),
        "n_images": str(cavs.n_images),
    }
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        arrays = {"vectors": np.ascontiguousarray(cavs.vectors)}
        if cavs.thresholds is not None:
            arrays["thresholds"] = np.ascontiguousarray(cavs.thresholds)
        save_file(arrays, Path(scratch, path.name), metadata)
        os.replace(Path(scratch, path.name), path)


def load_cavs(path: str | Path, model) -> Cavs:
    """Read CAVs that `save_cavs` wrote for this very model.

    Raises FileNotFoundError without the file, ValueError for a damaged one or CAVs of another model or layer
    count.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there are no CAVs at {path.name}; run 03_concept_training first")
    try:
        with safe_open(path, "np") as file:
            names, saved = list(file.keys()), file.metadata()
            arrays = {name: file.get_tensor(name) for name in names}
        layers, concepts = (tuple(json.loads(saved[name])) for name in ("layers", "concepts"))
        model_of = saved["model_id"], saved["model_key"], int(saved["n_layers"])
        vectors, thresholds = arrays["vectors"], arrays.get("thresholds")
        n_images = int(saved["n_images"])
        cavs = Cavs(vectors, layers, concepts, saved["kind"], *model_of, thresholds, n_images)
    except DAMAGE as error:
        raise ValueError(
            f"{path.name} is damaged or holds no CAVs; run 03_concept_training again ({error})"
        ) from error
    n_layers, hidden = len(transformer_blocks(model)), model.config.hidden_size
    ours, theirs = f"this model, {model_name(model)!r},", f"{path.name} holds CAVs of {cavs.model_id!r}"
    if (cavs.n_layers, vectors.shape[-1]) != (n_layers, hidden):
        theirs = f"{theirs} with {cavs.n_layers} layers of width {vectors.shape[-1]}"
        ours = f"{ours} has {n_layers} of width {hidden}"
        raise ValueError(f"{theirs}, but {ours}; run 03_concept_training with this model")
    if cavs.model_key != model_key(model):
        raise ValueError(f"{theirs}, but {ours} has other weights; run 03_concept_training with this model")
    return cavs


def _check_draws(activations: Mapping[str, Activations], random: Activations | None, n_draws: int) -> None:
    if not activations or n_draws < 1:
        raise ValueError(
            f"there are {len(activations)} concepts and {n_draws} draws to fit; give at least one of each"
        )
    if random is None and len(activations) < 2:
        raise ValueError(
            f"{next(iter(activations))!r} is the only concept, and relative CAVs contrast it with others: "
            "add a concept, or pass activations of random images"
        )
    sources = [*activations.values(), *([] if random is None else [random])]
    if len({(source.model_key, tuple(source.layers)) for source in sources}) > 1:
        raise ValueError(
            "the activations come from different models or layers; collect all of them with one model"
        )
    for concept in activations:
        n_images, n_others = len(activations[concept]), sum(map(len, _pool(activations, concept, random)))
        if n_images < MIN_IMAGES:
            raise ValueError(
                f"concept {concept!r} has {n_images} images, too few for a CAV; give {MIN_IMAGES} or more"
            )
        if n_others < n_images:
            raise ValueError(
                f"concept {concept!r} has {n_images} images but only {n_others} to contrast with; "
                "add images, or keep fewer of the concept's"
            )
        if n_others == n_images and n_draws > 1:
            way_out = "give a third concept" if random is None else "give more random images"
            warnings.warn(
                f"concept {concept!r} has as many images to contrast with as its own {n_images}, "
                f"so its {n_draws} draws are all equal; {way_out}",
                stacklevel=4,
            )
