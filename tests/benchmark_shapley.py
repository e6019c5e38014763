"""What attribution costs: against the bare passes of the model, and against the same rows written sentence by
sentence.

    python -m pytest tests/benchmark_shapley.py

The sentence-by-sentence side is written from the formulas as one writes them first: every row asks the model
again, the gradient rows run one backward pass for each sentence, max_mutual enumerates its coalitions,
erasure shares nothing.
"""

import itertools
import math
import os
import time
from contextlib import contextmanager

import pytest
import torch

from helpers import baselines
from helpers.attention import read_attention
from helpers.data import load_sentences
from helpers.faithfulness import KS, erased_probabilities, erasure_scores, rationale
from helpers.models import load_text_classifier
from helpers.relevance import gradient_times_input, start_at_embeddings
from helpers.runtime import measure_cost
from helpers.shapley import GAMES, WEIGHTINGS, attention_shapley, best_attention_game, pairwise_matrix
from helpers.text import encode, token_players

N_SENTENCES, LONGEST, BATCH = 64, 10, 32
SHAPLEY_ROWS = list(itertools.product(WEIGHTINGS, GAMES))
ROWS = [
    *(f"{weighting} {game}" for weighting, game in SHAPLEY_ROWS),
    "row sum",
    "received",
    "rollout",
    "Grad-SAM",
]


@pytest.fixture(scope="module", autouse=True)
def all_cores():
    before = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count())
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def classifier():
    return load_text_classifier(device="cpu")


@pytest.fixture(scope="module")
def texts(classifier):
    """64 movie sentences of at most 10 tokens, shortest first."""
    count = lambda text: len(classifier[1].tokenize(text))
    short = [text for text in load_sentences("movies_short", "test")["text"] if 2 < count(text) <= LONGEST]
    return sorted(short[:N_SENTENCES], key=count)


@pytest.fixture
def say(capsys):
    """Print a line past pytest's capture."""

    def line(text):
        with capsys.disabled():
            print(f"\n  {text}", flush=True)

    return line


def timed(function):
    """Return the seconds that a call takes, and its result."""
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def best_seconds(rounds, **functions):
    """Run the functions in turn, round after round, and return the best seconds of each."""
    best = dict.fromkeys(functions, math.inf)
    for _ in range(rounds):
        for name, function in functions.items():
            best[name] = min(best[name], timed(function)[0])
    return best


# Ours: one forward and one backward pass for each batch


def all_rows(maps, players):
    """Every attention and gradient row of one batch, (rows, batch, tokens)."""
    matrices = {weighting: pairwise_matrix(maps, weighting) for weighting in WEIGHTINGS}
    rows = [attention_shapley(matrices[weighting], players, game) for weighting, game in SHAPLEY_ROWS]
    rows += [
        baselines.attention_row_sum(maps),
        baselines.attention_received(maps),
        baselines.attention_rollout(maps),
    ]
    return torch.stack([*rows, baselines.grad_sam(maps)]) * players


def batches(texts, model, tokenizer):
    for start in range(0, len(texts), BATCH):
        inputs = encode(texts[start : start + BATCH], tokenizer, model)
        yield inputs, token_players(inputs, tokenizer)


def our_attributions(texts, model, tokenizer):
    return [
        (inputs, players, all_rows(read_attention(model, inputs, gradients=True), players))
        for inputs, players in batches(texts, model, tokenizer)
    ]


def our_scores(texts, model, tokenizer):
    """Comprehensiveness and sufficiency, (2, rows, sentences)."""
    scores = [
        erasure_scores(model, inputs, rows, players, tokenizer.mask_token_id)
        for inputs, players, rows in our_attributions(texts, model, tokenizer)
    ]
    return torch.cat([torch.stack([score.comprehensiveness, score.sufficiency]) for score in scores], -1)


# Sentence by sentence


def plain_worth(m, members):
    """v(S) of max_mutual."""
    if len(members) == 1:
        return m[members[0], members[0]]
    return sum(max(m[i, j], m[j, i]) for i, j in itertools.combinations(members, 2))


def plain_game(m, players, game):
    """The paper's own routes: sums for cls and mutual, all 2**n coalitions for max_mutual."""
    n, values = len(players), torch.zeros(len(m))
    for i in players:
        others = [j for j in players if j != i]
        if game == "cls":
            values[i] = m[0, i]
        elif game == "mutual":
            pairs = sum(m[i, j] + m[j, i] for j in others) / 2
            values[i] = m[i, i] / n - sum(m[j, j] for j in others) / (n * (n - 1)) + pairs
        else:
            for size in range(n):
                weight = math.factorial(size) * math.factorial(n - size - 1) / math.factorial(n)
                for before in itertools.combinations(others, size):
                    values[i] += weight * (plain_worth(m, (*before, i)) - plain_worth(m, before))
    return values.tolist()


