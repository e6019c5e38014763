"""Every notebook runs on the smoke profile into another folder: its numbers keep their invariants, its
figures show.
"""

import hashlib
import json
import math
import re

import nbformat
import numpy as np
import pytest
from PIL import Image

from workflow.execute import complete_notebook
from workflow.parameters import NOTEBOOKS, ROOT, notebook_names, plan_run

FIGURES = ROOT / "figures"
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("notebooks")]  # they read from each other


def fingerprint():
    """Hashes of the collection's own notebooks and figures."""
    files = [path for folder in (NOTEBOOKS, FIGURES) for path in folder.rglob("*") if path.is_file()]
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    """The folder that all notebooks of the run share."""
    return tmp_path_factory.mktemp("smoke")


@pytest.fixture(scope="module")
def before():
    return fingerprint()


@pytest.fixture(scope="module", params=notebook_names())
def finished(request, output, before):
    """Each notebook in running order: (name, executed notebook, its results, folder of figures)."""
    parameters = plan_run("smoke", only=[request.param])[request.param]
    complete_notebook(request.param, parameters, output)
    executed = nbformat.read(output / "notebooks" / f"{request.param}.ipynb", as_version=4)
    figures = output / "figures" / request.param
    return request.param, executed, json.loads((figures / "results.json").read_text(encoding="utf8")), figures


def numbers(part):
    """Every number of nested results."""
    if isinstance(part, dict | list):
        return [
            number
            for inner in (part.values() if isinstance(part, dict) else part)
            for number in numbers(inner)
        ]
    return [part] if isinstance(part, int | float) else []


def check_quickstart(results):
    concept = results["concept"]
    assert 0 <= concept["low"] <= concept["high"] <= 1 and all(0 <= share <= 1 for share in concept.values())
    assert all(0.5 < p <= 1 for p in results["probability"])  # of two classes, the predicted one
    for cost in (results["text"], results["image"]):
        assert (cost["forward passes"], cost["backward passes"]) == (2, 1) and cost["milliseconds"] > 0


def check_nlp_shapley(results):
    assert results["closed_form_error"] < 1e-12
    assert results["examples"] == {"It never fails to engage us.": "positive"}  # the smoke profile's own
    assert results["accuracy"] and all(0.5 < accuracy <= 1 for accuracy in results["accuracy"].values())
    for rows in results["faithfulness"].values():
        assert rows["Att (row sum, constant)"]["comp mean"] == 0
        for name, row in rows.items():
            assert -1 <= row["comp mean"] <= 1 and -1 <= row["suff mean"] <= 1
            assert 0 <= row["F1 macro"] <= 1 and 0 <= row["F1 weighted"] <= 1
            if name.startswith(("Shapley-Att", "Att (", "Attention rollout", "Shapley-Grad", "Grad-")):
                assert row["forwards"] == 1 and row["backwards"] == ("Grad" in name)
            if name in ("AttnLRP", "CP-LRP", "Gradient × input") or name.startswith(
                ("Chefer", "Shapley-Rel")
            ):
                assert row["forwards"] == 1 + ("Contrast" in name) and row["backwards"] == 1
        assert {"AttnLRP", "Chefer (signed)", "Shapley-Rel-Att-Contrast"} <= set(rows)
        games = [name for name in rows if re.fullmatch(r"Shapley-(Grad-)?Att-(CLS|Mutual|Max-Mutual)", name)]
        assert len(games) == 6
    assert {"Shapley-Input", "SHAP (signed)", "SHAP (absolute)"} <= set(
        next(iter(results["faithfulness"].values()))
    )
    shares = results["ratio_to_shapley_input"]
    assert results["ratio_sentences"] > 0 and all(share["Shapley-Input"] == 1 for share in shares.values())
    assert shares["mean"]["Shapley-Rel-Att-Contrast"] > shares["mean"]["Random"]
    correlations = numbers(results["sampling_rank_correlation"])
    assert len(correlations) >= 3 and all(-1 <= correlation <= 1 for correlation in correlations)


def check_vit_shapley(results):
    assert min(results["accuracy"].values()) > 0.9
    for name, row in results["faithfulness"].items():
        assert all(-1 <= score <= 1 for score in (row["comp"], row["suff"])), name
        assert 0 <= row["deletion"] <= 1 and 0 <= row["insertion"] <= 1, name
    found, chance = results["localisation"], results["chance"]
    assert found["Shapley-Att-Mutual"]["object AP"] > 2 * chance["object chance"]
    assert found["Random"]["object AP"] < found["Shapley-Att-Mutual"]["object AP"]


