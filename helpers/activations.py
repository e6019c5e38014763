"""The outputs of every transformer layer for many inputs, each encoded once and kept in a cache."""

import hashlib
import json
import shutil
import tempfile
import warnings
import zlib
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from numpy.lib.format import open_memmap

from helpers.models import transformer_blocks
from helpers.paths import CACHE
from helpers.runtime import in_batches

ACTIVATIONS = CACHE / "activations"
CHECKSUMS = "checksums.json"  # of the layers, in order


@dataclass(frozen=True)
class Activations:
    """What the layers of one model say about a set of inputs, one row per token.

    layers     {layer: (rows, hidden)} float32, read-only maps of the cache files
    offsets    (inputs + 1,) input i owns the rows offsets[i] to offsets[i + 1]: all its tokens but the
               padding
    model_id   the model's name; model_key stands for its content, n_layers is its number of layers
    """

    layers: dict[int, np.ndarray]
    offsets: np.ndarray
    model_id: str
    model_key: str
    n_layers: int

    def __len__(self) -> int:
        return len(self.offsets) - 1


def pooled(sources: Sequence[Activations], layer: int) -> tuple[np.ndarray, np.ndarray]:
    """Return one layer of several sets of images: all rows (rows, hidden), and how many each image has."""
    rows = np.concatenate([source.layers[layer] for source in sources])
    return rows, np.concatenate([np.diff(source.offsets) for source in sources])


def select_images(source: Activations, images) -> Activations:
    """Return the activations of some images, by number, in memory."""
    places = [np.arange(source.offsets[image], source.offsets[image + 1]) for image in images]
    layers = {layer: rows[np.concatenate(places)] for layer, rows in source.layers.items()}
    return replace(source, layers=layers, offsets=np.cumsum([0, *map(len, places)]))


def token_activations(model, inputs) -> dict[int, torch.Tensor]:
    """Return {layer: (batch, tokens, hidden)}, the outputs of every layer, before the final layer norm.

    `inputs` is a dict with pixel_values, or with input_ids and attention_mask. Raises ValueError for a model
    whose layers cannot be found, or that changes the number of tokens on the way.
    """
    with torch.no_grad(), block_outputs(model) as outputs:
        model(**inputs)
    return dict(enumerate(check_outputs(model, outputs)))


@contextmanager
def block_outputs(model, differentiable: bool = False):
    """Yield a list that the enclosed forward pass fills with the output of every layer.

    With `differentiable`, autograd starts at the first layer's output, so that frozen weights cost no
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


def check_outputs(model, outputs: list[torch.Tensor]) -> list[torch.Tensor]:
    expected = model.config.num_hidden_layers
    if len(outputs) != expected or outputs[0].ndim != 3 or len({output.shape for output in outputs}) > 1:
        shape = f"{expected} outputs of one shape (batch, tokens, width)"
        raise ValueError(
            f"the layers of {type(model).__name__} do not give {shape}; use a BERT or ViT classifier"
        )
    return outputs


def collect_activations(
    model,
    inputs,
    layers: Sequence[int] | None = None,
    batch_size: int = 32,
    cache_dir: str | Path = ACTIVATIONS,
    progress: bool = False,
) -> Activations:
    """Encode many inputs once and return the activations of `layers`, all by default.

    inputs  as for `token_activations`, with any number of rows; batches of `batch_size` go through the model

    The cache holds one NumPy file per layer, in a folder that is keyed by the content of the model and of the
    inputs and by the precision, and moved into place when complete; of two processes one encodes. A damaged
    one is rebuilt, with a warning. Raises ValueError for layers that the model does not have.
    """
    n_layers = len(transformer_blocks(model))
    layers = list(range(n_layers) if layers is None else layers)
    if not layers or not set(layers) <= set(range(n_layers)):
        raise ValueError(f"layers {layers} are not among this model's, 0 to {n_layers - 1}")
    key = model_key(model)
    folder = Path(cache_dir, key, _digest(inputs, getattr(model, "_precision", "float32"))[:16])
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):  # a second process waits, and finds what the first has encoded
        rows = _open(folder, layers)
        if not rows:
            _encode(model, inputs, folder, batch_size, progress)
            rows = _open(folder, layers)
    n_inputs = len(input_range(inputs))
    if "attention_mask" in inputs:
        lengths = inputs["attention_mask"].bool().sum(-1).cpu().numpy()
    else:
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


def take_rows(model, inputs, places: range) -> dict[str, torch.Tensor]:
    """Return some rows of the inputs on the model's device; columns of padding alone are cut."""
    batch = {name: tensor[places.start : places.stop] for name, tensor in inputs.items()}
    if "attention_mask" in batch:
        width = int(batch["attention_mask"].any(0).nonzero().max()) + 1
        batch = {name: tensor[:, :width] for name, tensor in batch.items()}
    return {name: tensor.to(model.device) for name, tensor in batch.items()}


def input_range(inputs) -> range:
    return range(len(next(iter(inputs.values()))))


def _encode(model, inputs, folder: Path, batch_size: int, progress: bool) -> None:
    """Write the outputs of all layers, batch by batch, and a checksum of each, then move them to `folder`."""
    mask = inputs.get("attention_mask")

    def encode(places):
        """Return the rows (rows, hidden) of every layer, those of padding left out."""
        batch = take_rows(model, inputs, places)
        real = batch["attention_mask"].bool() if "attention_mask" in batch else ...
        return [
            part[real].flatten(0, -2).float().cpu().numpy()
            for part in token_activations(model, batch).values()
        ]

    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        whole, start = Path(scratch, "whole"), 0
        files: list[np.ndarray] = []
        whole.mkdir()
        for places, layers in in_batches(
            encode, input_range(inputs), batch_size, desc="encode" if progress else None
        ):
            if not files:
                n_rows = (
                    int(mask.sum())
                    if mask is not None
                    else len(layers[0]) // len(places) * len(input_range(inputs))
                )
                shape = n_rows, layers[0].shape[1]
                files = [
                    open_memmap(_file(whole, layer), "w+", np.float32, shape) for layer in range(len(layers))
                ]
            for file, rows in zip(files, layers, strict=True):
                file[start : start + len(rows)] = rows
            start += len(rows)
        (whole / CHECKSUMS).write_text(json.dumps([zlib.crc32(file.data) for file in files]))
        shutil.rmtree(folder, ignore_errors=True)  # a damaged one
        whole.replace(folder)


def _file(folder: Path, layer: int) -> Path:
    return folder / f"layer_{layer:02d}.npy"


def _open(folder: Path, layers: Sequence[int]) -> dict[int, np.ndarray]:
    """Return read-only maps of some layers' cache files, none where any is missing or damaged."""
    rows, name = {}, CHECKSUMS
    if not folder.exists():
        return {}
    try:
        checksums = json.loads((folder / CHECKSUMS).read_text())
        for layer in layers:
            name = _file(folder, layer).name
            rows[layer] = np.load(folder / name, mmap_mode="r", allow_pickle=False)
            if zlib.crc32(rows[layer].data) != checksums[layer]:
                raise ValueError("another content than was written")
        return rows
    except (OSError, EOFError, ValueError, LookupError):
        warnings.warn(
            f"the cached activations {folder.name}/{name} are damaged and are rebuilt", stacklevel=3
        )
        return {}
