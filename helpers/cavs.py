"""Concept activation vectors by the many: draws, random ones for the null, held-out accuracy, save and
load.
"""

import json
import os
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from joblib import Parallel, delayed
from safetensors import safe_open
from safetensors.numpy import save_file
from sklearn.model_selection import StratifiedGroupKFold
from tqdm.auto import tqdm

from helpers.activations import (
    DAMAGE,
    Activations,
    Part,
    gather,
    input_range,
    model_key,
    model_name,
    take_rows,
)
from helpers.images import MIN_IMAGES
from helpers.labels import find_class
from helpers.models import transformer_blocks
from helpers.runtime import in_batches
from helpers.tcav import (
    attention_weighted_derivatives,
    cls_derivatives,
    fit_direction,
    new_regression,
    plain_derivatives,
    token_gradients,
)

DRAWS_A_JOB = 10  # draws that one worker fits, each from the solution of the one before


@dataclass(frozen=True)
class Cavs:
    """Concept activation vectors, and the model that they belong to.

    vectors   (layers, concepts, draws, hidden) float32, unit norm
    layers    number of each layer, counted from 0
    concepts  name of each concept
    kind      one of KINDS; model_id, model_key and n_layers as in Activations
    """

    vectors: np.ndarray
    layers: tuple[int, ...]
    concepts: tuple[str, ...]
    kind: str
    model_id: str
    model_key: str
    n_layers: int


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
    }
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        save_file({"vectors": np.ascontiguousarray(cavs.vectors)}, Path(scratch, path.name), metadata)
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
            vectors, saved = file.get_tensor("vectors"), file.metadata()
        layers, concepts = (tuple(json.loads(saved[name])) for name in ("layers", "concepts"))
        cavs = Cavs(
            vectors,
            layers,
            concepts,
            saved["kind"],
            saved["model_id"],
            saved["model_key"],
            int(saved["n_layers"]),
        )
    except DAMAGE as error:
        raise ValueError(
            f"{path.name} is damaged or holds no CAVs; run 03_concept_training again ({error})"
        ) from error
    n_layers, hidden = len(transformer_blocks(model)), model.config.hidden_size
    ours, theirs = f"this model, {model_name(model)!r},", f"{path.name} holds CAVs of {cavs.model_id!r}"
    if (cavs.n_layers, vectors.shape[-1]) != (n_layers, hidden):
        raise ValueError(
            f"{theirs} with {cavs.n_layers} layers of width {vectors.shape[-1]}, but {ours} has {n_layers} of width "
            f"{hidden}; run 03_concept_training with this model"
        )
    if cavs.model_key != model_key(model):
        raise ValueError(f"{theirs}, but {ours} has other weights; run 03_concept_training with this model")
    return cavs


def image_scores(
    model, inputs, target, cavs: Mapping[str, Cavs], batch_size: int = 32, progress: bool = False
) -> dict[str, dict[str, np.ndarray]]:
    """Return {name: {weighting: (layers, concepts, images, draws)}}, mean derivatives over the real tokens.

    inputs  the target images (or texts), any number of rows
    target  as in `token_gradients`, one for all
    cavs    {name: CAVs}, so that several kinds and the random ones share one forward and one backward pass

    Weightings are attention, plain and cls. TTCAV scores are `(scores > 0).mean(-2)`, (layers, concepts,
    draws).
    """
    target = find_class(model, target) if isinstance(target, str) else target
    collected = {name: {"attention": [], "plain": [], "cls": []} for name in cavs}

    def score(places):
        """Return {(name, weighting): (layers, concepts, images, draws)} of some images."""
        batch, found = take_rows(model, inputs, places), {}
        gradients, attention = token_gradients(model, batch, target)
        n_tokens = batch["attention_mask"].sum(-1) if "attention_mask" in batch else gradients[0].shape[1]
        for name, weightings in collected.items():
            group = cavs[name]
            draws = [
                (gradients[layer], attention[layer], group.vectors[i]) for i, layer in enumerate(group.layers)
            ]
            for weighting in weightings:
                found[name, weighting] = np.stack(
                    [_image_means(weighting, *layer, n_tokens) for layer in draws]
                )
        return found

    for _, found in in_batches(score, input_range(inputs), batch_size, desc="images" if progress else None):
        for (name, weighting), part in found.items():
            collected[name][weighting].append(part)
    return {
        name: {weighting: np.concatenate(parts, axis=2) for weighting, parts in weightings.items()}
        for name, weightings in collected.items()
    }


