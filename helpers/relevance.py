"""Relevance of tokens: gradient × input under rules that change the backward pass alone, AttnLRP and CP-LRP.

Built from the formulas of Ali et al. (2022, CP-LRP), arXiv 2202.07304, and Achtibat et al. (2024, AttnLRP),
arXiv 2402.05602. Layer-wise relevance propagation is patented: free for personal and scientific purposes.
The rules, with sg(·) for what the backward pass holds constant; all else is linear and keeps its gradient:

    LayerNorm   (x − mean x) / sg(σ(x)) · γ + β
    activation  x · sg(a(x) / x), and a'(0) where x = 0: ½ for GELU, 1 for tanh; ReLU is this rule already
    attention   "cp": sg(A). "attnlrp": softmax stays; in both products, QKᵀ and A·V, each factor gets half,
                which makes ½ at v and at A, and ½ · ½ at q and k, since A's gradient goes on to them

Contrast, ours, is "cp" measured from the average word x' and not from zero: the slope of an activation is
sg((a(x) − a(x')) / (x − x')), and what counts of a state is its difference, h − h'.
"""

from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from helpers.images import patch_grid
from helpers.labels import resolve_target
from helpers.models import (
    GRADIENT_SCALE,
    check_explainable,
    check_players,
    full_precision,
    transformer_blocks,
)

RULES = ("none", "cp", "attnlrp")
CLOSE = 1e-3  # activations whose inputs are closer than this in both passes take the derivative between them
SHARE = 0.5  # of the gradient, for each factor of a product under attnlrp
FAMILIES = ("bert", "distilbert", "roberta", "electra", "vit", "deit", "dinov2", "dinov2_with_registers")
GELUS = [f"{name}Activation" for name in ("GELU", "NewGELU", "FastGELU", "QuickGELU", "AccurateGELU")]
SLOPE_AT_ZERO = {
    **dict.fromkeys(["GELU", "GELUTanh", *GELUS], 0.5),
    "Tanh": 1.0,
    "ReLU": 0.0,
}  # class of an activation: a'(0)
LINEAR = ("Linear", "Embedding", "Conv2d", "Dropout", "Identity", "ModuleList")  # need no rule
LINEAR_ENDINGS = ("LayerScale", "DropPath")  # nor do these, of which each family has its own class
PROJECTIONS = {
    "query": ("query", "q_lin", "q_proj"),
    "key": ("key", "k_lin", "k_proj"),
    "value": ("value", "v_lin", "v_proj"),
}


@contextmanager
def relevance_rules(model, rules: str = "attnlrp"):
    """Let the enclosed passes of a BERT-like or ViT-like classifier go backward by the rules; outputs stay.

    rules  "none", "cp" or "attnlrp", as above

    Forward hooks alone, removed at the end, also after an error. Weights are not touched. Holds for eager and
    for fused attention. Do not nest. Raises ValueError as `check_rules` does, before anything is computed.
    """
    check_rules(model, rules)
    with ExitStack() as hooks:
        if rules != "none":
            for handle in _hooks(model, rules):
                hooks.callback(handle.remove)
        yield


def gradient_times_input(model, inputs, target=None, rules: str = "none") -> torch.Tensor:
    """Return r_t = Σ_d E_td ∂y/∂E_td, (batch, tokens), from one forward and one backward pass.

    inputs  what the model takes: input_ids and attention_mask (batch, tokens), or pixel_values
    target  explained class as in `read_attention`; y is its logit
    rules   "none" for the plain gradient, "cp" or "attnlrp" for relevance

    E are the word embeddings as the table has them, before positions, types and norm; of an image, what the
    patch projection puts out, before positions. Special tokens have values like any word; padding, and the
    tokens before an image's patches, which are the same for every image, get 0.
    Raises ValueError for unknown rules, a model that they do not know, an unknown target, or values that are
    not finite.
    """
    check_explainable(model, inputs, gradients=True)
    with torch.enable_grad(), relevance_rules(model, rules), start_at_embeddings(model) as embeddings:
        logits = model(**inputs).logits
        chosen = resolve_target(model, logits, target)
        explained = logits.gather(1, chosen[:, None]).sum()
        (gradient,) = torch.autograd.grad(explained * GRADIENT_SCALE, embeddings)
    return times_input(model, inputs, embeddings[0], gradient / GRADIENT_SCALE)


