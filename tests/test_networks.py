"""What the notebooks conclude on each network is gathered whole, or not at all; the default one agrees."""

import json

import pandas as pd
import pytest
from matplotlib import pyplot as plt

from report import networks
from workflow.parameters import ROOT

FOUND = {
    "one − other: comp": [0.1, 0.0, 0.2],
    "one − other: concept AP": [-0.3, -0.5, -0.1],
    "one: comp": [0.5, 0.4, 0.6],
    "one: hits": [0.75, None, None],
}


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    """A sweep of one network, the state of its run, and a default run."""
    states = {"b": "finished"}
    (tmp_path / "plan.json").write_text(json.dumps({"runs": {"b": {"varied": {}, "plan": {}}}}))
    for run in ("default", "b"):
        folder = tmp_path / run / "figures" / "02_x"
        folder.mkdir(parents=True)
        (folder / "results.json").write_text(json.dumps({"model": f"models/{run}", "conclusions": FOUND}))
    monkeypatch.setattr(networks, "NOTEBOOKS", ("02_x",))
    monkeypatch.setattr(networks, "run_states", lambda *_: [(run, "02_x", states[run]) for run in states])
    monkeypatch.setattr(networks, "find_results", lambda *_: tmp_path / "default" / "figures" / "02_x")
    return tmp_path, states


def test_every_conclusion_has_a_line_for_each_network_and_a_point_in_the_figure(sweep):
    folder, _ = sweep
    assert networks.gather(folder, folder / "out" / "conclusions.csv") == 8
    table = pd.read_csv(folder / "out" / "conclusions.csv")
    assert list(table["network"]) == ["default"] * 4 + ["b"] * 4
    found = table[["value", "low", "high"]].astype(object).where(table.notna(), None)
    assert found.to_numpy().tolist() == [*FOUND.values()] * 2
    figure = networks.draw(table, networks.PATCHES)  # differences alone
    assert [line.get_xdata()[0] for line in figure.axes[0].lines[:2]] == [0.1, 0.1]
    assert [line.get_xdata()[0] for line in figure.axes[1].lines[:2]] == [-0.3, -0.3]
    assert [text.get_text() for text in figure.legends[0].texts] == ["default", "b"]
    assert figure.axes[0].get_xlim() == figure.axes[1].get_xlim()  # one scale
    plt.close(figure)


def test_a_sweep_that_is_not_finished_is_refused(sweep):
    folder, states = sweep
    states["b"] = "failed"
    with pytest.raises(ValueError, match="02_x in .*b is failed"):
        networks.gather(folder, folder / "conclusions.csv")
    assert not (folder / "conclusions.csv").exists()


@pytest.mark.parametrize("notebook", networks.NOTEBOOKS)
def test_the_committed_table_says_of_the_default_network_what_its_notebooks_say(notebook):
    table = pd.read_csv(ROOT / "figures" / "networks" / "conclusions.csv")
    results = json.loads((ROOT / "figures" / notebook / "results.json").read_text(encoding="utf8"))
    default = table[table["network"] == results["model"].split("/")[-1]].set_index("conclusion")
    for name, values in results["conclusions"].items():
        told = [None if pd.isna(value) else value for value in default.loc[name, ["value", "low", "high"]]]
        assert told == values, name
    assert table.groupby("network").size().nunique() == 1 and table["network"].nunique() >= 5
    assert set(table["network"]) == set(networks.SAID)  # each has a name in the legends
