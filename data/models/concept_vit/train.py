"""Train the concept-world image classifier from scratch on scenes drawn on the fly, measure it, save it here.

python data/models/concept_vit/train.py              the committed model, about 20 minutes on one core
python data/models/concept_vit/train.py --epochs 1   a quick trial

--seed 1 --folder data/models/concept_vit_1 trains it anew from other draws; seeds 1 and 2 are committed,
their weights rounded to half precision.
"""

import json
import time
from pathlib import Path

import click
import numpy as np
import torch
from tqdm import tqdm
from transformers import (
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
    get_cosine_schedule_with_warmup,
)

from helpers.concept_world import CLASSES, SIZE, draw_counterfactual_pairs, draw_scenes

TRAINING_SEED = 1_000_000  # scenes drawn with a smaller seed are held out


def to_pixels(images):
    """Pixel values (batch, 3, 64, 64) in [-1, 1] of images (batch, 64, 64, 3) uint8: what the saved processor
    does.
    """
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1


def new_model(seed):
    """A ViT of about 1 M parameters: 64 patches of 8 x 8 pixels, 6 layers of width 128, 4 heads."""
    torch.manual_seed(seed)
    config = ViTConfig(
        image_size=SIZE,
        patch_size=8,
        num_hidden_layers=6,
        num_attention_heads=4,
        hidden_size=128,
        intermediate_size=384,
        id2label=dict(enumerate(CLASSES)),
        label2id={name: index for index, name in enumerate(CLASSES)},
        attn_implementation="eager",  # on a CPU, for 65 tokens, it trains twice as fast as the fused one
    )
    return ViTForImageClassification(config)


def train(model, epochs, images_per_epoch, batch_size, learning_rate, seed):
    """Minimise cross-entropy with AdamW; every epoch draws new scenes.

    Half of the horses and dogs wear a foreign texture: otherwise any texture would do for the model, and no
    explanation that tells stripes from dots could be called right or wrong.
    """
    steps = images_per_epoch // batch_size
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.05)
    schedule = get_cosine_schedule_with_warmup(optimizer, steps * epochs // 20, steps * epochs)
    shuffle = np.random.default_rng(seed)
    model.train()
    for epoch in range(epochs):
        scenes = draw_scenes(images_per_epoch, seed=TRAINING_SEED + 1_000 * seed + epoch, decoys=0.5)
        order, losses = shuffle.permutation(images_per_epoch), []
        progress = tqdm(range(steps), desc=f"epoch {epoch + 1} of {epochs}")
        for step in progress:
            rows = order[step * batch_size : (step + 1) * batch_size]
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(pixel_values=to_pixels(scenes.images[rows])).logits
            loss = torch.nn.functional.cross_entropy(logits.float(), torch.from_numpy(scenes.labels[rows]))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            progress.set_postfix(loss=f"{np.mean(losses[-50:]):.3f}")


@torch.inference_mode()
def is_right(model, scenes, batch_size=256):
    """Whether the model names each scene rightly: bool (n,)."""
    model.eval()
    batches = np.array_split(scenes.images, -(-len(scenes.images) // batch_size))
    predictions = [model(pixel_values=to_pixels(batch)).logits.argmax(-1) for batch in batches]
    return torch.cat(predictions).numpy() == scenes.labels


def measure(model, n_scenes, n_pairs):
    """Accuracy on held-out scenes and decoys, and the share of counterfactual pairs with both members named
    rightly.
    """
    scenes = draw_scenes(n_scenes, seed=0)
    right = is_right(model, scenes)
    pairs = draw_counterfactual_pairs(n_pairs, seed=1)
    flipped = is_right(model, pairs[0]) & is_right(model, pairs[1])
    decoys = draw_scenes(n_pairs, seed=2, labels=np.arange(n_pairs) % 2 * 2 + 1, decoys=1)
    return {
        "accuracy": round(float(right.mean()), 4),
        "accuracy_per_class": {
            name: round(float(right[scenes.labels == label].mean()), 4) for label, name in enumerate(CLASSES)
        },
        "n_scenes": n_scenes,
        "pairs_flipped": round(float(flipped.mean()), 4),
        "pairs_flipped_per_pair": {
            f"{CLASSES[label]} / {CLASSES[label + 1]}": round(
                float(flipped[pairs[0].labels == label].mean()), 4
            )
            for label in range(0, len(CLASSES), 2)
        },
        "n_pairs": n_pairs,
        "accuracy_on_decoys": round(float(is_right(model, decoys).mean()), 4),
    }


@click.command()
@click.option("--epochs", default=20, show_default=True)
@click.option("--images-per-epoch", default=19_200, show_default=True)
@click.option("--batch-size", default=64, show_default=True)
@click.option("--learning-rate", default=1e-3, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--threads", default=1, show_default=True)
@click.option(
    "--n-scenes", default=6_000, show_default=True, help="held-out scenes that the accuracy is measured on"
)
@click.option("--n-pairs", default=3_000, show_default=True, help="counterfactual pairs")
@click.option(
    "--folder",
    type=Path,
    default=Path(__file__).parent,
    help="where the model goes  [default: beside this file]",
)
def main(epochs, images_per_epoch, batch_size, learning_rate, seed, threads, n_scenes, n_pairs, folder):
    """Train, measure and save."""
    torch.set_num_threads(threads)
    start = time.perf_counter()
    model = new_model(seed)
    train(model, epochs, images_per_epoch, batch_size, learning_rate, seed)
    seconds = time.perf_counter() - start
    report = measure(model, n_scenes, n_pairs) | {
        "epochs": epochs,
        "images_per_epoch": images_per_epoch,
        "seed": seed,
        "training_seconds": round(seconds),
        "threads": threads,
        "n_parameters": model.num_parameters(),
    }
    model.save_pretrained(folder)
    size = {"height": SIZE, "width": SIZE}
    ViTImageProcessorPil(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(folder)
    (folder / "accuracy.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
