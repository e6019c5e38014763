"""One resolver of labels: which class of a model a label, a target or a data set's label means."""

import re
from collections.abc import Iterable
from difflib import get_close_matches

import torch
from datasets import ClassLabel

SHORT_FORMS = {"pos": "positive", "neg": "negative", "neu": "neutral"}


def find_class(model, label: str, parameter: str = "") -> int:
    """Return the number of the class with this label; see `class_numbers` for what fits.

    parameter  that gives the label, for the error

    Raises ValueError for a label that fits none or several, and names the nearest.
    """
    found = _matches(model, label)
    if len(found) == 1:
        return found.pop()
    labels = {int(number): str(name) for number, name in model.config.id2label.items()}
    synonyms = {plain: name for name in labels.values() for plain in _forms(name)}
    near = [synonyms[form] for form in get_close_matches(_plain(label), synonyms, n=5)]
    near = [labels[number] for number in sorted(found)] or list(dict.fromkeys(near)) or list(labels.values())
    raise ValueError(
        f"{parameter}{': ' if parameter else ''}label {label!r} is {'several' if found else 'none'} "
        f"of this model's {len(labels)} labels; "
        f"did you mean {' or '.join(map(repr, near[:5]))}?"
    )


def class_numbers(model, labels: Iterable[str]) -> dict[str, int]:
    """Return {label: class number} for those of `labels` that mean just one class of the model.

    A label fits as it is written in the model's id2label, or else in any case and with blanks for underscores
    and hyphens, as one of the synonyms between commas, as pos, neg or neu, or as a number: LABEL_1, or 1.
    """
    found = {label: _matches(model, label) for label in labels}
    return {label: numbers.pop() for label, numbers in found.items() if len(numbers) == 1}


def align_labels(model, rows, name: str):
    """Return a data set whose label column holds the model's own class numbers.

    rows  Dataset with a column `label`: class numbers, a ClassLabel, or strings
    name  of the set, for the error

    Labels with names are matched by name. Those of a ClassLabel keep their numbers where either side has no
    names but numbers (LABEL_0, LABEL_1 ...). Raises ValueError, with both lists, for labels that the model
    does not have.
    """
    feature, known = rows.features["label"], [str(label) for label in model.config.id2label.values()]
    named = isinstance(feature, ClassLabel) and not all(map(_is_number, feature.names))
    if "string" in feature.dtype or (named and not all(map(_is_number, known))):
        names = feature.names if isinstance(feature, ClassLabel) else sorted(set(rows["label"]))
        numbers = class_numbers(model, names)
        if missing := [label for label in names if label not in numbers]:
            raise ValueError(
                f"set {name!r} has labels {', '.join(names)}, but the model knows {', '.join(known)}, so "
                f"{', '.join(missing)} cannot be matched: rename them in the column `label`, name the "
                f"classes in "
                "id2label of the model's config.json, or choose a model that was trained for this set"
            )
        codes = rows["label"] if "string" in feature.dtype else feature.int2str(list(rows["label"]))
        labels = [numbers[code] for code in codes]
    else:
        labels = list(rows["label"])
    if outside := sorted({label for label in labels if not 0 <= label < len(known)}):
        names = f" ({', '.join(feature.names)})" if isinstance(feature, ClassLabel) else ""
        raise ValueError(
            f"set {name!r} has labels {outside}{names}, but the model knows {len(known)}: "
            f"{', '.join(known)}; "
            "choose a model that was trained for this set"
        )
    place = rows.column_names.index("label")
    order = [*rows.column_names[:place], "label", *rows.column_names[place + 1 :]]
    return rows.remove_columns("label").add_column("label", labels).select_columns(order)


def resolve_target(model, logits: torch.Tensor, target=None) -> torch.Tensor:
    """Return the explained class of each row of logits (batch, classes) as (batch,) integers.

    target  None for the predicted class, a label, a class number, or a (batch,) tensor of them

    Raises ValueError for an unknown label, numbers outside the model's classes, or anything but whole
    numbers.
    """
    batch, n_classes = logits.shape
    if target is None:
        return logits.argmax(-1)
    target = torch.as_tensor(find_class(model, target) if isinstance(target, str) else target)
    if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
        raise ValueError(f"target is a class number or label, not {str(target.dtype).removeprefix('torch.')}")
    if target.numel() not in (1, batch):
        raise ValueError(f"{target.numel()} targets were given for {batch} inputs; give one, or one for each")
    target = target.to(logits.device).long().reshape(-1).expand(batch)
    if ((target < 0) | (target >= n_classes)).any():
        raise ValueError(f"target {target.tolist()} lies outside this model's {n_classes} classes")
    return target


def _plain(label) -> str:
    words = " ".join(re.sub(r"[_-]", " ", str(label)).casefold().split())
    return SHORT_FORMS.get(words, words)


def _forms(name: str) -> set[str]:
    return {_plain(part) for part in (name, *name.split(","))}


def _is_number(label) -> bool:
    return re.fullmatch(r"(label )?\d+", _plain(label)) is not None


def _matches(model, label) -> set[int]:
    """Return the numbers of all classes that a label fits, by the first of the three ways that finds one."""
    labels = {int(number): str(name) for number, name in model.config.id2label.items()}
    exact = {number for number, name in labels.items() if name == str(label)}
    alike = exact or {number for number, name in labels.items() if _plain(label) in _forms(name)}
    if alike or not _is_number(label):
        return alike
    return {int(_plain(label).removeprefix("label "))} & set(labels)