def check_concept_training(results):
    assert results["model_accuracy"] > 0.9
    for colour in ("red", "blue", "green", "yellow"):
        assert min(results["held_out_accuracy"][colour].values()) > 0.95
    assert 0.3 < results["control"]["by image"] < 0.65 < min(results["held_out_accuracy"]["red"].values())
    called = results["called_striped"]
    for texture, fooled in (
        ("red dotted", 0.2),
        ("red zigzagged", 0.3),
    ):  # means of layers, of which the late
        assert called["confounded"][texture] > called["clean"][texture] + fooled  # ones see through it


def check_tcav(results):
    assert min(results["accuracy"].values()) > 0.9
    assert all(0 <= score <= 1 for score in numbers(results["ttcav"]) + numbers(results["auc"]))
    for target in results["ttcav"].values():
        for concept in target["attention"]:
            last = [target[weighting][concept][-1] for weighting in ("attention", "plain", "cls")]
            reads_cls = results["largest_patch_gradient_last_block"] == 0
            assert not reads_cls or len(set(last)) == 1  # only [CLS] has a gradient: any weight will do
    assert {"attention: AUC", "attention − plain: AUC"} <= set(results["conclusions"])
    assert results["auc"]["logistic, attention"] == pytest.approx(results["conclusions"]["attention: AUC"][0])


def check_comparisons(results):
    assert results["kendall_tau"]["mask"] == 1 and all(
        -1 <= tau <= 1 for tau in results["kendall_tau"].values()
    )
    verdict = results["verdict"]
    assert verdict["Integrated gradients"]["comp, text"] > verdict["First tokens"]["comp, text"]
    assert all(-1 <= line["comp, text"] <= 1 for line in verdict.values() if line["comp, text"] is not None)
    assert set(results["not_told_from_the_best"]) == {*results["sets"], "images"}
    assert all(set(front) <= set(verdict) and front for front in results["pareto"].values())
    assert len(results["findings"]) == 3


def check_checks(results):
    for part in results["sanity"].values():
        assert all(
            part["head"][row] == 1 for row in ("Shapley-Att-CLS", "Att (received)", "Attention rollout")
        )
        assert part["head"]["Shapley-Grad-Att-CLS"] < 1
    assert 0.05 < results["finds_trigger"]["Leave-one-out"] <= 1
    answered = 12 * results["planted_accuracy"]  # of the smoke profile's twelve sentences
    assert abs(answered - round(answered)) < 0.01
    assert results["learned"]["People"]["AUROC"] == 1
    assert max(results["ablation"].values()) == results["ablation"][results["chosen"]]
    assert set(results["chosen_comp"]) == set(results["sets"])
    assert set(results["beats_all_of_its_passes"]) == {*results["sets"], "all sets"}
    assert all(
        share > 0.5
        for name, part in results["half_precision"].items()
        if "rank" in name
        for share in part.values()
    )


INVARIANTS = {
    "00_quickstart": check_quickstart,
    "01_nlp_shapley": check_nlp_shapley,
    "02_vit_shapley": check_vit_shapley,
    "03_concept_training": check_concept_training,
    "04_tcav": check_tcav,
    "05_comparisons": check_comparisons,
    "06_checks": check_checks,
}


def test_all_cells_ran_without_error_into_a_clean_notebook(finished):
    _, executed, _, _ = finished
    code = [cell for cell in executed.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not [output for cell in code for output in cell.outputs if output.output_type == "error"]
    assert "papermill" not in executed.metadata


def test_results_are_finite_numbers_that_keep_their_invariants(finished):
    name, _, results, _ = finished
    assert numbers(results) and all(math.isfinite(number) for number in numbers(results))
    INVARIANTS.get(name, lambda results: None)(results)


def test_every_figure_is_there_for_reading_and_print_and_is_not_blank(finished):
    _, executed, _, figures = finished
    source = "\n".join(cell.source for cell in executed.cells if cell.cell_type == "code")
    named = set(re.findall(r'save_figure\(.*?figures, "(\w+)"\)', source))
    found = {path.stem for path in figures.glob("*.png")}
    assert named and named <= found
    for figure in found:
        with Image.open(figures / f"{figure}.png") as image:
            pixels = np.asarray(image.convert("L"), dtype=float)
        assert min(pixels.shape) > 200 and pixels.std() > 8, figure
        assert (pixels < 128).mean() > 0.002 and len(np.unique(pixels)) > 30, figure
        pdf = (figures / f"{figure}.pdf").read_bytes()
        assert pdf.startswith(b"%PDF") and len(pdf) > 5_000, figure


def test_figures_are_shown_in_the_notebook_too(finished):
    _, executed, _, _ = finished
    outputs = [output for cell in executed.cells if cell.cell_type == "code" for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)


def test_the_collection_itself_is_left_as_it_was(finished, before):
    assert before and fingerprint() == before
