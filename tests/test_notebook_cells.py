"""Single cells of the notebooks, on input that the committed runs do not have."""

import re

import nbformat
import numpy as np
import pandas as pd
import pytest
from conftest import build_text_classifier

from helpers.cavs import WEIGHTINGS, Cavs
from workflow.parameters import NOTEBOOKS


def code_cells(name):
    cells = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4).cells
    return [cell.source for cell in cells if cell.cell_type == "code"]


def cell_with(name, text):
    """Return the source of the code cell of a notebook that holds this text."""
    [source] = [source for source in code_cells(name) if text in source]
    return source


def run_opening(name, checks=True, **given):
    """Run imports, parameters and, on request, checks of a notebook, with other values; return its names."""
    imports, defaults, check, *_ = code_cells(name)
    names = {}
    exec(imports, names)
    exec(defaults, names)
    names |= given
    exec(check if checks else "", names)
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


# 03 and 04: wrong names in their first cells, draws that are equal, figures left out


@pytest.mark.parametrize(
    ("name", "given", "said"),
    [
        ("03_concept_training", {"concepts_dir": "there"}, "concepts names striped.* it has boxy, roundish"),
        ("03_concept_training", {"concepts": [["boxy", "red"]]}, "concepts: .*'boxy'.* give concepts_dir"),
        ("04_tcav", {"targets_dir": "there"}, "targets names zebra.*targets_dir.* it has boxy, roundish"),
        ("04_tcav", {"targets": ["circle: red blue"]}, "targets: .*'circle'.* give targets_dir"),
        ("04_tcav", {"targets": ["zebra: red boxy"]}, "targets: .*'boxy'.* give concepts_dir"),
        ("04_tcav", {"heatmap_layers": [12, 13]}, "layers 0 to 11; give heatmap_layers"),
        ("04_tcav", {"text_target": "politics"}, "text_target: label 'politics' is none"),
    ],
)
def test_wrong_names_are_refused_with_their_parameter_and_the_way_out(name, given, said, tmp_path):
    for folder in ("boxy", "roundish"):
        (tmp_path / "images" / folder).mkdir(parents=True)
    given = {key: str(tmp_path / "images") if value == "there" else value for key, value in given.items()}
    with pytest.raises(ValueError, match=said):
        run_opening(name, figures_dir=str(tmp_path / "figures"), **given)


@pytest.mark.parametrize("equal", [True, False])
def test_equal_draws_have_no_spread_and_no_t_test(equal, tmp_path, capsys):
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((2, 2, 3, 8))
    vectors = vectors[:, :, [0, 0, 0]] if equal else vectors
    vectors = np.float32(vectors / np.linalg.norm(vectors, axis=-1, keepdims=True))
    cavs = Cavs(vectors, (0, 1), ("boxy", "roundish"), "logistic", "", "", 2)
    found = rng.standard_normal((2, 2, 6, 3))
    null = dict.fromkeys(WEIGHTINGS, rng.standard_normal((2, 1, 6, 5)))
    kinds = {"logistic": dict.fromkeys(WEIGHTINGS, found), ("random", "logistic"): null}
    given = {"figures": tmp_path, "cavs": cavs, "kinds": {"logistic": cavs}, "scores": {"circle": kinds}}
    given |= {"concepts": {"circle": ["roundish", "boxy"]}, "n_resamples": 9}
    exec(cell_with("04_tcav", "def describe("), run_opening("04_tcav", checks=False, **given))
    table = pd.read_csv(tmp_path / "ttcav.csv")
    for column in ("spread", "p t-test", "q t-test"):
        assert table[column].isna().all() if equal else table[column].notna().all()
    assert table[["score", "p random", "q random"]].notna().all(axis=None)
    said = "no t-test, since all draws are equal, of boxy, roundish: give its family a third concept"
    assert (said in capsys.readouterr().out) == equal


@pytest.mark.parametrize(("name", "left_out"), [("03_concept_training", 3), ("04_tcav", 2)])
def test_a_figure_that_may_be_left_out_is_told_by_its_number(name, left_out):
    cells = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4).cells
    told = [re.search(r"Figure (\d\.\d) is left out: ", cell.source) for cell in cells]
    places = [place for place, match in enumerate(told) if match]
    assert len(places) == left_out
    for place in places:
        assert cells[place + 1].source.startswith(f"**Figure {told[place].group(1)}.**")
