"""Relevance follows its rules: against sums done by hand, finite differences, and what must be conserved."""

import pytest
import torch
from conftest import SENTENCES, SPREAD, TEXT_CONFIGS, build_text_classifier
from torch.nn.functional import gelu
from torch.testing import assert_close
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    DeiTConfig,
    DeiTForImageClassification,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    activations,
)

from helpers.attention import AttentionMaps, read_attention
from helpers.baselines import chefer_relevance, grad_sam
from helpers.estimators import enumerate_shapley, published_limit
from helpers.images import patch_players
from helpers.models import fast_attention, set_precision
from helpers.relevance import SLOPE_AT_ZERO, contrast_relevance, gradient_times_input, relevance_rules
from helpers.runtime import measure_cost
from helpers.shapley import attention_shapley, best_attention_game, coalition_values, pairwise_matrix
from helpers.text import encode, token_players

IMAGE_MODELS = {
    "vit": (ViTConfig, ViTForImageClassification),
    "deit": (DeiTConfig, DeiTForImageClassification),
    "dinov2": (Dinov2Config, Dinov2ForImageClassification),
    "dinov2_with_registers": (Dinov2WithRegistersConfig, Dinov2WithRegistersForImageClassification),
}
RULED = ("cp", "attnlrp")
PIXELS = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
TINY |= {"image_size": 16, "patch_size": 8, "num_labels": 3, "initializer_range": SPREAD}


def build_image_classifier(family, **options):
    torch.manual_seed(0)
    config, kind = IMAGE_MODELS[family]
    model = kind._from_config(config(**TINY, **options), attn_implementation="eager")
    return model.double().eval().requires_grad_(False)


@pytest.fixture(params=[*TEXT_CONFIGS, *IMAGE_MODELS])
def classifier(request, tokenizer, roberta_tokenizer):
    """Each family in turn, in double precision, with inputs: sentences of different lengths, or images.

    The softmax of ViT and DeiT runs in single precision all the same.
    """
    if request.param in IMAGE_MODELS:
        return build_image_classifier(request.param), {"pixel_values": PIXELS.double()}
    chosen = roberta_tokenizer if request.param == "roberta" else tokenizer
    model = build_text_classifier(request.param, len(chosen)).double()
    return model, encode(SENTENCES, chosen, model)


def hooks_of(model):
    """Ids of all forward hooks; transformers sets its own, once, in the first pass that returns attention."""
    return [hook for part in model.modules() for hook in (*part._forward_hooks, *part._forward_pre_hooks)]


# Nothing but the backward pass changes


@pytest.mark.parametrize("rules", RULED)
def test_outputs_and_weights_stay_and_hooks_go(classifier, rules):
    model, inputs = classifier
    before = model(**inputs, output_attentions=True)
    hooks, weights = hooks_of(model), [parameter.clone() for parameter in model.parameters()]
    with relevance_rules(model, rules):
        inside = model(**inputs, output_attentions=True)
        assert len(hooks_of(model)) > len(hooks)
    assert_close(inside.logits, before.logits, rtol=0, atol=1e-6)
    assert_close(inside.attentions, before.attentions, rtol=0, atol=1e-6)
    gradient_times_input(model, inputs, rules=rules)
    read_attention(model, inputs, gradients=True, rules="attnlrp")
    assert hooks_of(model) == hooks
    assert all(torch.equal(*pair) for pair in zip(model.parameters(), weights, strict=True))
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_hooks_go_after_an_error(model, tokenizer):
    inputs = encode(SENTENCES, tokenizer, model)
    model(**inputs, output_attentions=True)
    hooks = hooks_of(model)
    with pytest.raises(ZeroDivisionError), relevance_rules(model, "attnlrp"):
        raise ZeroDivisionError
    for rules in RULED:
        with pytest.raises(ValueError, match="label 'happy'"):
            gradient_times_input(model, inputs, "happy", rules=rules)
    with pytest.raises(ValueError, match="label 'happy'"):
        read_attention(model, inputs, "happy", gradients=True, rules="attnlrp")
    assert hooks_of(model) == hooks


