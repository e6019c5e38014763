"""A label means the class that the model names so, however it is written; what a model does not know is
refused.
"""

import numpy as np
import pytest
import torch
from conftest import SENTENCES
from datasets import ClassLabel, Dataset, Features, Value

from helpers.attention import read_attention
from helpers.data import load_sentences
from helpers.labels import align_labels, class_numbers, find_class, resolve_target
from helpers.text import encode


def named(model, *labels):
    """Give the model these class names, in this order."""
    model.config.id2label = dict(enumerate(labels))
    model.config.label2id = {label: number for number, label in enumerate(labels)}
    return model


def rows_of(labels, names=None):
    kind = Value("string") if names is None else ClassLabel(names=names)
    columns = {"text": [f"text {place}" for place in range(len(labels))], "label": labels}
    return Dataset.from_dict(columns, Features(text=Value("string"), label=kind))


@pytest.mark.parametrize(
    ("label", "number"),
    [
        ("favourable", 1),
        ("Favourable", 1),
        ("LABEL_0", 0),
        ("1", 1),
        ("not_sure", 2),
        ("NOT-SURE", 2),
        ("unsure", 2),
    ],
)
def test_labels_fit_in_any_spelling(model, label, number):
    assert find_class(named(model, "unfavourable", "favourable", "not sure, unsure"), label) == number


@pytest.mark.parametrize(
    ("label", "number"), [("POS", 0), ("neg", 1), ("Positive", 0), ("neutral", 2), ("NEU", 2)]
)
def test_short_forms_of_sentiments_fit(model, label, number):
    assert find_class(named(model, "positive", "NEGATIVE", "neu"), label) == number


def test_names_that_are_numbers_come_before_numbers(model):
    model = named(model, "2", "1", "0")
    assert class_numbers(model, ["0", "1", "2", "3"]) == {"0": 2, "1": 1, "2": 0}


def test_label_as_it_is_written_comes_before_other_spellings(model):
    assert class_numbers(named(model, "us", "US"), ["US", "us", "Us"]) == {"US": 1, "us": 0}


def test_label_that_fits_several_classes_is_none_of_them(model):
    model = named(model, "crane, bird", "crane, machine", "dog")
    assert class_numbers(model, ["crane", "bird"]) == {"bird": 0}
    with pytest.raises(
        ValueError, match="'crane' is several of .* did you mean 'crane, bird' or 'crane, machine'"
    ):
        find_class(model, "crane")


def test_unknown_label_is_named_with_the_nearest(model, tokenizer):
    with pytest.raises(
        ValueError, match="'happy' is none of this model's 3 labels; .*'positive' or 'negative' or 'neutral'"
    ):
        read_attention(model, encode(SENTENCES, tokenizer, model), target="happy")
    with pytest.raises(ValueError, match="did you mean 'neutral'"):
        find_class(model, "neutrall")
    with pytest.raises(ValueError, match="^text_target: label 'happy' is none of"):
        find_class(model, "happy", "text_target")


# Data sets


def test_names_are_matched_and_not_numbered_by_the_alphabet(model):
    model = named(model, "unfavourable", "favourable")
    rows = rows_of(["favourable", "unfavourable", "FAVOURABLE"])
    assert align_labels(model, rows, "mine")["label"][:] == [1, 0, 1]


def test_a_split_of_one_class_keeps_its_class(model):
    assert (
        align_labels(named(model, "negative", "positive"), rows_of(["positive"] * 3), "mine")["label"][:]
        == [1] * 3
    )


def test_class_labels_in_another_order_are_the_models(model):
    rows = rows_of([0, 1, 1], ["positive", "negative"])
    aligned = align_labels(named(model, "negative", "positive"), rows, "mine")
    assert aligned["label"][:] == [1, 0, 0] and aligned.column_names == rows.column_names
    assert aligned["text"][:] == rows["text"][:]


@pytest.mark.parametrize(
    ("labels", "names"), [(["LABEL_0", "LABEL_1"], ["world", "sports"]), (["world", "sports"], ["0", "1"])]
)
def test_numbers_stay_where_one_side_has_no_names(model, labels, names):
    assert align_labels(named(model, *labels), rows_of([1, 0, 1], names), "mine")["label"][:] == [1, 0, 1]


def test_names_in_a_column_of_strings_fit_a_model_without_names_as_numbers_only(model):
    model = named(model, "LABEL_0", "LABEL_1")
    assert align_labels(model, rows_of(["LABEL_1", "0"]), "mine")["label"][:] == [1, 0]
    with pytest.raises(
        ValueError, match="set 'mine' has labels bad, good, but the model knows LABEL_0, LABEL_1, so"
    ):
        align_labels(model, rows_of(["good", "bad"]), "mine")


def test_names_that_the_model_lacks_are_shown_with_both_lists_and_the_way_out(model):
    with pytest.raises(ValueError) as caught:
        align_labels(named(model, "negative", "positive"), rows_of(["positive", "mixed"]), "mine")
    message = str(caught.value)
    assert (
        "set 'mine' has labels mixed, positive, but the model knows negative, positive, so mixed cannot"
        in message
    )
    assert "the column `label`" in message and "config.json" in message


@pytest.mark.parametrize("label", [-1, 3])
def test_numbers_outside_the_model_name_set_and_classes(model, label):
    rows = load_sentences("movies", n_samples=2)
    wrong = rows.remove_columns("label").add_column("label", [0, label])
    with pytest.raises(
        ValueError, match=rf"set 'movies' has labels \[{label}\].* positive, negative, neutral"
    ):
        align_labels(model, wrong, "movies")


def test_default_sets_come_out_in_the_order_of_the_model(model):
    rows = load_sentences("movies", n_samples=40)
    aligned = align_labels(model, rows, "movies")  # this model: positive, negative, neutral
    assert {(old, new) for old, new in zip(rows["label"], aligned["label"], strict=True)} == {(0, 1), (1, 0)}
    assert np.array_equal(np.array(aligned["rating"]) > 0, np.array(aligned["label"]) == 0)


# Targets


@pytest.mark.parametrize("target", [-1, 3, torch.tensor([0, 1, 3])])
def test_class_outside_the_model_is_refused(model, target):
    with pytest.raises(ValueError, match="outside this model's 3 classes"):
        resolve_target(model, torch.zeros(3, 3), target)


@pytest.mark.parametrize("target", [1.0, torch.tensor([0.0, 1.0, 2.0]), torch.tensor([True, False, True])])
def test_target_that_is_no_whole_number_is_refused(model, target):
    with pytest.raises(ValueError, match="target is a class number or label, not (float32|bool)"):
        resolve_target(model, torch.zeros(3, 3), target)


def test_number_of_targets_fits_the_batch(model):
    with pytest.raises(ValueError, match="2 targets were given for 3 inputs"):
        resolve_target(model, torch.zeros(3, 3), torch.tensor([0, 1]))
    assert resolve_target(model, torch.zeros(3, 3), "LABEL_2").tolist() == [2, 2, 2]
