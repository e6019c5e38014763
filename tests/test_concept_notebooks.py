"""Notebooks 03 and 04 refuse wrong names in their first cells; 04 makes no t-test of draws that are equal."""

import re

import nbformat
import numpy as np
import pandas as pd
import pytest

from helpers.cavs import WEIGHTINGS, Cavs
from workflow.parameters import NOTEBOOKS


def run_cells(name, namespace, opening=True, holding=()):
    """Run the imports, parameters with those of `namespace` and checks, or the cells that hold a text."""
    cells = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4).cells
    code = [cell.source for cell in cells if cell.cell_type == "code"]
    given = dict(namespace)
    for source in code[:2]:
        exec(source, namespace)
    namespace.update(given)
    for source in code[2:3] if opening else [source for source in code if any(h in source for h in holding)]:
        exec(source, namespace)
    return namespace


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
        run_cells(name, {"figures_dir": str(tmp_path / "figures"), **given})


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
    run_cells("04_tcav", given, opening=False, holding=["def describe("])
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