def _image_means(weighting: str, gradients, cls_attention, vectors, n_tokens) -> np.ndarray:
    """Return (concepts, images, draws) from vectors (concepts, draws, hidden): sums over tokens, by
    n_tokens.
    """
    cavs = vectors.reshape(-1, vectors.shape[-1])
    if weighting == "attention":
        derivatives = attention_weighted_derivatives(gradients, cls_attention, cavs)
    else:
        derivatives = (plain_derivatives if weighting == "plain" else cls_derivatives)(gradients, cavs)
    means = derivatives.sum(1).float().T / n_tokens  # (concepts · draws, images)
    return means.unflatten(0, vectors.shape[:2]).transpose(1, 2).cpu().numpy()


def fit_draws(draws: Sequence[Sequence[Sequence[Part]]], kind: str = "logistic", seed: int = 0) -> np.ndarray:
    """Return CAVs (draws, hidden) between two samples of images each, (positive, negative): the job of one
    worker.
    """
    regression = new_regression(seed)
    return np.stack([fit_direction(*map(gather, sides), kind, seed, regression)[0] for sides in draws])


def held_out_accuracy(
    positive: Sequence[Part],
    negative: Sequence[Part],
    n_folds: int = 5,
    kind: str = "logistic",
    seed: int = 0,
) -> np.ndarray:
    """Return (n_folds,) the share of held-out tokens that fall on their side; folds are by image.

    Tokens of one image are never on both sides of a fold. Raises ValueError where a side has fewer images
    than folds.
    """
    lengths = [
        np.concatenate([np.diff(part.offsets)[part.images] for part in side]) for side in (positive, negative)
    ]
    if n_folds < 2 or min(map(len, lengths)) < n_folds:
        raise ValueError(
            f"{n_folds} folds need as many images on each side, not {[len(side) for side in lengths]}"
        )
    rows = gather([*positive, *negative])
    is_positive = np.arange(len(rows)) < lengths[0].sum()
    images = np.repeat(np.arange(sum(map(len, lengths))), np.concatenate(lengths))
    accuracies = []
    for train, test in StratifiedGroupKFold(n_folds, shuffle=True, random_state=seed).split(
        rows, is_positive, images
    ):
        fitted, side = rows[train], is_positive[train]
        direction, threshold = fit_direction(fitted[side], fitted[~side], kind, seed)
        accuracies.append(np.mean((rows[test] @ direction > threshold) == is_positive[test]))
    return np.array(accuracies)


def fit_cavs(
    activations: Mapping[str, Activations],
    n_draws: int = 50,
    random: Activations | None = None,
    kind: str = "logistic",
    seed: int = 0,
    n_jobs: int = -1,
    progress: bool = False,
) -> Cavs:
    """Fit one CAV for each layer, concept and draw, in parallel: the concept's tokens against tokens of other
    images.

    activations  {concept: its activations}
    random       activations of random images to contrast with; None contrasts with the other concepts
                 ("relative" CAVs)
    n_jobs       worker processes, -1 for one a core; they map the cache files, so memory does not grow with
                 draws

    Draw k contrasts with as many images as the concept has, drawn without replacement with seed + k. Warns
    where only one such draw is possible. Raises ValueError for one concept without random images, too few
    images on either side, or activations of different models.
    """
    _check_draws(activations, random, n_draws)
    seeds = range(seed, seed + n_draws)
    contrasts = {
        name: [_draw_contrast(activations, name, random, draw) for draw in seeds] for name in activations
    }
    return _fit_contrasts(next(iter(activations.values())), contrasts, kind, seed, n_jobs, progress)