def test_without_rules_it_is_the_gradient_times_the_word_embedding(classifier):
    model, inputs = classifier
    values = gradient_times_input(model, inputs, target=1)
    table = model.get_input_embeddings()
    step, moved = 1e-3, []
    for factor in (1 + step, 1 - step):  # longer embeddings of all tokens: the sum of r over the tokens
        handle = table.register_forward_hook(lambda module, args, output, factor=factor: output * factor)
        moved.append(model(**inputs).logits[:, 1])
        handle.remove()
    assert_close(values.sum(-1), (moved[0] - moved[1]) / (2 * step), rtol=1e-3, atol=1e-4)


# Solved by hand


@pytest.mark.parametrize(("rules", "shares"), [("cp", [76, -52, 40]), ("attnlrp", [52, -22, 16])])
def test_two_layers_of_width_two_solved_by_hand(rules, shares):
    """A norm of two numbers leaves a sign n = d/|d|, d half their difference: here n = 1, -1, 1.

    Attention is even, so a layer makes d' = n + mean of n = (4/3, -2/3, 4/3). The values carry a share c of
    the mean's relevance, 1 or ½; the rest ends in queries of zero. So of token 1's relevance (1 + c/3) · 3/4
    goes to its own n, -c/4 to token 2 and c/4 to token 3; of token 2's (1 + c/3) · 3/2 to its own, -c/2 to
    each other.
    Twice: 19/16, -13/16, 10/16 of the logit tanh(1) for c = 1, and 52/64, -22/64, 16/64 for c = ½.
    """
    config = BertConfig(
        vocab_size=3, hidden_size=2, num_hidden_layers=2, num_attention_heads=1, intermediate_size=2
    )
    model = BertForSequenceClassification._from_config(config, attn_implementation="eager").double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "LayerNorm" not in name:
                parameter.zero_()
        model.get_input_embeddings().weight.copy_(torch.tensor([[3.0, 1.0], [2.0, 6.0], [0.5, 0.0]]))
        for layer in model.bert.encoder.layer:
            layer.attention.self.value.weight.copy_(torch.eye(2))
            layer.attention.output.dense.weight.copy_(torch.eye(2))
        model.bert.pooler.dense.weight.copy_(torch.eye(2))
        model.classifier.weight[1, 0] = 1
    inputs = {"input_ids": torch.tensor([[0, 1, 2]]), "attention_mask": torch.ones(1, 3)}
    relevance = gradient_times_input(model, inputs, target=1, rules=rules)
    expected = torch.tensor([shares], dtype=torch.double) / 64 * torch.tensor(1.0, dtype=torch.double).tanh()
    assert_close(relevance, expected, rtol=0, atol=1e-10)


def surrogate(
    model, embeddings, frozen, rules, nudge=None, shift=None, states=None, origin=None, recording=False
):
    """A BERT's logits written out, from word embeddings (tokens, width), with what the rules hold fixed.

    The first call fills `frozen`; later ones read it. nudge = (layer, head, query, key, by) adds to a weight,
    shift = (layer, by) to the state that enters a layer, all of which `states` collects. `origin` collects
    what activations see when recording, else their slopes start there.
    """
    bert, heads, place = model.bert, model.config.num_attention_heads, iter(range(1000))

    def held(value):
        return frozen.setdefault(next(place), value.clone())

    def norm(module, x):
        sigma = held((x.var(-1, correction=0, keepdim=True) + module.eps).sqrt())
        return (x - x.mean(-1, keepdim=True)) / sigma * module.weight + module.bias

    def activate(function, x):
        if recording:
            origin.append(x.clone())
        if recording or (origin is None and shift is None):
            return x * held(function(x) / x)
        x0 = held(origin.pop(0) if origin else x)
        return held(function(x0)) + (x - x0) * held((function(x) - function(x0)) / (x - x0))

    def product(a, b):
        return (a @ held(b) + held(a) @ b) / 2

    def split(x):
        return x.unflatten(-1, (heads, -1)).transpose(0, 1)

    table = bert.embeddings
    x = (
        embeddings
        + table.position_embeddings.weight[: len(embeddings)]
        + table.token_type_embeddings.weight[0]
    )
    x = norm(table.LayerNorm, x)
    for number, layer in enumerate(bert.encoder.layer):
        x = x + shift[1] if shift and shift[0] == number else x
        if states is not None:
            states.append(x)
        attention = layer.attention.self
        q, k, v = (split(part(x)) for part in (attention.query, attention.key, attention.value))
        scores = product(q, k.transpose(1, 2)) if rules == "attnlrp" else q @ k.transpose(1, 2)
        weights = (scores / q.shape[-1] ** 0.5).softmax(-1)
        weights = held(weights) if rules == "cp" else weights
        if nudge and nudge[0] == number:
            weights = weights.clone()
            weights[nudge[1:4]] += nudge[4]
        mixed = product(weights, v) if rules == "attnlrp" else weights @ v
        output = layer.attention.output
        x = norm(output.LayerNorm, x + output.dense(mixed.transpose(0, 1).flatten(1)))
        inner = activate(gelu, layer.intermediate.dense(x))
        x = norm(layer.output.LayerNorm, x + layer.output.dense(inner))
    return model.classifier(activate(torch.tanh, bert.pooler.dense(x[0])))


