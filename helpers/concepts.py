"""Concepts inside a transformer: activations and gradients of every block, concept activation vectors (CAVs),
TTCAV.

Source: Kim et al. (2018), TCAV; Eggen, Lysnæs-Larsen and Strümke (2025), section 4, for tokens and attention.
What needs no model, such as the parallel fit and the tests, is in `helpers.concept_statistics`.
"""

import hashlib
import json
import os
import tempfile
import warnings
import zlib
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, contextmanager
from difflib import get_close_matches
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from helpers.concept_statistics import MIN_IMAGES, Activations, Cavs, fit_direction
from helpers.images import read_image
from helpers.models import GRADIENT_SCALE, check_eager, full_precision, resolve_target, transformer_blocks
from helpers.places import PROJECT_ROOT, local_path
from helpers.runtime import in_batches

CACHE = PROJECT_ROOT / "data" / "cache" / "activations"
HEADER = 1024  # bytes before the rows of a cache file: a safetensors header, filled up with spaces
DAMAGE = (
    SafetensorError,
    OSError,
    KeyError,
    TypeError,
    ValueError,
)  # what reading a broken safetensors file raises


# Activations and gradients.


def token_activations(model, inputs) -> dict[int, torch.Tensor]:
    """Return {layer: (batch, tokens, hidden)}, the outputs of every block, before the final layer norm.

    `inputs` is a dict with pixel_values, or with input_ids and attention_mask. Raises ValueError for a model
    whose blocks cannot be found, or that changes the number of tokens on the way.
    """
    with torch.no_grad(), _block_outputs(model) as outputs:
        model(**inputs)
    return dict(enumerate(_checked(model, outputs)))


def token_gradients(model, inputs, target=None) -> tuple[dict[int, torch.Tensor], dict[int, torch.Tensor]]:
    """Return ({layer: (batch, tokens, hidden)}, {layer: (batch, tokens)}): ∂y/∂f_l, and the cls attention of
    layer l.

    y is the logit of `target`: a class number, a label (see `find_target`), a (batch,) tensor, or None for
    the predicted class. The cls attention is the mean over heads of the cls row of A[l]. One forward and one
    backward pass; padding has no gradient and no attention. Raises ValueError for an unknown target, a model
    without eager attention, or gradients that are not finite.
    """
    check_eager(model)
    target = find_target(model, target) if isinstance(target, str) else target
    with torch.enable_grad(), _block_outputs(model, differentiable=True) as outputs:
        result = model(**inputs, output_attentions=True)
        maps, chosen = result.attentions or (), resolve_target(model, result.logits, target)
        explained = result.logits.gather(1, chosen[:, None]).sum()
        gradients = torch.autograd.grad(explained * GRADIENT_SCALE, _checked(model, outputs))
    if len(maps) != len(gradients) or any(layer is None or layer.ndim != 4 for layer in maps):
        raise ValueError(
            f"{type(model).__name__} returned {len(maps)} attention maps for {len(gradients)} blocks"
        )
    if not all(torch.isfinite(gradient).all() for gradient in gradients):
        raise ValueError(
            "the gradients hold NaN or infinity; check the model's weights, or run it in another precision"
        )
    gradients = (gradient / GRADIENT_SCALE for gradient in gradients)
    rows = (weights[:, :, 0].detach() for weights in maps)
    return dict(enumerate(gradients)), {
        i: row.mean(1, dtype=full_precision(row.dtype)) for i, row in enumerate(rows)
    }


def find_target(model, label: str) -> int:
    """Return the number of the class with this label, in full or one of its synonyms between commas, in any
    case.

    Raises ValueError for a label that fits none or several, and names the nearest.
    """
    labels = {str(name): int(number) for number, name in model.config.id2label.items()}
    if label in labels:
        return labels[label]
    wanted = label.strip().lower()
    synonyms = {(part.strip().lower(), name) for name in labels for part in (name, *name.split(","))}
    found = sorted({name for synonym, name in synonyms if synonym == wanted})
    if len(found) == 1:
        return labels[found[0]]
    near = get_close_matches(wanted, [synonym for synonym, _ in synonyms], n=5)
    near = found or sorted({name for synonym, name in synonyms if synonym in near}) or list(labels)
    raise ValueError(
        f"target {label!r} is {'several' if found else 'none'} of this model's {len(labels)} labels; "
        f"did you mean {' or '.join(map(repr, near[:5]))}?"
    )