def plain_row(row, text, model, tokenizer):
    """One row of one sentence: its token ids, players and attribution."""
    inputs = tokenizer(text, return_tensors="pt")
    n_tokens = inputs["input_ids"].shape[1]
    players = list(range(1, n_tokens - 1))
    needs_gradient = row.startswith("gradient") or row == "Grad-SAM"
    with torch.set_grad_enabled(needs_gradient):
        output = model(**inputs, output_attentions=True)
        if needs_gradient:
            model.zero_grad()
            for layer in output.attentions:
                layer.retain_grad()
            output.logits[0].max().backward()
    attention = [layer[0].detach() for layer in output.attentions]
    if needs_gradient:
        slopes = [layer.grad[0].clamp(min=0) for layer in output.attentions]
        attention = [weights * slope for weights, slope in zip(attention, slopes, strict=True)]
    matrix = sum(layer.mean(0) for layer in attention) / len(attention)
    if row == "row sum":
        values = matrix.sum(1).tolist()
    elif row == "received":
        values = matrix.mean(0).tolist()
    elif row == "Grad-SAM":
        values = matrix.mean(1).tolist()
    elif row == "rollout":
        flow = torch.eye(n_tokens)
        for layer in attention:
            flow = (layer.mean(0) + torch.eye(n_tokens)) / 2 @ flow
        values = flow[0].tolist()
    else:
        values = plain_game(matrix, players, row.split()[1])
    return inputs["input_ids"][0].tolist(), players, values


@torch.no_grad()
def plain_probabilities(ids, model):
    return model(torch.tensor([ids])).logits[0].softmax(-1)


def plain_scores(ids, players, values, model, mask):
    whole = plain_probabilities(ids, model)
    target, comp, suff = whole.argmax().item(), 0.0, 0.0
    ranked = sorted(players, key=lambda i: -values[i])
    for k in KS:
        top = ranked[: math.ceil(k * len(players) / 100)]
        without = [mask if i in top else token for i, token in enumerate(ids)]
        alone = [mask if i in players and i not in top else token for i, token in enumerate(ids)]
        comp += (whole[target] - plain_probabilities(without, model)[target]).item() / (len(KS) + 1)
        suff += (whole[target] - plain_probabilities(alone, model)[target]).item() / (len(KS) + 1)
    return comp, suff


@pytest.fixture(scope="module")
def sides(classifier, texts):
    """Both sides in turn, row after row: plain seconds of attributions and of erasure, best of ours, plain
    scores.
    """
    model, tokenizer = classifier
    attributions, erasure, scores, best = 0.0, 0.0, [], dict.fromkeys(("attributions", "scores"), math.inf)
    for row in ROWS:
        with unfrozen(model):
            runs = [
                timed(lambda row=row: [plain_row(row, text, *classifier) for text in texts]) for _ in range(2)
            ]
        attributions += min(seconds for seconds, _ in runs)
        found = runs[0][1]
        seconds, scored = timed(
            lambda found=found: [plain_scores(*one, model, tokenizer.mask_token_id) for one in found]
        )
        erasure += seconds
        scores.append(scored)
        ours = best_seconds(
            2,
            attributions=lambda: our_attributions(texts, *classifier),
            scores=lambda: our_scores(texts, *classifier),
        )
        best = {name: min(best[name], seconds) for name, seconds in ours.items()}
    return attributions, erasure, best, torch.tensor(scores).permute(2, 0, 1)


@contextmanager
def unfrozen(model):
    """Let the weights take gradients, as transformers loads them."""
    model.requires_grad_(True)
    try:
        yield
    finally:
        model.zero_grad(set_to_none=True)
        model.requires_grad_(False)


# The lines


def bare_passes(model, ready):
    """One forward and one backward pass that stops at the attention weights, nothing kept."""
    for inputs, _ in ready:
        output = model(inputs["input_ids"], inputs["attention_mask"], output_attentions=True)
        torch.autograd.grad(output.logits.max(-1).values.sum(), output.attentions)


def test_all_rows_cost_at_most_15_percent_more_than_the_bare_passes(benchmark, classifier, texts, say):
    model, tokenizer = classifier
    ready = list(batches(texts, model, tokenizer))

    def bare():
        with start_at_embeddings(model):
            bare_passes(model, ready)

    def ours():
        for inputs, players in ready:
            all_rows(read_attention(model, inputs, gradients=True), players)

    best_seconds(2, bare=bare, ours=ours)
    best = best_seconds(15, bare=bare, ours=ours)
    benchmark.pedantic(ours, rounds=3)
    overhead = best["ours"] / best["bare"] - 1
    benchmark.extra_info["overhead"] = overhead
    say(
        f"overhead of {len(ROWS)} rows over the bare forward and backward of {N_SENTENCES} sentences:"
        f" {100 * overhead:+.1f} % ({1000 * best['ours']:.0f} ms against {1000 * best['bare']:.0f} ms)"
    )
    assert overhead <= 0.15


