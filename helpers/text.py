"""Texts in, tokens out: encode, name the tokens that play, and bring tokens together to words."""

import warnings
from collections.abc import Sequence

import torch

from helpers.models import check_cls_first


def encode(texts: Sequence[str], tokenizer, model, name: str = ""):
    """Tokenise `texts` for `model`: a padded BatchEncoding of tensors (texts, tokens) on the model's device.

    A text longer than the model allows is cut, with a warning that says how many of its tokens are explained,
    how it begins, and the `name` of its set where one is given.
    Padding goes to the right, whatever the tokenizer's own side: the games read [CLS] at the first position.
    Raises ValueError for a bare string, an empty batch, a text with nothing to explain (its position is
    named), or a tokenizer that puts no classification token first.
    """
    texts = check_texts(texts)
    check_cls_first(tokenizer)
    limit = min(tokenizer.model_max_length, max_tokens(model))
    lengths = [len(ids) for ids in tokenizer(texts, verbose=False)["input_ids"]]
    for position, length in enumerate(lengths):
        if length > limit:
            of_set = f" of {name}" if name else ""
            begins = " ".join(texts[position].split())[:30]
            warnings.warn(
                f"text {position}{of_set}: explained {limit} of {length} tokens, the most this model reads "
                f"({begins!r} …)",
                stacklevel=2,
            )
    inputs = tokenizer(
        texts, padding=True, truncation=True, max_length=limit, padding_side="right", return_tensors="pt"
    )
    for position, n_players in enumerate(token_players(inputs, tokenizer).sum(-1).tolist()):
        if n_players == 0:
            raise ValueError(f"text {position} ({texts[position]!r}) has no token to explain; leave it out")
    return inputs.to(model.device)


def check_texts(texts: Sequence[str], name: str = "texts") -> list[str]:
    """Return `texts` as a list. Raises ValueError, with its `name`, unless it holds one or more of them."""
    if isinstance(texts, str):
        raise ValueError(f"{name} is one string, {texts[:40]!r}; give a list of texts")
    if not (texts := list(texts)):
        raise ValueError(f"{name} is empty, so there is no text to explain; give one or more")
    for position, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"text {position} of {name} is {text!r}; a text must be a string")
        if not text.strip():
            raise ValueError(f"text {position} of {name} ({text!r}) has no token to explain; leave it out")
    return texts


def max_tokens(model) -> int:
    """Return how many tokens a text model has positions for (RoBERTa keeps two for padding)."""
    config = model.config
    reserved = config.pad_token_id + 1 if config.model_type in ("roberta", "xlm-roberta", "camembert") else 0
    return config.max_position_embeddings - reserved


def token_players(inputs, tokenizer) -> torch.Tensor:
    """Return bool (batch, tokens): False for special tokens and padding. [UNK] and [MASK] play."""
    special = {tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}
    frame = torch.tensor(sorted(special - {None}), device=inputs["input_ids"].device)
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