@pytest.mark.parametrize("rules", RULED)
def test_relevance_equals_finite_differences_of_the_network_with_frozen_parts(model, tokenizer, rules):
    model = model.double()
    inputs = encode(SENTENCES[:1], tokenizer, model)
    embeddings = model.get_input_embeddings()(inputs["input_ids"])[0]
    frozen: dict = {}
    assert_close(surrogate(model, embeddings, frozen, rules), model(**inputs).logits[0])
    slopes = []
    for token in range(len(embeddings)):
        logits = []
        for step in (1e-5, -1e-5):
            moved = embeddings.clone()
            moved[token] *= 1 + step
            logits.append(surrogate(model, moved, frozen, rules)[2])
        slopes.append((logits[0] - logits[1]) / 2e-5)
    found = gradient_times_input(model, inputs, target=2, rules=rules)[0]
    assert_close(found, torch.stack(slopes), rtol=1e-6, atol=1e-8)
    assert (found - gradient_times_input(model, inputs, target=2)[0]).abs().max() > 0.01


def test_gradients_of_the_weights_equal_finite_differences_with_frozen_parts(model, tokenizer):
    model = model.double()
    inputs = encode(SENTENCES[:1], tokenizer, model)
    maps = read_attention(model, inputs, target=2, gradients=True, rules="attnlrp")
    embeddings = model.get_input_embeddings()(inputs["input_ids"])[0]
    frozen: dict = {}
    surrogate(model, embeddings, frozen, "attnlrp")
    for place in [(0, 0, 2, 1), (0, 3, 4, 0), (1, 1, 3, 2), (1, 2, 0, 4), (2, 0, 0, 1), (2, 3, 0, 5)]:
        up, down = (surrogate(model, embeddings, frozen, "attnlrp", (*place, by)) for by in (1e-5, -1e-5))
        slope = ((up - down)[2] / 2e-5).item()
        assert maps.gradients[0][place].item() == pytest.approx(slope, rel=1e-6, abs=1e-9)
        assert abs(slope) > 1e-5


@pytest.mark.parametrize("kind", SLOPE_AT_ZERO)
def test_slope_of_an_activation_is_its_secant_and_at_zero_its_derivative(kind, model, tokenizer):
    activation = getattr(torch.nn, kind, None) or getattr(activations, kind)
    activation = activation()
    step = torch.tensor(1e-4, dtype=torch.double)
    if kind != "ReLU":  # which has no derivative at 0; autograd's 0 is kept
        slope = (activation(step) - activation(-step)) / (2 * step)
        assert slope.item() == pytest.approx(SLOPE_AT_ZERO[kind], abs=1e-3)
    model = model.double()
    intermediate = model.bert.encoder.layer[1].intermediate
    intermediate.intermediate_act_fn = activation
    kept = []

    def keep(module, args, output):
        output = output.clone()
        output[..., :2] = 0
        kept.append(output.requires_grad_())
        return output

    handle = intermediate.dense.register_forward_hook(keep)
    with relevance_rules(model, "cp"):
        after = intermediate(
            torch.randn(3, 32, dtype=torch.double, generator=torch.Generator().manual_seed(0))
        )
        (slope,) = torch.autograd.grad(after.sum(), kept)
    handle.remove()
    x = kept[0].detach()
    assert_close(slope[:, 2:], (activation(x) / x)[:, 2:])
    assert (slope[:, :2] == SLOPE_AT_ZERO[kind]).all()


# What is conserved


