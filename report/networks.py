"""Gather what 02 and 04 conclude on the default network and on those of a sweep: python -m report.networks

Writes figures/networks/conclusions.csv, one line for each conclusion and network, its value and 95 % interval
(none for counts), and draws the differences among them.
"""

import csv
import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from helpers import plots
from helpers.results import find_results, save_figure
from workflow.parameters import ROOT
from workflow.runs import recorded_runs, run_states

COLORS = ("#000000", "#777777", "#d55e00", "#e69f00", "#f0c060")  # the first is the default network
MARKERS = "so^vD"
NOTEBOOKS = ("02_vit_shapley", "04_tcav")
PATCHES = ("comp", "concept AP")
SAID = {  # names of networks in the legends; others have those of their folders
    "dinov2_scenes": "pretrained, head on [CLS] and patches",
    "dinov2_scenes_cls": "pretrained, head on [CLS]",
    "concept_vit": "small, first seed",
    "concept_vit_1": "small, second seed",
    "concept_vit_2": "small, third seed",
}
CONCEPTS = ("AUC", "AUC, zebra", "AUC, dalmatian", "AUC, fire engine")
COLUMNS = ("conclusion", "network", "value", "low", "high")


def gather(folder: Path, target: Path) -> int:
    """Write the conclusions of the default run and of a sweep's to `target`; return the number of lines.

    Raises ValueError where a run of the sweep in `folder` is not finished, FileNotFoundError without the
    default run.
    """
    runs = recorded_runs(folder)
    places = [find_results(ROOT / "runs/default/figures", notebook) for notebook in NOTEBOOKS]
    for run, notebook, state in run_states(runs, folder):
        if state != "finished":
            raise ValueError(f"{notebook} in {folder / run} is {state}; give the sweep's command again")
        if notebook in NOTEBOOKS:
            places.append(folder / run / "figures" / notebook)
    lines = []
    for place in places:
        results = json.loads((place / "results.json").read_text(encoding="utf8"))
        network = Path(results["model"]).name
        lines += [(name, network, *values) for name, values in results["conclusions"].items()]
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("w", newline="", encoding="utf8") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerows([COLUMNS, *lines])
    return len(lines)


def draw(table: pd.DataFrame, measures: tuple[str, ...]) -> plt.Figure:
    """Draw the differences on some measures, a point and its interval for each network, on one scale."""
    table = table[table["conclusion"].str.contains(" − ")]
    by_network, networks = table.set_index(["conclusion", "network"]), table["network"].unique()
    names = {m: [name for name in table["conclusion"].unique() if name.endswith(f": {m}")] for m in measures}
    questions = [name.split(": ")[0].replace("_", " ") for name in names[measures[0]]]
    size = {"figsize": (0.92 * plots.PAGE, 1.3 + 0.35 * len(questions)), "layout": "constrained"}
    figure, axes = plt.subplots(1, len(measures), sharex=True, sharey=True, **size)
    for axis, measure in zip(axes, measures, strict=True):
        for place, network in enumerate(networks):
            lines = by_network.xs(network, level="network").reindex(names[measure])
            at = np.arange(len(lines)) + 0.16 * (place - (len(networks) - 1) / 2)
            color = COLORS[place % len(COLORS)]
            axis.hlines(at, lines["low"], lines["high"], color=color, linewidth=1.2)
            look = {"ms": 3.5, "color": color, "label": SAID.get(network, network)}
            axis.plot(lines["value"], at, MARKERS[place % len(MARKERS)], **look)
        for place in range(0, len(questions), 2):  # every second question on grey
            axis.axhspan(place - 0.5, place + 0.5, color="0.94", linewidth=0, zorder=0)
        axis.axvline(0, color="black", linewidth=0.8, zorder=1)
        axis.set(title=measure, xlabel="difference")
    axes[0].set_yticks(range(len(questions)), questions, fontsize=8)
    axes[0].set_ylim(len(questions) - 0.5, -0.5)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, ncols=2, loc="outside lower center", fontsize=8)
    return figure


if __name__ == "__main__":
    plots.use_style()
    folder = ROOT / "figures" / "networks"
    count = gather(ROOT / "runs" / "networks", folder / "conclusions.csv")
    conclusions = pd.read_csv(folder / "conclusions.csv")
    save_figure(draw(conclusions, PATCHES), folder, "networks")
    save_figure(draw(conclusions, CONCEPTS), folder, "concepts")
    print(f"{count} lines in figures/networks/conclusions.csv")