def contrast_relevance(model, inputs, players: torch.Tensor, target=None) -> torch.Tensor:
    """Return Σ_d (h_t − h'_t)_d ∂̃y/∂h_td for the state h_t that enters each layer, (batch, layers, tokens).

    players  bool (batch, tokens): for h' each of them is the average word, the mean of the embedding table,
             or the average patch of its image
    target   explained class as in `read_attention`; y is its logit

    One forward pass without gradients, then one forward and one backward pass under contrast. Raises
    ValueError as `gradient_times_input` does, and for players that do not fit.
    """
    check_explainable(model, inputs, gradients=True)
    check_players(players)
    check_rules(model, "cp")
    origins: list = []
    states: tuple[list, list] = [], []
    with torch.no_grad(), _contrast(model, origins, states[0], _averaged(model, players)):
        model(**inputs)
    with torch.enable_grad(), start_at_embeddings(model), _contrast(model, iter(origins), states[1]):
        logits = model(**inputs).logits
        explained = logits.gather(1, resolve_target(model, logits, target)[:, None]).sum()
        gradients = torch.autograd.grad(explained * GRADIENT_SCALE, states[1])
    both = zip(states[1], states[0], gradients, strict=True)
    dtype = full_precision(logits.dtype)
    found = [((h.detach() - other).to(dtype) * gradient.to(dtype)).sum(-1) for h, other, gradient in both]
    if not torch.isfinite(relevance := torch.stack(found, 1) / GRADIENT_SCALE).all():
        raise ValueError("the relevance holds NaN or infinity; check the weights or the precision")
    return relevance


def reference_logits(model, inputs, players: torch.Tensor) -> torch.Tensor:
    """Return the logits (batch, classes) of the pass that `contrast_relevance` compares with.

    One forward pass without gradients. Raises ValueError for players that do not fit.
    """
    check_explainable(model, inputs)
    check_players(players)
    handle = model.get_input_embeddings().register_forward_hook(_averaged(model, players))
    try:
        with torch.no_grad():
            return model(**inputs).logits
    finally:
        handle.remove()


@contextmanager
def start_at_embeddings(model):
    """Let the graph of the enclosed pass start at the word or patch embeddings.

    Yields a list that holds them afterwards, one tensor (batch, words or patches, hidden).
    """
    embeddings = []

    def start(module, args, output):
        embeddings.append(output.detach().requires_grad_())
        return embeddings[-1]

    handle = model.get_input_embeddings().register_forward_hook(start)
    try:
        yield embeddings
    finally:
        handle.remove()