def without_constants(model):
    """Take out what a network adds and is not of the input: biases, positions, types, prefix tokens."""
    for name, parameter in model.named_parameters():
        names = ("bias", "position_embeddings", "token_type_embeddings", "cls_token", "register_tokens")
        if any(part in name for part in (*names, "distillation_token")) and "projection" not in name:
            parameter.zero_()
        elif "norm" in name.lower():
            parameter.mul_(1 + 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return model


def test_relevance_is_conserved_where_attention_is_frozen(classifier):
    model, inputs = without_constants(classifier[0]), classifier[1]
    logits = model(**inputs).logits
    for target in (0, 2):
        relevance = gradient_times_input(model, inputs, target, rules="cp")
        assert_close(relevance.sum(-1), logits[:, target], rtol=0, atol=1e-9)
    assert (gradient_times_input(model, inputs, 0).sum(-1) - logits[:, 0]).abs().max() > 1e-3


def test_relevance_under_attnlrp_is_conserved_but_for_what_softmax_keeps(classifier):
    """A weight's relevance is R = A ∘ ∂y/∂A. Of a row softmax passes Σ_j log A_j (R_j - A_j Σ R) on."""
    model, inputs = without_constants(classifier[0]), classifier[1]
    maps = read_attention(model, inputs, target=1, gradients=True, rules="attnlrp")
    shares = maps.weights * maps.gradients
    passed_on = shares - maps.weights * shares.sum(-1, keepdim=True)
    kept = shares - maps.weights.clamp(min=1e-300).log() * passed_on
    assert_close(maps.relevance.sum(-1) + kept.sum((1, 2, 3, 4)), maps.logits[:, 1], rtol=0, atol=1e-6)
    assert kept.sum((1, 2, 3, 4)).abs().max() > 1e-3


# Batches


@pytest.mark.parametrize("rules", ["none", *RULED])
def test_batched_and_padded_equal_each_sentence_alone(text_classifier, rules):
    model, tokenizer = text_classifier[0].double(), text_classifier[1]
    wide = tokenizer(SENTENCES, padding="max_length", max_length=30, return_tensors="pt")
    together = gradient_times_input(model, wide, 1, rules)
    for row, sentence in enumerate(SENTENCES):
        alone = gradient_times_input(model, encode([sentence], tokenizer, model), 1, rules)
        n = alone.shape[1]
        assert_close(together[row, :n], alone[0], rtol=0, atol=1e-12)
        assert together[row, n:].abs().max() == 0


def rows_of(model, inputs, players):
    maps = read_attention(model, inputs, 1, gradients=True)
    ruled = read_attention(model, inputs, 1, gradients=True, rules="attnlrp")
    rows = [chefer_relevance(maps), chefer_relevance(maps, signed=True), ruled.relevance]
    for found, weighting in ((maps, "attention"), (maps, "gradient"), (ruled, "relevance")):
        matrix = pairwise_matrix(found, weighting)
        rows += [attention_shapley(matrix, players, game) for game in ("received", "cls", "mutual")]
    return torch.stack(rows)


def test_every_row_of_a_padded_batch_is_that_of_each_sentence_alone(text_classifier):
    model, tokenizer = text_classifier[0].double(), text_classifier[1]
    wide = tokenizer(SENTENCES, padding="max_length", max_length=30, return_tensors="pt")
    together = rows_of(model, wide, token_players(wide, tokenizer))
    for row, sentence in enumerate(SENTENCES):
        inputs = encode([sentence], tokenizer, model)
        alone = rows_of(model, inputs, token_players(inputs, tokenizer))
        n = inputs["input_ids"].shape[1]
        assert_close(together[:, row, :n], alone[:, 0], rtol=0, atol=1e-12)
        assert together[:, row, n:].abs().max() == 0


def test_images_of_a_batch_are_explained_as_each_alone(classifier):
    model, inputs = classifier
    if "pixel_values" not in inputs:
        pytest.skip("texts have their own test")
    together = gradient_times_input(model, inputs, 1, "attnlrp")
    alone = [
        gradient_times_input(model, {"pixel_values": image[None]}, 1, "attnlrp") for image in PIXELS.double()
    ]
    assert_close(together, torch.cat(alone), rtol=0, atol=1e-12)
    assert (
        together[:, -4:].abs().min() > 0 and together[:, :-4].abs().max() == 0
    )  # four patches, and the prefix
    assert together.shape[1] == read_attention(model, inputs).weights.shape[-1]


def test_fused_attention_gives_the_same(classifier):
    model, inputs = classifier
    for rules in RULED:
        eager = gradient_times_input(model, inputs, 1, rules)
        with fast_attention(model):
            assert_close(gradient_times_input(model, inputs, 1, rules), eager, rtol=0, atol=1e-6)


def test_half_precision_stays_near_and_comes_out_whole(text_classifier):
    model, tokenizer = text_classifier
    inputs = encode(SENTENCES, tokenizer, model)
    for rules in RULED:
        whole = gradient_times_input(model, inputs, 1, rules)
        set_precision(model, "bfloat16")
        half = gradient_times_input(model, inputs, 1, rules)
        set_precision(model, "float32")
        assert half.dtype == torch.float32 and 1e-4 < (half - whole).norm() / whole.norm() < 0.1


# Rows that share a pass


def test_relevance_comes_with_the_maps_and_both_passes_serve_all_rows(text_classifier):
    model, tokenizer = text_classifier
    inputs = encode(SENTENCES, tokenizer, model)
    with measure_cost(model) as cost:
        rows = rows_of(model, inputs, token_players(inputs, tokenizer))
    assert (cost.forwards, cost.backwards) == (6, 6)  # two passes of three sentences
    assert_close(rows[2], gradient_times_input(model, inputs, 1, "attnlrp"))
    assert read_attention(model, inputs, gradients=True).relevance is None


def test_relevance_weighting_averages_weights_times_gradients_with_their_sign(model, tokenizer):
    maps = read_attention(model, encode(SENTENCES, tokenizer, model), gradients=True, rules="attnlrp")
    matrix = pairwise_matrix(maps, "relevance")
    assert_close(matrix, (maps.weights * maps.gradients).mean((1, 2)))
    assert matrix.min() < 0 < matrix.max() and maps.rules == "attnlrp"


def test_maps_of_other_rules_are_refused(model, tokenizer):
    inputs = encode(SENTENCES, tokenizer, model)
    plain, bare = read_attention(model, inputs, gradients=True), read_attention(model, inputs)
    ruled = read_attention(model, inputs, gradients=True, rules="attnlrp")
    with pytest.raises(ValueError, match="'relevance' needs gradients of rules 'attnlrp', not of 'none'"):
        pairwise_matrix(plain, "relevance")
    with pytest.raises(ValueError, match=r"'relevance' needs gradients; call .*True, rules='attnlrp'\)"):
        pairwise_matrix(bare, "relevance")
    with pytest.raises(ValueError, match="'gradient' needs gradients of rules 'none', not of 'attnlrp'"):
        pairwise_matrix(ruled, "gradient")
    for row in (chefer_relevance, grad_sam):
        with pytest.raises(ValueError, match="needs gradients of rules 'none'"):
            row(ruled)
        with pytest.raises(ValueError, match="needs gradients; call"):
            row(bare)
    assert_close(pairwise_matrix(ruled), pairwise_matrix(plain))  # attention itself is the same


@pytest.mark.parametrize(
    ("gradients", "rules"), [(False, "attnlrp"), (True, "cp"), (False, "cp"), (True, "lrp")]
)
def test_rules_that_attention_cannot_be_read_with_are_refused(model, tokenizer, gradients, rules):
    with pytest.raises(ValueError, match=f"not with rules='{rules}' and gradients={gradients}"):
        read_attention(model, encode(SENTENCES, tokenizer, model), gradients=gradients, rules=rules)


# The game `received`


def test_received_is_the_sum_of_the_column_over_real_tokens_special_ones_too(model, tokenizer):
    inputs = encode(SENTENCES, tokenizer, model)
    players = token_players(inputs, tokenizer)
    maps = read_attention(model, inputs)
    values = attention_shapley(pairwise_matrix(maps), players, "received")
    for row in range(3):
        n = int(inputs["attention_mask"][row].sum())
        columns = maps.weights[row, :, :, :n].mean((0, 1)).sum(0)
        assert_close(values[row], columns * players[row])
    assert (inputs["attention_mask"] == 0).any()


def test_received_equals_enumeration_of_all_coalitions():
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(7, 7, dtype=torch.double, generator=generator)
    players = torch.tensor([False, True, True, True, False, True, True])

    def value(coalitions):
        everyone = torch.zeros(len(coalitions), 7, dtype=torch.bool)
        everyone[:, players] = coalitions
        worth = coalition_values(matrix, everyone, "received")
        assert_close(worth, torch.stack([matrix[:, members].sum() for members in everyone]))
        return worth

    values = attention_shapley(matrix[None], players[None], "received")[0]
    assert_close(values[players], enumerate_shapley(value, 5), rtol=0, atol=1e-13)
    assert (values[~players] == 0).all()
    assert_close(published_limit(matrix[None], players[None], "received")[0] * 2**4, values)


# Chefer's relevance


@pytest.mark.parametrize(("signed", "expected"), [(False, [0.5, 0.25, 0.125]), (True, [0.5, 0.0625, 0.125])])
def test_chefer_of_three_tokens_and_two_layers_solved_by_hand(signed, expected):
    """Layer 1: token 1 takes ½ from token 2. Layer 2: [CLS] takes ½ of itself, ¼ of token 1.

    R = (I + Ā₂)(I + Ā₁), and the row of [CLS] in Ā₂ Ā₁ is ¼ · ½ at token 2. A second head of layer 1 lets
    [CLS] take -1/8 from token 1, on the mean of the heads; 3/2 of it comes through layer 2.
    """
    weights, gradients = torch.full((1, 2, 2, 3, 3), 0.5), torch.zeros(1, 2, 2, 3, 3)
    gradients[0, 0, 0, 1, 2] = 2  # times a weight of ½ and over two heads: ½
    gradients[0, 0, 1, 0, 1] = -0.5  # -1/8
    gradients[0, 1, 0, 0, 0] = 2
    gradients[0, 1, 1, 0, 1] = 1
    maps = AttentionMaps(torch.zeros(1, 2), torch.zeros(1), weights, gradients)
    assert_close(chefer_relevance(maps, signed), torch.tensor([expected]))


def test_chefer_equals_the_product_of_whole_matrices(model, tokenizer):
    maps = read_attention(model, encode(SENTENCES, tokenizer, model), gradients=True)
    for signed in (False, True):
        identity = relevance = torch.eye(maps.weights.shape[-1])
        for layer in range(3):
            step = maps.weights[:, layer] * maps.gradients[:, layer]
            relevance = relevance + (step if signed else step.relu()).mean(1) @ relevance
        assert_close(chefer_relevance(maps, signed), (relevance - identity)[:, 0])


# Models that the rules do not know


def refuse(model, inputs, message):
    def never(module, args, kwargs):
        raise AssertionError("the model ran")

    hook = model.register_forward_pre_hook(never, with_kwargs=True)
    hooks = hooks_of(model)
    for call in (
        lambda: gradient_times_input(model, inputs, rules="cp"),
        lambda: gradient_times_input(model, inputs, rules="attnlrp"),
        lambda: read_attention(model, inputs, gradients=True, rules="attnlrp"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert hooks_of(model) == hooks
    hook.remove()
    assert torch.isfinite(gradient_times_input(model, inputs)).all()  # the plain gradient needs no rule


def test_unknown_activations_norms_and_families_are_refused_by_name(model, tokenizer):
    inputs = encode(SENTENCES, tokenizer, model)
    options = {**TINY, "vocab_size": len(tokenizer)}
    options = {name: options[name] for name in options if name not in ("image_size", "patch_size")}
    silu = BertForSequenceClassification._from_config(
        BertConfig(**options, hidden_act="silu"), attn_implementation="eager"
    )
    refuse(
        silu.eval(), inputs, "BertForSequenceClassification has SiLUActivation, for which there is no rule"
    )
    albert = AlbertConfig(**options, embedding_size=16, inner_group_num=1)
    albert = AlbertForSequenceClassification._from_config(albert, attn_implementation="eager")
    refuse(albert.eval(), inputs, "AlbertForSequenceClassification is of the family 'albert'")
    model.bert.encoder.layer[1].output.LayerNorm = torch.nn.RMSNorm(32)
    refuse(model, inputs, "BertForSequenceClassification has RMSNorm")


def test_gated_units_are_refused_by_name():
    model = build_image_classifier("dinov2", use_swiglu_ffn=True)
    refuse(model, {"pixel_values": PIXELS.double()}, "Dinov2ForImageClassification has SiLUActivation")


def test_unknown_rules_are_named(model, tokenizer):
    with pytest.raises(ValueError, match="rules 'lrp' are unknown; use one of none, cp, attnlrp"):
        gradient_times_input(model, encode(SENTENCES, tokenizer, model), rules="lrp")


def test_values_that_are_not_finite_are_named(model, tokenizer):
    model.bert.pooler.dense.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="gradient × input holds NaN or infinity"):
        gradient_times_input(model, encode(SENTENCES, tokenizer, model), rules="attnlrp")


# The contrast with the average word, and the game on it


def playing(model, inputs, tokenizers):
    """Return who plays, by the kind of the inputs; tokenizers hold the special tokens."""
    if "pixel_values" in inputs:
        return patch_players(model, inputs)
    return token_players(inputs, tokenizers[model.config.model_type == "roberta"])


def test_contrast_solved_by_hand_without_attention(model, tokenizer):
    """Blocks that pass their states on, the pooler's tanh, and a head that reads one of its numbers: with
    h the state of [CLS], who does not play but sees the others by the first layer's values alone."""
    model = model.double()
    inputs = encode(SENTENCES[:1], tokenizer, model)
    players = token_players(inputs, tokenizer)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "encoder" in name and "LayerNorm" not in name:
                parameter.zero_()
        first = model.bert.encoder.layer[0].attention
        first.self.value.weight.copy_(torch.eye(32))
        first.output.dense.weight.copy_(torch.eye(32))
    table = model.get_input_embeddings()
    seen = []
    hooks = [
        part.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
        for part in (model.bert.embeddings.LayerNorm, first.output.LayerNorm, model.bert.pooler.dense)
    ]
    average = table.weight.mean(0).expand(players.shape[1], -1)
    model(**inputs)
    model(inputs_embeds=torch.where(players[..., None], average, table(inputs["input_ids"])))
    for hook in hooks:
        hook.remove()
    (_, h), (s, _), (_, z), (_, other), (_, _), (_, z0) = seen  # with the words, and without
    slope = (z.tanh() - z0.tanh()) / (z - z0) * model.classifier.weight[1]  # of the pooler, where they differ
    back = slope[0] @ model.bert.pooler.dense.weight
    for _ in range(5):  # norms of a state that is normed already: 1 / sqrt(1 + eps), about
        back = (back - back.mean()) / (1 + model.config.layer_norm_eps) ** 0.5
    sigma = (s[0, 0].var(correction=0) + model.config.layer_norm_eps).sqrt()
    back = (back - back.mean()) / sigma / h.shape[1]  # attention is even
    expected = (h - other)[0] @ back * players[0]
    assert_close(best_attention_game(model, inputs, players, 1)[0], expected, rtol=1e-5, atol=1e-9)
    assert expected.abs().max() > 1e-3


def test_contrast_equals_finite_differences_of_the_network_with_frozen_parts(model, tokenizer):
    model = model.double()
    inputs = encode(SENTENCES[:1], tokenizer, model)
    table, players = model.get_input_embeddings(), token_players(inputs, tokenizer)
    words = table(inputs["input_ids"])[0]
    average = torch.where(players[0, :, None], table.weight.mean(0), words)
    origin, states, frozen = [], ([], []), {}
    surrogate(model, average, {}, "cp", states=states[0], origin=origin, recording=True)
    assert_close(
        surrogate(model, words, frozen, "cp", states=states[1], origin=list(origin)),
        model(**inputs).logits[0],
    )
    found = contrast_relevance(model, inputs, players, target=2)[0]
    for layer, token in [(0, 1), (0, 5), (1, 2), (1, 0), (2, 3)]:
        way = torch.zeros_like(words)
        way[token] = (states[1][layer] - states[0][layer])[token]
        up, down = (
            surrogate(model, words, frozen, "cp", shift=(layer, step * way)) for step in (1e-5, -1e-5)
        )
        assert found[layer, token].item() == pytest.approx(((up - down)[2] / 2e-5).item(), rel=1e-6, abs=1e-9)
        assert found[layer, token].abs() > 1e-6


def test_best_game_is_received_on_attention_and_the_skip_connection(model, tokenizer):
    """M[i,j] = Σ_h A (v_j − v'_j)·∂̃y/∂o_i + [i=j] (h_j − h'_j)·∂̃y/∂skip_j, in the lower half."""
    model = model.double()
    inputs = encode(SENTENCES, tokenizer, model)
    players, layer = token_players(inputs, tokenizer), model.bert.encoder.layer[0]
    values, states, gathered, skipped = [], [], [], []

    def keep(tensor, gradients):
        if tensor.requires_grad:
            tensor.register_hook(gradients.append)

    parts = layer.attention.self.value, layer.attention.output.dense
    hooks = [
        parts[0].register_forward_hook(lambda module, args, output: values.append(output.detach())),
        layer.register_forward_pre_hook(lambda module, args: states.append(args[0].detach())),
        parts[1].register_forward_pre_hook(lambda module, args: keep(args[0], gathered)),
        parts[1].register_forward_hook(lambda module, args, output: keep(output, skipped)),
    ]
    found = best_attention_game(model, inputs, players, 1)
    for hook in hooks:
        hook.remove()
    A = read_attention(model, inputs).weights[:, 0]
    v, slope = ((part).unflatten(-1, (4, -1)) for part in (values[1] - values[0], gathered[0] / 2**8))
    M = torch.einsum("bhij,bjhd,bihd->bij", A, v, slope)
    M += torch.diag_embed(((states[1] - states[0]) * skipped[0] / 2**8).sum(-1))
    assert_close(found, attention_shapley(M, players, "received"), rtol=1e-9, atol=1e-12)
    member = players[0]
    worth = coalition_values(M[0], torch.stack([member, ~member & member]), "received")
    assert_close(found[0].sum(), worth[0] - worth[1])  # efficiency


def test_best_game_of_every_family_batched_padded_and_alone(classifier, tokenizer, roberta_tokenizer):
    model, inputs = classifier
    players = playing(model, inputs, (tokenizer, roberta_tokenizer))
    before, hooks = model(**inputs).logits, hooks_of(model)
    together = best_attention_game(model, inputs, players, 1)
    assert hooks_of(model) == hooks and torch.equal(model(**inputs).logits, before)
    assert together.shape == players.shape and not together[~players].any() and together[players].all()
    for row in range(len(players)):
        part = {name: tensor[row : row + 1] for name, tensor in inputs.items()}
        n = int(part.get("attention_mask", players[:1]).sum()) if "attention_mask" in part else None
        part = part if n is None else {name: tensor[:, :n] for name, tensor in part.items()}
        alone = best_attention_game(model, part, players[row : row + 1, :n], 1)
        assert_close(together[row : row + 1, :n], alone, rtol=0, atol=1e-6)
    with fast_attention(model):
        assert_close(best_attention_game(model, inputs, players, 1), together, rtol=0, atol=1e-6)


def test_best_game_explains_the_class_that_is_named_or_predicted_in_two_passes_and_one_back(model, tokenizer):
    inputs = encode(SENTENCES, tokenizer, model)
    players = token_players(inputs, tokenizer)
    with measure_cost(model) as cost:
        predicted = best_attention_game(model, inputs, players)
    assert (cost.forwards, cost.backwards) == (2 * len(SENTENCES), len(SENTENCES))
    chosen = model(**inputs).logits.argmax(-1)
    assert_close(predicted, best_attention_game(model, inputs, players, chosen), rtol=0, atol=0)
    named = [best_attention_game(model, inputs, players, target) for target in ("neutral", 2, 0)]
    assert torch.equal(named[0], named[1]) and not torch.allclose(named[1], named[2])


def test_best_game_refuses_what_it_cannot_explain(model, tokenizer):
    inputs = encode(SENTENCES, tokenizer, model)
    players = token_players(inputs, tokenizer)
    hooks = hooks_of(model)
    for wrong, message in (
        ((inputs, players.float()), "players are bool"),
        ((inputs, players & (torch.arange(3) > 0)[:, None]), "input 0 has no players"),
        ((inputs, players[:, :-1]), "do not fit"),
        ((inputs, players, "happy"), "label 'happy'"),
    ):
        with pytest.raises(ValueError, match=message):
            best_attention_game(model, *wrong)
    assert hooks_of(model) == hooks
    with pytest.raises(ValueError, match="training mode"):
        best_attention_game(model.train(), inputs, players)
    model.eval().bert.encoder.layer[1].output.LayerNorm = torch.nn.RMSNorm(32)
    with pytest.raises(ValueError, match="has RMSNorm"):
        best_attention_game(model, inputs, players)
