"""What the six games cost on a ViT-Base of random weights, beside one bare forward and backward pass; run by
name.
"""

import time

import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification

from helpers.attention import read_attention
from helpers.images import patch_players
from helpers.shapley import GAMES, WEIGHTINGS, attention_shapley, pairwise_matrix

BATCH, LAYERS, HEADS, TOKENS = 8, 12, 12, 197
STACK = BATCH * LAYERS * HEADS * TOKENS**2 * 4  # bytes of all attention maps of a batch
ROUNDS = 3


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = ViTForImageClassification._from_config(ViTConfig(), attn_implementation="eager")
    config = model.config
    assert (config.num_hidden_layers, config.num_attention_heads) == (LAYERS, HEADS)
    assert (config.image_size // config.patch_size) ** 2 + 1 == TOKENS
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def inputs():
    return {"pixel_values": torch.randn(BATCH, 3, 224, 224, generator=torch.Generator().manual_seed(0))}


def bare(model, inputs):
    """One forward pass and the backward pass of the predicted logits down to the embeddings, nothing kept."""
    embedded = model.vit.embeddings(inputs["pixel_values"]).requires_grad_()
    hook = model.vit.embeddings.register_forward_hook(lambda module, args, output: embedded)
    try:
        logits = model(**inputs).logits
    finally:
        hook.remove()
    torch.autograd.grad(logits.amax(-1).sum(), embedded)


def explained(model, inputs):
    """The same pass with attention and its gradients read, and the six games solved."""
    maps = read_attention(model, inputs, gradients=True)
    matrices = [pairwise_matrix(maps, weighting) for weighting in WEIGHTINGS]
    players = patch_players(model, inputs)
    return maps, [attention_shapley(matrix, players, game) for matrix in matrices for game in GAMES]


def seconds(run, *args):
    """CPU time, which other programs on a busy machine do not lengthen as they do wall-clock time."""
    start = time.process_time()
    run(*args)
    return time.process_time() - start


def memory(run, *args):
    """Return (peak, kept): the most bytes of tensors alive at once in a run, and those that its result still
    holds.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profile:
        result = run(*args)
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    alive, peak = 0, 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    del result
    return peak, alive


def test_six_games_add_at_most_15_percent_to_forward_and_backward(model, inputs, capsys):
    bare(model, inputs), explained(model, inputs)  # warm up
    rounds = [(seconds(bare, model, inputs), seconds(explained, model, inputs)) for _ in range(ROUNDS)]
    floor, ours = (min(column) for column in zip(*rounds, strict=True))
    with capsys.disabled():
        print(
            f"\nViT-Base, batch {BATCH}: forward and backward {floor:.2f} s of CPU time, with the six games "
            f"{ours:.2f} s: "
            f"{100 * (ours / floor - 1):.1f} % more (best of {ROUNDS} rounds in turn)"
        )
    assert ours <= 1.15 * floor


def test_attention_maps_are_kept_once(model, inputs, capsys):
    bare_peak, _ = memory(bare, model, inputs)
    peak, kept = memory(explained, model, inputs)
    with capsys.disabled():
        print(
            f"\nall maps of a batch {STACK / 2**20:.0f} MiB; peak of tensors {bare_peak / 2**20:.0f} MiB "
            f"bare, "
            f"{peak / 2**20:.0f} MiB with six games; kept {kept / STACK:.2f} × the maps (attention and "
            f"gradients)"
        )
    assert kept < 2.05 * STACK
    assert peak < bare_peak + 1.5 * STACK  # the gradients, and the maps' stack while it is being filled
