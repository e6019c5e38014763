"""Read the attention of every layer and head, its gradients, and the lengths of the vectors that it moves."""

from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch

from helpers.labels import resolve_target
from helpers.models import GRADIENT_SCALE, check_explainable, full_precision, transformer_blocks
from helpers.relevance import SHARE, relevance_rules, start_at_embeddings, times_input


@dataclass
class AttentionMaps:
    """What one forward pass (and one backward pass) of a batch says.

    logits     (batch, classes)
    target     (batch,) class whose logit was differentiated
    weights    (batch, layers, heads, tokens, tokens) attention, rows are queries and sum to 1; one head,
               their mean, if the heads were averaged while reading
    gradients  the same shape, derivative of the target's logit by each weight; None when not asked for
    real       (batch, tokens) bool, False at padding; None when nothing is padded
    rules      of the backward pass: "none", or "attnlrp" as in `helpers.relevance`; then the gradient of a
               weight is its half of the product with the values
    relevance  (batch, tokens) gradient × input under the rules, from the same pass; None without rules
    """

    logits: torch.Tensor
    target: torch.Tensor
    weights: torch.Tensor
    gradients: torch.Tensor | None = None
    real: torch.Tensor | None = None
    rules: str = "none"
    relevance: torch.Tensor | None = None


def read_attention(
    model, inputs, target=None, gradients: bool = False, mean_heads: bool = False, rules: str = "none"
) -> AttentionMaps:
    """Run one forward pass, with `gradients` one backward pass, and return the attention of every head.

    inputs      what the model takes: input_ids and attention_mask (batch, tokens), or pixel_values
    target      class to explain: None for the predicted one, a class number, a label name, or a (batch,)
                tensor
    gradients   also differentiate the target's logit by every attention weight
    mean_heads  average the heads of each layer as soon as it has run: all that the rows on attention alone
                need, in a fraction of the memory. Not with gradients, which belong to single heads
    rules       of the backward pass: "none" for the derivative, "attnlrp" for relevance: see
                `helpers.relevance`. The result then has the relevance of the input, too

    Raises ValueError for a model without eager attention, missing or non-finite maps, an unknown target, or
    rules that are unknown, do not know the model, or come without gradients.
    """
    if rules not in ("none", "attnlrp") or (rules != "none" and not gradients):
        raise ValueError(
            f"attention is read with rules 'none', or 'attnlrp' and gradients=True, "
            f"not with rules={rules!r} and gradients={gradients}"
        )
    if gradients and mean_heads:
        raise ValueError(
            "gradients belong to single heads; ask for gradients or for mean_heads, not for both"
        )
    check_explainable(model, inputs, gradients)
    check_eager(model)
    blocks = transformer_blocks(model) if mean_heads else ()
    attentions = [module for block in blocks for module in block.modules()]
    with torch.set_grad_enabled(gradients), relevance_rules(model, rules), ExitStack() as hooks:
        embeddings = hooks.enter_context(start_at_embeddings(model)) if gradients else []
        for module in attentions:  # before transformers' own hooks, which keep what they see
            hooks.callback(module.register_forward_hook(_average_heads, prepend=True).remove)
        output = model(**inputs, output_attentions=True)
        maps = list(output.attentions or ())
        _check_maps(model, maps)
        chosen = resolve_target(model, output.logits, target)
        found, relevance = [], None
        if gradients:
            explained = output.logits.gather(1, chosen[:, None]).sum() * GRADIENT_SCALE
            wanted = maps if rules == "none" else [*maps, *embeddings]
            found = list(torch.autograd.grad(explained, wanted))
        if rules != "none":
            relevance = times_input(model, inputs, embeddings[0], found.pop() / GRADIENT_SCALE)
    logits = output.logits.detach()
    del output  # the graph holds the maps; let it go before they are stacked
    weights = _stack(maps)
    share = 1 if rules == "none" else SHARE
    slopes = _stack(found).mul_(share / GRADIENT_SCALE) if gradients else None
    for values, what in ((weights, "attention weights"), (slopes, "gradients of the attention")):
        if values is not None and not torch.isfinite(values).all():
            raise ValueError(f"the {what} hold NaN or infinity; check the model's weights, or its precision")
    real = inputs["attention_mask"].bool() if "attention_mask" in inputs else None
    return AttentionMaps(logits, chosen, weights, slopes, real, rules, relevance)


def check_gradients(maps: AttentionMaps, what: str, rules: str = "none") -> torch.Tensor:
    """Return the gradients of the maps. Raises ValueError where there are none, or of other rules."""
    call = f"read_attention(..., gradients=True{'' if rules == 'none' else f', rules={rules!r}'})"
    if maps.gradients is None:
        raise ValueError(f"{what} needs gradients; call {call}")
    if maps.rules != rules:
        raise ValueError(f"{what} needs gradients of rules {rules!r}, not of {maps.rules!r}; call {call}")
    return maps.gradients


def check_eager(model) -> None:
    """Raise ValueError for a model whose kind of attention returns no weights."""
    if getattr(model.config, "_attn_implementation", "eager") != "eager":
        raise ValueError(
            f"{type(model).__name__} runs {model.config._attn_implementation} attention, which returns no "
            f"weights; "
            "load it with attn_implementation='eager', or call model.set_attn_implementation('eager')"
        )


@contextmanager
def record_value_norms(model):
    """Record in the enclosed pass how long the vectors are that each head moves: attention weighs them.

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


def _average_heads(module, args, output):
    """Replace the weights (batch, heads, tokens, tokens) that an attention module returns by their mean."""
    if isinstance(output, tuple) and len(output) > 1 and torch.is_tensor(output[1]) and output[1].ndim == 4:
        return (
            output[0],
            output[1].mean(1, keepdim=True, dtype=full_precision(output[1].dtype)),
            *output[2:],
        )
    return None


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
            f"{type(model).__name__} uses windowed or pooled attention; use a BERT-like or ViT-like "
            f"classifier"
        )


def _stack(layers: list) -> torch.Tensor:
    """Move maps of layers into one tensor (batch, layers, heads, tokens, tokens), freeing each."""
    batch, *rest = layers[0].shape
    stacked = layers[0].new_empty(
        batch, len(layers), *rest, dtype=full_precision(layers[0].dtype), requires_grad=False
    )
    for index in reversed(range(len(layers))):
        stacked[:, index] = layers.pop().detach()
    return stacked