def fit_random_cavs(
    random: Activations,
    n_images: int,
    n_draws: int = 50,
    kind: str = "logistic",
    seed: int = 0,
    n_jobs: int = -1,
    progress: bool = False,
) -> Cavs:
    """Fit CAVs of `n_images` random images against as many others, for the empirical null; the one concept is
    "random".

    Raises ValueError where there are fewer than 2 · n_images random images.
    """
    if n_images < 1 or n_draws < 1 or len(random) < 2 * n_images:
        raise ValueError(
            f"{n_images} random images against others need {2 * n_images} of them, not {len(random)}"
        )
    contrasts = []
    for draw in range(n_draws):
        images = np.random.default_rng(seed + draw).permutation(len(random))[: 2 * n_images]
        contrasts.append(([(random, np.sort(images[:n_images]))], [(random, np.sort(images[n_images:]))]))
    return _fit_contrasts(random, {"random": contrasts}, kind, seed, n_jobs, progress)


def cav_accuracies(
    activations: Mapping[str, Activations],
    n_folds: int = 5,
    random: Activations | None = None,
    kind: str = "logistic",
    seed: int = 0,
    n_jobs: int = -1,
    progress: bool = False,
) -> np.ndarray:
    """Return (layers, concepts, folds) the held-out accuracies of the contrasts drawn with `seed`; see
    `fit_cavs`.
    """
    _check_draws(activations, random, 1)
    contrasts = [_draw_contrast(activations, name, random, seed) for name in activations]
    layers = next(iter(activations.values())).layers
    jobs = [
        delayed(held_out_accuracy)(*_parts(contrast, layer), n_folds, kind, seed)
        for layer in layers
        for contrast in contrasts
    ]
    return np.reshape(_run(jobs, n_jobs, progress), (len(layers), len(contrasts), n_folds))


def _fit_contrasts(
    source: Activations, contrasts: Mapping[str, list], kind: str, seed: int, n_jobs: int, progress: bool
) -> Cavs:
    """Return the CAVs of {concept: contrast of each draw}, all of the model and layers of `source`."""
    jobs = [
        delayed(fit_draws)(
            [_parts(contrast, layer) for contrast in draws[start : start + DRAWS_A_JOB]], kind, seed
        )
        for layer in source.layers
        for draws in contrasts.values()
        for start in range(0, len(draws), DRAWS_A_JOB)
    ]
    vectors = np.concatenate(_run(jobs, n_jobs, progress))
    vectors = vectors.reshape(len(source.layers), len(contrasts), -1, vectors.shape[-1])
    model = source.model_id, source.model_key, source.n_layers
    return Cavs(vectors, tuple(source.layers), tuple(contrasts), kind, *model)


def _parts(contrast, layer: int) -> list[list[Part]]:
    return [[source.part(layer, images) for source, images in side] for side in contrast]


def _run(jobs: list, n_jobs: int, progress: bool) -> list:
    results = Parallel(n_jobs=n_jobs, return_as="generator")(jobs)
    return list(tqdm(results, total=len(jobs), desc="CAVs", disable=not progress, leave=False))


def _pool(
    activations: Mapping[str, Activations], concept: str, random: Activations | None
) -> list[Activations]:
    """Return the sets of images that a concept is contrasted with."""
    return (
        [random] if random is not None else [other for name, other in activations.items() if name != concept]
    )


def _draw_contrast(
    activations: Mapping[str, Activations], concept: str, random: Activations | None, seed: int
):
    positive, pool = activations[concept], _pool(activations, concept, random)
    edges = np.cumsum([0, *map(len, pool)])
    chosen = np.sort(np.random.default_rng(seed).choice(edges[-1], len(positive), replace=False))
    shares = np.split(chosen, np.searchsorted(chosen, edges[1:-1]))
    negative = [(source, share - start) for source, share, start in zip(pool, shares, edges)]
    return [(positive, np.arange(len(positive)))], negative


def _check_draws(activations: Mapping[str, Activations], random: Activations | None, n_draws: int) -> None:
    if not activations or n_draws < 1:
        raise ValueError(
            f"there are {len(activations)} concepts and {n_draws} draws to fit; give at least one of each"
        )
    if random is None and len(activations) < 2:
        raise ValueError(
            f"{next(iter(activations))!r} is the only concept, and relative CAVs contrast a concept with others: "
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
                f"concept {concept!r} has {n_images} images but only {n_others} to contrast with; add images, "
                "or keep fewer of the concept's"
            )
        if n_others == n_images and n_draws > 1:
            warnings.warn(
                f"concept {concept!r} has as many images to contrast with as its own {n_images}, "
                f"so its {n_draws} draws are all equal",
                stacklevel=3,
            )
