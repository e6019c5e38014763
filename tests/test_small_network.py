"""The notebooks on pictures run on the small network too: shallower, narrower, and it reads [CLS] alone."""

import json

import pytest

from workflow.execute import complete_notebook
from workflow.parameters import plan_run

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("small network")]
NOTEBOOKS = ["02_vit_shapley", "03_concept_training", "04_tcav"]


def test_02_to_04_run_on_the_small_network(tmp_path):
    plan = plan_run("smoke", NOTEBOOKS, {"model_id": "data/models/concept_vit"})
    results = {}
    for name in NOTEBOOKS:
        complete_notebook(name, plan[name], tmp_path)
        text = (tmp_path / "figures" / name / "results.json").read_text(encoding="utf8")
        results[name] = json.loads(text)
        assert results[name]["model"] == "data/models/concept_vit"
    assert results["02_vit_shapley"]["conclusions"] and results["04_tcav"]["conclusions"]
    assert results["04_tcav"]["largest_patch_gradient_last_block"] == 0  # the head reads [CLS] alone
    for target in results["04_tcav"]["ttcav"].values():
        last = {w: {c: scores[-1] for c, scores in part.items()} for w, part in target.items()}
        assert last["attention"] == last["plain"] == last["cls"] and not any(last["no cls"].values())
