"""What reading attention takes at BERT-base's shapes and 512 tokens: memory by what is asked for, and half
precision.

    python -m pytest tests/benchmark_memory.py

Bytes are of tensors alive at once, as PyTorch's profiler counts them, weights left out.
"""

import time

import pytest
import torch
from benchmark_vit import memory
from transformers import BertConfig, BertForSequenceClassification

from helpers.attention import read_attention
from helpers.models import set_precision
from helpers.shapley import WEIGHTINGS, pairwise_matrix

BATCH, TOKENS = 4, 512


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = BertForSequenceClassification._from_config(BertConfig(), attn_implementation="eager")
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def inputs():
    ids = torch.randint(1000, 30000, (BATCH, TOKENS), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def read(model, inputs, **options):
    """Read attention and average it into the matrices that the games are played on."""
    maps = read_attention(model, inputs, **options)
    return [
        pairwise_matrix(maps, kind) for kind in WEIGHTINGS if kind == "attention" or options.get("gradients")
    ]


def test_averaged_heads_take_a_fraction_of_the_memory(model, inputs, capsys):
    asked = {
        "averaged heads": {"mean_heads": True},
        "attention": {},
        "attention and gradients": {"gradients": True},
    }
    peaks = {
        name: memory(lambda options=options: read(model, inputs, **options))[0] / 2**20
        for name, options in asked.items()
    }
    with capsys.disabled():
        print(
            f"\n{BATCH} × {TOKENS} tokens, peak of tensors: "
            + ", ".join(f"{name} {mib:.0f} MiB" for name, mib in peaks.items())
        )
    assert peaks["averaged heads"] < peaks["attention"] / 3 < peaks["attention and gradients"] / 4


def test_half_precision_time_and_memory(model, inputs, capsys):
    seconds, peaks = {}, {}
    for precision in ("float32", "bfloat16"):
        set_precision(model, precision)
        run = lambda: read(model, inputs, gradients=True)
        run()
        start = time.perf_counter()
        run()
        seconds[precision] = time.perf_counter() - start
        peaks[precision] = memory(run)[0] / 2**20
    set_precision(model, "float32")
    with capsys.disabled():
        print(f"\nforward and backward: seconds {seconds}, peak MiB {peaks}")
    assert peaks["bfloat16"] < 1.1 * peaks["float32"]