def test_relevance_and_the_best_game_cost_at_most_a_few_bare_passes(classifier, texts, say):
    model, tokenizer = classifier
    ready = list(batches(texts, model, tokenizer))

    def bare():
        with start_at_embeddings(model):
            bare_passes(model, ready)

    methods = {
        "AttnLRP": lambda inputs, players: gradient_times_input(model, inputs, rules="attnlrp"),
        "the best game": lambda inputs, players: best_attention_game(model, inputs, players),
    }
    timed_methods = {
        name: lambda method=method: [method(*part) for part in ready] for name, method in methods.items()
    }
    best_seconds(2, bare=bare, **timed_methods)
    best = best_seconds(8, bare=bare, **timed_methods)
    for name in methods:
        say(
            f"{name}: {best[name] / best['bare']:.2f} times the bare forward and backward of "
            f"{N_SENTENCES} sentences"
        )
        assert best[name] / best["bare"] <= 3


def test_attributions_are_at_least_100_times_faster_than_sentence_by_sentence(
    benchmark, classifier, texts, sides, say
):
    seconds, _, best, _ = sides
    benchmark.pedantic(our_attributions, (texts, *classifier), rounds=3)
    ratio = seconds / best["attributions"]
    benchmark.extra_info["ratio"] = ratio
    say(
        f"attributions of {len(ROWS)} rows: {seconds:.1f} s sentence by sentence, "
        f"{best['attributions']:.3f} s ours:"
        f" {ratio:.0f} times"
    )
    assert ratio >= 100


def test_attributions_with_scores_are_at_least_12_times_faster_and_the_same(
    benchmark, classifier, texts, sides, say
):
    seconds, erasure, best, expected = sides
    scores = benchmark.pedantic(our_scores, (texts, *classifier), rounds=1)
    ratio = (seconds + erasure) / best["scores"]
    benchmark.extra_info["ratio"] = ratio
    clear = torch.cat([without_ties(*found) for found in our_attributions(texts, *classifier)], -1)
    difference = (scores - expected).abs().amax(0)[clear]
    say(
        f"attributions and erasure scores of {len(ROWS)} rows: {seconds + erasure:.1f} s sentence by "
        f"sentence,"
        f" {best['scores']:.2f} s ours: {ratio:.0f} times; the {clear.sum()} of {clear.numel()} scores "
        f"without ties"
        f" differ by {difference.max():.0e} at most"
    )
    assert clear[ROWS.index("row sum")].sum() == 0 and clear.float().mean() > 0.85
    assert difference.max() < 1e-5
    assert ratio >= 12


def without_ties(inputs, players, rows):
    """Return bool (rows, batch): the rationale has its full size at every k, so no tie was left out."""
    n = players.sum(-1)
    return torch.stack([rationale(rows, players, k).sum(-1) == -(-k * n // 100) for k in KS]).all(0)


@pytest.mark.parametrize("game", GAMES)
def test_closed_form_of_512_tokens_and_batch_32_takes_at_most_a_tenth_of_a_second(benchmark, game, say):
    matrix = torch.randn(32, 512, 512, generator=torch.Generator().manual_seed(0)).softmax(-1)
    players = torch.ones(32, 512, dtype=torch.bool)
    players[:, [0, -1]] = False
    benchmark.pedantic(attention_shapley, (matrix, players, game), rounds=10, warmup_rounds=2)
    say(f"closed form of {game}, 32 inputs of 512 tokens: {1000 * benchmark.stats.stats.min:.1f} ms")
    assert benchmark.stats.stats.min <= 0.1


def test_erasure_scoring_in_inputs_per_second(benchmark, classifier, texts, say):
    model, tokenizer = classifier
    inputs = encode(texts, tokenizer, model)
    players = token_players(inputs, tokenizer)
    rows, tokens = players.nonzero(as_tuple=True)
    keep = torch.ones(len(rows), players.shape[1], dtype=torch.bool)
    keep[torch.arange(len(rows)), tokens] = False
    together = lambda: erased_probabilities(model, inputs, rows, keep, tokenizer.mask_token_id)

    def one_by_one():
        for row, kept in list(zip(rows, keep, strict=True))[:64]:
            ids = inputs["input_ids"][row].where(kept, tokenizer.mask_token_id)
            plain_probabilities(ids[inputs["attention_mask"][row].bool()].tolist(), model)

    best = best_seconds(5, together=together, one_by_one=one_by_one)
    with measure_cost(model) as cost:
        benchmark.pedantic(together, rounds=1)
    assert cost.forwards == len(rows)
    ours, single = len(rows) / best["together"], 64 / best["one_by_one"]
    say(f"erasure scoring: {ours:.0f} masked inputs a second, one by one {single:.0f}")
    assert ours > 2 * single
