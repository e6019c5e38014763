"""Single cells of the notebooks, on input that the committed runs do not have."""

import json

import numpy as np
import pandas as pd
import pytest
from conftest import build_text_classifier

from workflow.parameters import NOTEBOOKS


def cell_with(name, text):
    """Return the source of the code cell of a notebook that holds this text."""
    cells = json.loads((NOTEBOOKS / f"{name}.ipynb").read_text(encoding="utf8"))["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    [source] = [source for source in sources if text in source]
    return source


def run_opening(name, **parameters):
    """Run imports, parameters and checks of a notebook, with other parameters; return its names."""
    cells = json.loads((NOTEBOOKS / f"{name}.ipynb").read_text(encoding="utf8"))["cells"]
    imports, defaults, checks = [c for c in cells if c["cell_type"] == "code"][:3]
    names = {}
    exec("".join(imports["source"]), names)
    exec("".join(defaults["source"]), names)
    names |= parameters
    exec("".join(checks["source"]), names)
    return names


@pytest.fixture
def own(tmp_path, tokenizer):
    """A folder with a model of three classes; own(rows) writes a test set beside it."""
    model = build_text_classifier("bert", len(tokenizer))
    model.config.id2label = {0: "food", 1: "music", 2: "sport"}
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")

    def write(labels):
        (tmp_path / "mine").mkdir()
        rows = {"text": [f"a film of {number}" for number in range(len(labels))], "label": labels}
        pd.DataFrame(rows).to_csv(tmp_path / "mine/test.csv", index=False)
        return {
            "model_ids": [str(tmp_path / "model")],
            "sets": [str(tmp_path / "mine")],
            "figures_dir": str(tmp_path / "figures"),
        }

    return write


def test_01_finds_a_label_that_the_model_lacks_in_whichever_row(own):
    given = own(["food", "music", "sport"] * 20 + ["politics"])
    with pytest.raises(ValueError, match="politics cannot be matched"):
        run_opening("01_nlp_shapley", **given, n_samples=1)


def test_06_asks_for_training_sentences_before_anything_is_computed(own):
    given = own(["food", "music", "sport"] * 20)
    with pytest.raises(ValueError, match="no split 'train' .*; put a train.csv there"):
        run_opening("06_checks", **given)


@pytest.fixture
def accuracy_of(capsys):
    """accuracy_of({name: predicted class}) -> what 02 says of a folder's accuracy, and the table shown."""

    def say(photos):
        shown, names = [], {}
        numbers = {"circle": 0, "cross": 1}
        exec(
            cell_with("02_vit_shapley", "class_numbers(model"),
            names
            | {
                "known": False,
                "photos": photos,
                "explained": list(photos.values()),
                "labels": [*numbers],
                "model": None,
                "np": np,
                "pd": pd,
                "display": shown.append,
                "predict": lambda images: np.array(images),
                "class_numbers": lambda _, folders: {f: numbers[f] for f in folders if f in numbers},
            },
        )
        return capsys.readouterr().out, shown

    return say


def test_02_counts_images_in_class_folders_and_names_the_others(accuracy_of):
    said, [table] = accuracy_of({"circle/a.png": 0, "circle/b.png": 1, "circl/c.png": 0, "cross_8.png": 1})
    assert "(circle, cross): circl/c.png, cross_8.png" in said
    assert table.iloc[0].tolist() == [2, 0.5] and "folders named as a class" in table.index[0]


def test_02_says_where_no_accuracy_can_be_had(accuracy_of):
    said, shown = accuracy_of({"a.png": 0, "circle": 1})  # a file that is called circle is no folder
    assert not shown and "accuracy is left out" in said and "a.png, circle" in said


@pytest.fixture
def texts_of():
    names = {"pd": pd, "known": False}
    exec(cell_with("02_vit_shapley", "def starred"), names)
    return names


def test_02_no_interval_that_is_clear_of_zero_reads_as_zero(texts_of):
    lines = [(0.1, -0.2, 0.3), (0.004, 0.0004, 0.006), (0.0, -0.001, 0.002), (0.5, np.nan, np.nan)]
    assert texts_of["with_interval"](lines) == [
        "0.10 [-0.20, 0.30]",
        "0.0040 [0.0004, 0.0060]",
        "0.00 [-0.00, 0.00]",
        "0.50 [nan, nan]",
    ]


def test_02_only_the_best_has_a_star_and_its_digits_tell_it(texts_of):
    part = pd.DataFrame({"mean": [0.171, 0.173, 0.1], "low": 0.05, "high": 0.25})
    said = texts_of["starred"](part, "max")
    assert [text[:5] for text in said] == ["0.171", "0.173", "0.100"]
    assert [text.endswith("★") for text in said] == [False, True, False]
    assert texts_of["starred"](part, "min")[2] == "0.10 [0.05, 0.25] ★"


@pytest.mark.parametrize(
    ("name", "text", "given", "said"),
    [
        ("02_vit_shapley", '"localisation")', {"known": False, "unknown": "is left out"}, "Figure 2.7 is"),
        (
            "02_vit_shapley",
            'figures, "pair")',
            {"known": False, "unknown": "is left out"},
            "Figure 2.5, with",
        ),
        ("05_comparisons", 'figures, "truth")', {"by_image": {}}, "Figure 5.4 is left out: no deciding"),
        ("05_comparisons", "areas = ", {"tcav": {"auc": {}}}, "left out: notebook 04 has no AUC"),
    ],
)
def test_cell_whose_figure_or_table_cannot_be_says_so(name, text, given, said, capsys):
    exec(cell_with(name, text), {"pd": pd, **given})
    assert said in capsys.readouterr().out


def test_05_says_where_the_figures_of_the_networks_are_not_there(tmp_path, capsys):
    names = {"networks": tmp_path}
    exec(cell_with("05_comparisons", "def show_networks"), names)
    exec(cell_with("05_comparisons", 'show_networks("concepts"'), names)
    said = capsys.readouterr().out
    assert "Figure 5.5 is left out" in said and "Figure 5.6 is left out" in said