@contextmanager
def _block_outputs(model, differentiable: bool = False):
    """Yield a list that the enclosed forward pass fills with the output of every block.

    With `differentiable`, autograd starts at the first block's output, so that frozen weights cost no
    gradient.
    """
    outputs = []

    def capture(module, args, output):
        outputs.append(output[0] if isinstance(output, tuple) else output)
        if differentiable and not outputs[-1].requires_grad:
            outputs[-1].requires_grad_()

    hooks = [block.register_forward_hook(capture) for block in transformer_blocks(model)]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def _checked(model, outputs: list[torch.Tensor]) -> list[torch.Tensor]:
    expected = model.config.num_hidden_layers
    if len(outputs) != expected or outputs[0].ndim != 3 or len({output.shape for output in outputs}) > 1:
        raise ValueError(
            f"the blocks of {type(model).__name__} do not give {expected} outputs of one shape (batch, tokens, width); "
            "use a BERT-like or ViT-like classifier"
        )
    return outputs


# Activations of many inputs, each encoded once.


def collect_activations(
    model,
    inputs,
    layers: Sequence[int] | None = None,
    batch_size: int = 32,
    cache_dir: str | Path = CACHE,
    progress: bool = False,
) -> Activations:
    """Encode many inputs once and return the activations of `layers` (all by default), one cache file a
    layer.

    inputs  as for `token_activations`, with any number of rows; batches of `batch_size` go through the model

    Files are keyed by the content of the model and of the inputs, and by the precision; they are written
    while the batches run, and moved into place when complete. A damaged one is rebuilt, with a warning.
    Raises ValueError for layers that the model does not have.
    """
    n_layers = len(transformer_blocks(model))
    layers = list(range(n_layers) if layers is None else layers)
    if not layers or not set(layers) <= set(range(n_layers)):
        raise ValueError(f"layers {layers} are not among this model's, 0 to {n_layers - 1}")
    key = model_key(model)
    folder = Path(cache_dir, key, _digest(inputs, getattr(model, "_precision", "float32"))[:16])
    paths = {layer: folder / f"layer_{layer:02d}.safetensors" for layer in layers}
    rows = {layer: _open_rows(path) for layer, path in paths.items()}
    missing = {layer: paths[layer] for layer in layers if rows[layer] is None}
    if missing:
        _encode(model, inputs, missing, batch_size, progress)
        rows |= {layer: _open_rows(path) for layer, path in missing.items()}
    if "attention_mask" in inputs:
        lengths = inputs["attention_mask"].bool().sum(-1).cpu().numpy()
    else:
        n_inputs = len(next(iter(inputs.values())))
        lengths = np.full(n_inputs, len(rows[layers[0]]) // n_inputs)
    return Activations(rows, np.concatenate([[0], np.cumsum(lengths)]), model_name(model), key, n_layers)


def model_key(model) -> str:
    """Return 16 hexadecimal digits that stand for the model's weights and the settings that steer what they
    compute.
    """
    settings = model.config.to_diff_dict()
    for name in ("transformers_version", "_name_or_path", "dtype", "id2label", "label2id", "architectures"):
        settings.pop(name, None)
    return _digest(model.state_dict(), json.dumps(settings, sort_keys=True, default=str))[:16]


def model_name(model) -> str:
    """Return the model's hub id, or the last folder of its path."""
    name = model.config._name_or_path or type(model).__name__
    return Path(name).name if Path(name).is_dir() else name


def _digest(tensors, text: str = "") -> str:
    """Return the SHA-256 of named tensors and a text."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _rows(model, inputs, places: range) -> dict[str, torch.Tensor]:
    """Return some rows of the inputs on the model's device; columns of padding alone are cut."""
    batch = {name: tensor[places.start : places.stop] for name, tensor in inputs.items()}
    if "attention_mask" in batch:
        width = int(batch["attention_mask"].any(0).nonzero().max()) + 1
        batch = {name: tensor[:, :width] for name, tensor in batch.items()}
    return {name: tensor.to(model.device) for name, tensor in batch.items()}


def _places(inputs) -> range:
    return range(len(next(iter(inputs.values()))))


def _encode(model, inputs, paths: dict[int, Path], batch_size: int, progress: bool) -> None:
    """Write one safetensors file a layer, batch by batch: the float32 tensor "rows" (rows, hidden) and its
    checksum.
    """
    folder = next(iter(paths.values())).parent
    folder.mkdir(parents=True, exist_ok=True)
    checksums, n_rows = dict.fromkeys(paths, 0), 0
    with tempfile.TemporaryDirectory(dir=folder) as scratch, ExitStack() as stack:
        files = {
            layer: stack.enter_context(open(Path(scratch, path.name), "wb")) for layer, path in paths.items()
        }
        for file in files.values():
            file.seek(HEADER)

        def encode(places):
            """Return the rows of every layer, those of padding left out."""
            batch = _rows(model, inputs, places)
            activations = token_activations(model, batch)
            real = batch["attention_mask"].bool() if "attention_mask" in batch else ...
            return {
                layer: activations[layer][real].flatten(0, -2).float().cpu().contiguous().numpy()
                for layer in paths
            }

        for _, layers in in_batches(encode, _places(inputs), batch_size, desc="encode" if progress else None):
            for layer, file in files.items():
                rows = layers[layer]
                checksums[layer] = zlib.crc32(rows, checksums[layer])
                file.write(rows)
            n_rows += len(rows)
        tensor = {
            "dtype": "F32",
            "shape": [n_rows, rows.shape[1]],
            "data_offsets": [0, 4 * n_rows * rows.shape[1]],
        }
        for layer, file in files.items():
            header = json.dumps({"__metadata__": {"crc32": str(checksums[layer])}, "rows": tensor}).encode()
            file.seek(0)
            file.write((HEADER - 8).to_bytes(8, "little") + header.ljust(HEADER - 8))
            file.close()
            os.replace(file.name, paths[layer])


def _open_rows(path: Path) -> np.ndarray | None:
    """Return a cache file's rows as a read-only map, or None where there is no file, or a damaged one."""
    if not path.exists():
        return None
    try:
        with safe_open(path, "np") as file:
            shape, checksum = file.get_slice("rows").get_shape(), int(file.metadata()["crc32"])
        rows = np.memmap(path, np.float32, "r", HEADER, tuple(shape))
        if zlib.crc32(rows) == checksum:
            return rows
    except DAMAGE:
        pass
    warnings.warn(
        f"the cached activations {path.parent.name}/{path.name} are damaged and are rebuilt", stacklevel=4
    )
    return None


# Concept activation vectors.


def fit_cav(positive, negative, seed: int = 0, kind: str = "logistic") -> torch.Tensor:
    """Return the CAV (hidden,): the unit vector that points from `negative` to `positive` rows, each (rows,
    hidden).

    `kind` is one of "logistic" (the paper's), "pattern", "fisher" and "mean_difference"; see `fit_direction`,
    also for the errors. Tensors or arrays go in, a tensor on the CPU comes out.
    """
    copied = [side if isinstance(side, torch.Tensor) else np.array(side) for side in (positive, negative)]
    rows = [torch.as_tensor(side).detach().cpu() for side in copied]  # a cache file's rows are read-only
    dtype = torch.float64 if torch.float64 in (rows[0].dtype, rows[1].dtype) else torch.float32
    return torch.from_numpy(fit_direction(*(side.to(dtype).numpy() for side in rows), kind, seed)[0])


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


# Directional derivatives and scores.


def attention_weighted_derivatives(gradients, cls_attention, cavs) -> torch.Tensor:
    """Return d (batch, tokens, n_cavs): d_t = a_t · s_t · ‖a‖/‖s‖, with s_t = ∂y/∂f_t · cav.

    gradients      (batch, tokens, hidden) ∂y/∂f of one layer
    cls_attention  (batch, tokens) a, of the same layer
    cavs           (n_cavs, hidden)

    Where s is zero, so is d. s is divided by its largest entry first, so that norms of tiny gradients do not
    vanish.
    """
    s = plain_derivatives(gradients, cavs)
    s = s / _nonzero(s.abs().amax(1, keepdim=True))
    a = cls_attention.to(s)[..., None]
    return a * s * (a.norm(dim=1, keepdim=True) / _nonzero(s.norm(dim=1, keepdim=True)))


def plain_derivatives(gradients, cavs) -> torch.Tensor:
    """Return s (batch, tokens, n_cavs), s_t = ∂y/∂f_t · cav: token TCAV without attention."""
    return gradients @ torch.as_tensor(cavs).to(gradients).T


def cls_derivatives(gradients, cavs) -> torch.Tensor:
    """Return the plain derivative (batch, tokens, n_cavs) at the cls token, and zero at every other."""
    at_cls = plain_derivatives(gradients[:, :1], cavs)
    return torch.nn.functional.pad(at_cls, (0, 0, 0, gradients.shape[1] - 1))


def ttcav_scores(derivatives) -> torch.Tensor:
    """Return (n_cavs,) the share of images whose mean over tokens of derivatives (batch, tokens, n_cavs) is
    positive.

    Padding adds zeros, which change no sign. A mean of exactly zero is not positive. Raises ValueError
    without images.
    """
    if not len(derivatives):
        raise ValueError("there is no image to score")
    return (derivatives.mean(1) > 0).to(derivatives.dtype).mean(0)


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
    target = find_target(model, target) if isinstance(target, str) else target
    collected = {name: {"attention": [], "plain": [], "cls": []} for name in cavs}

    def score(places):
        """Return {(name, weighting): (layers, concepts, images, draws)} of some images."""
        batch, found = _rows(model, inputs, places), {}
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

    for _, found in in_batches(score, _places(inputs), batch_size, desc="images" if progress else None):
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


def _nonzero(norm: torch.Tensor) -> torch.Tensor:
    return norm.masked_fill(norm == 0, 1)


# Images of concepts and targets in folders.


def load_image_folder(
    path: str | Path, min_images: int = MIN_IMAGES, max_images: int | None = None
) -> dict[str, list[Image.Image]]:
    """Read an ImageFolder tree, path/<name>/*.jpg, as {name: RGB images}, files in the order of their names.

    max_images  keep the first so many readable ones of each folder; None keeps all

    Files that are no readable image are skipped, with a warning that counts and names them. Raises
    FileNotFoundError without the folder, ValueError without folders in it, where a folder keeps fewer than
    `min_images` images, or where fewer are asked for.
    """
    if max_images is not None and max_images < min_images:
        raise ValueError(
            f"at least {min_images} images of each folder are needed, more than the {max_images} asked for"
        )
    path = local_path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"folder {str(path)!r} does not exist; it should hold images as <name>/*.jpg")
    folders = sorted(
        folder for folder in path.iterdir() if folder.is_dir() and not folder.name.startswith(".")
    )
    if not folders:
        raise ValueError(f"folder {path.name!r} holds no folders; arrange images as {path.name}/<name>/*.jpg")
    return {folder.name: _read_images(folder, min_images, max_images) for folder in folders}


def _read_images(folder: Path, min_images: int, max_images: int | None) -> list[Image.Image]:
    images, unreadable = [], []
    for file in sorted(
        file for file in folder.rglob("*") if file.is_file() and not file.name.startswith(".")
    ):
        if max_images is not None and len(images) >= max_images:
            break
        try:
            images.append(read_image(file))
        except ValueError:
            unreadable.append(file.name)
    skipped = (
        f"{len(unreadable)} unreadable files ({', '.join(unreadable[:5])}{', ...' if unreadable[5:] else ''})"
    )
    if len(images) < min_images:
        raise ValueError(
            f"folder {folder.name!r} has {len(images)} images{f' beside {skipped}' if unreadable else ''}; "
            f"it needs at least {min_images}"
        )
    if unreadable:
        warnings.warn(f"folder {folder.name!r}: skipped {skipped}", stacklevel=4)
    return images