def times_input(model, inputs, embeddings: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """Return Σ_d E_td g_td for every token (batch, tokens), 0 before an image's patches."""
    dtype = full_precision(embeddings.dtype)
    values = (embeddings.detach().to(dtype) * gradient.to(dtype)).sum(-1)
    if not torch.isfinite(values).all():
        raise ValueError("gradient × input holds NaN or infinity; check the weights or the precision")
    if "pixel_values" in inputs:
        prefix, *_ = patch_grid(model, inputs["pixel_values"].shape[-2:])
        values = nn.functional.pad(values, (prefix, 0))
    return values


def check_rules(model, rules: str) -> None:
    """Raise ValueError for unknown rules, or for an activation or norm that they do not know, by its name."""
    if rules not in RULES:
        raise ValueError(f"rules {rules!r} are unknown; use one of {', '.join(RULES)}")
    if rules == "none":
        return
    parts = {type(part).__name__ for part in model.modules() if next(part.children(), None) is None}
    unknown = sorted(parts - {*SLOPE_AT_ZERO, *LINEAR, "LayerNorm"})
    unknown = [part for part in unknown if not part.endswith(LINEAR_ENDINGS)]
    name, family = type(model).__name__, model.config.model_type
    if unknown or family not in FAMILIES:
        what = f"has {', '.join(unknown)}" if unknown else f"is of the family {family!r}"
        raise ValueError(
            f"{name} {what}, for which there is no rule of relevance; use rules='none', or a model of "
            f"the families {', '.join(FAMILIES)} with GELU, ReLU or tanh and LayerNorm"
        )
    for layer in transformer_blocks(model):
        for role, names in PROJECTIONS.items():
            if sum(path.rsplit(".")[-1] in names for path, _ in layer.named_modules()) != 1:
                raise ValueError(f"{name} has no single {role} projection per layer, so no rule can reach it")


class _Slope(torch.autograd.Function):
    """Return `output` as it is; going back, x gets the gradient times `slope`, minus the mean if `centre`."""

    @staticmethod
    def forward(ctx, x, output, slope, centre):
        ctx.save_for_backward(slope)
        ctx.centre = centre
        return output.view_as(output)

    @staticmethod
    def backward(ctx, gradient):
        (slope,) = ctx.saved_tensors
        gradient = gradient * slope
        if ctx.centre:
            gradient = gradient - gradient.mean(-1, keepdim=True)
        return gradient, None, None, None


def _hooks(model, rules: str, activation=None):
    """Register the hooks one by one, and yield their handles; activation(module, x, output) is their rule."""
    activation = activation or _from_zero
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            yield module.register_forward_hook(_norm_rule)
        elif type(module).__name__ in SLOPE_AT_ZERO:
            yield module.register_forward_hook(
                lambda module, args, output: activation(module, args[0], output)
            )
        parts = dict(module.named_children())
        if {
            "dense",
            "out_proj",
        } <= parts.keys() and "activation" not in parts:  # RoBERTa's head calls torch.tanh
            yield from _tanh_between(parts["dense"], parts["out_proj"], activation)
    factors = {"query": SHARE * SHARE, "key": SHARE * SHARE, "value": SHARE}
    if rules == "cp":
        factors = {"query": 0, "key": 0, "value": 1}
    for layer in transformer_blocks(model):
        for path, module in layer.named_modules():
            for role, names in PROJECTIONS.items():
                if path.rsplit(".")[-1] in names and factors[role] != 1:
                    yield module.register_forward_hook(_scaling(factors[role]))


def _norm_rule(module, args, output):
    x = args[0].detach().to(full_precision(args[0].dtype))
    slope = torch.native_layer_norm(x, module.normalized_shape, None, None, module.eps)[2]  # 1 / σ
    slope = slope if module.weight is None else slope * module.weight.detach()
    return _Slope.apply(args[0], output.detach(), slope, True)


def _from_zero(module, x, output):
    """Return the activation's output, linear in x going back, with the slope a(x) / x."""
    slope = (output.detach() / x.detach()).nan_to_num_(
        SLOPE_AT_ZERO[type(module).__name__]
    )  # 0 / 0: its limit
    return _Slope.apply(x, output.detach(), slope, False)


def _tanh_between(first, second, activation):
    """Give a tanh that is no module its rule, from the output of one layer to the input of the next."""
    seen, tanh = [], nn.Tanh()
    yield first.register_forward_hook(lambda module, args, output: seen.append(output))
    yield second.register_forward_pre_hook(lambda module, args: (activation(tanh, seen.pop(), args[0]),))


@contextmanager
def _contrast(model, origins, states: list, start=None):
    """Keep the states that enter the layers of the enclosed pass, and what its activations see in `origins`;

    or, where `origins` is an iterator over such a list, let the pass go backward by contrast with it.
    """

    def from_origin(module, x, output):
        if isinstance(origins, list):
            origins.append((x.detach(), output.detach()))
            return output
        x0, output0 = next(origins)
        between = ((x.detach() + x0) / 2).requires_grad_()
        (slope,) = torch.autograd.grad(module.forward(between).sum(), between)
        far = (x.detach() - x0).abs() > CLOSE
        secant = (output.detach() - output0) / (x.detach() - x0)
        return _Slope.apply(x, output.detach(), torch.where(far, secant, slope), False)

    def keep(module, args, kwargs):
        states.append(args[0] if args else kwargs["hidden_states"])

    with ExitStack() as hooks:
        if start is not None:
            hooks.callback(model.get_input_embeddings().register_forward_hook(start).remove)
        for layer in transformer_blocks(model):
            hooks.callback(layer.register_forward_pre_hook(keep, with_kwargs=True).remove)
        for handle in _hooks(model, "cp", from_origin):
            hooks.callback(handle.remove)
        yield


def _averaged(model, players: torch.Tensor):
    """Return a hook that puts the average word, or patch, in the place of every player."""

    def average(module, args, output):
        text = isinstance(module, nn.Embedding)
        prefix = players.shape[1] - output.shape[1]  # class and register tokens, which come later
        if len(players) != len(output) or prefix < 0 or (text and prefix):
            raise ValueError(
                f"players {tuple(players.shape)} do not fit {tuple(output.shape[:2])} words or patches"
            )
        if text:
            return torch.where(players[..., None], module.weight.mean(0).to(output), output)
        inner = players[:, prefix:, None]
        mean = (output * inner).sum(1, keepdim=True) / inner.sum(1, keepdim=True)
        return torch.where(inner, mean, output)

    return average


def _scaling(factor: float):
    """Return a forward hook that scales the gradient of what a module puts out."""

    def scale(module, args, output):
        if factor == 0:
            return output.detach()
        if output.requires_grad:
            output.register_hook(lambda gradient: gradient * factor)
        return None

    return scale
