"""The outputs of every transformer block for many inputs, each encoded once and kept in a cache."""

import hashlib
import json
import os
import tempfile
import warnings
import zlib
from collections.abc import Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from helpers.models import transformer_blocks
from helpers.paths import CACHE
from helpers.runtime import in_batches

ACTIVATIONS = CACHE / "activations"
HEADER = 1024  # bytes before the rows of a cache file: a safetensors header, filled up with spaces
DAMAGE = (
    SafetensorError,
    OSError,
    KeyError,
    TypeError,
    ValueError,
)  # what reading a broken safetensors file raises


class Part(NamedTuple):
    """Some images of a set of activations, one layer: image i owns the rows offsets[i] to offsets[i + 1]."""

    rows: np.ndarray  # (rows, hidden), one row a token
    offsets: np.ndarray  # (images + 1,)
    images: np.ndarray  # (chosen,) indices


@dataclass(frozen=True)
class Activations:
    """What the blocks of one model say about a set of inputs, one row a token.

    layers     {layer: (rows, hidden)} float32, read-only maps of the cache files
    offsets    (inputs + 1,) input i owns the rows offsets[i] to offsets[i + 1]: all its tokens but the
               padding
    model_id   the model's name; model_key stands for its content, n_layers is its number of blocks
    """

    layers: dict[int, np.ndarray]
    offsets: np.ndarray
    model_id: str
    model_key: str
    n_layers: int

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def part(self, layer: int, images: Sequence[int] | None = None) -> Part:
        """Return one layer of the chosen images, or of all."""
        return Part(
            self.layers[layer], self.offsets, np.arange(len(self)) if images is None else np.asarray(images)
        )


def token_activations(model, inputs) -> dict[int, torch.Tensor]:
    """Return {layer: (batch, tokens, hidden)}, the outputs of every block, before the final layer norm.

    `inputs` is a dict with pixel_values, or with input_ids and attention_mask. Raises ValueError for a model
    whose blocks cannot be found, or that changes the number of tokens on the way.
    """
    with torch.no_grad(), block_outputs(model) as outputs:
        model(**inputs)
    return dict(enumerate(check_outputs(model, outputs)))


@contextmanager
def block_outputs(model, differentiable: bool = False):
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


def check_outputs(model, outputs: list[torch.Tensor]) -> list[torch.Tensor]:
    expected = model.config.num_hidden_layers
    if len(outputs) != expected or outputs[0].ndim != 3 or len({output.shape for output in outputs}) > 1:
        raise ValueError(
            f"the blocks of {type(model).__name__} do not give {expected} outputs of one shape (batch, tokens, width); "
            "use a BERT-like or ViT-like classifier"
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


def take_rows(model, inputs, places: range) -> dict[str, torch.Tensor]:
    """Return some rows of the inputs on the model's device; columns of padding alone are cut."""
    batch = {name: tensor[places.start : places.stop] for name, tensor in inputs.items()}
    if "attention_mask" in batch:
        width = int(batch["attention_mask"].any(0).nonzero().max()) + 1
        batch = {name: tensor[:, :width] for name, tensor in batch.items()}
    return {name: tensor.to(model.device) for name, tensor in batch.items()}


def input_range(inputs) -> range:
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
            batch = take_rows(model, inputs, places)
            activations = token_activations(model, batch)
            real = batch["attention_mask"].bool() if "attention_mask" in batch else ...
            return {
                layer: activations[layer][real].flatten(0, -2).float().cpu().contiguous().numpy()
                for layer in paths
            }

        for _, layers in in_batches(
            encode, input_range(inputs), batch_size, desc="encode" if progress else None
        ):
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


def gather(parts: Sequence[Part]) -> np.ndarray:
    """Return the rows (rows, hidden) of the chosen images of all parts, one below the other."""
    return np.concatenate(
        [part.rows[part.offsets[image] : part.offsets[image + 1]] for part in parts for image in part.images]
    )
