"""Gather what the notebooks conclude on each network of a sweep: python -m report.networks [RUN]

Writes figures/networks/conclusions.csv, one line a conclusion and network, its value and 95 % interval, and
draws them.
"""

import csv
import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from helpers import plots
from helpers.results import save_figure
from workflow.parameters import ROOT
from workflow.runs import recorded_runs, run_states

COLORS = ("#000000", "#777777", "#d55e00", "#e69f00", "#f0c060")  # the first is the default network
MARKERS = "so^vD"
COLUMNS = ("conclusion", "notebook", "network", "value", "low", "high")


def gather(folder: Path, target: Path) -> int:
    """Write the conclusions of all runs of a sweep in `folder` to `target`; return the number of lines.

    Raises ValueError where a run is not finished, or concluded nothing.
    """
    runs, lines = recorded_runs(folder), []
    for run, notebook, state in run_states(runs, folder):
        if state != "finished":
            raise ValueError(f"{notebook} in {folder / run} is {state}; give the sweep's command again")
        path = folder / run / "figures" / notebook / "results.json"
        found = json.loads(path.read_text(encoding="utf8")).get("conclusions", {})
        network = Path(runs[run]["varied"]["model_id"]).name
        lines += [(conclusion, notebook, network, *values) for conclusion, values in found.items()]
    if not lines:
        raise ValueError(f"no run in {folder} has conclusions; sweep workflow/grids/networks.yaml first")
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("w", newline="", encoding="utf8") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerows([COLUMNS, *lines])
    return len(lines)


def draw(table: pd.DataFrame, measures: tuple[str, str] = ("comp", "concept AP")) -> plt.Figure:
    """Draw the conclusions on two measures, a point and its interval for each network."""
    by_network, networks = table.set_index(["conclusion", "network"]), table["network"].unique()
    names = {m: [name for name in table["conclusion"].unique() if name.endswith(f": {m}")] for m in measures}
    size = {"figsize": (plots.PAGE, 1.2 + 0.4 * len(names[measures[0]])), "layout": "constrained"}
    figure, axes = plt.subplots(1, 2, sharey=True, **size)
    for axis, measure in zip(axes, measures, strict=True):
        for place, network in enumerate(networks):
            lines = by_network.xs(network, level="network").reindex(names[measure])
            at = np.arange(len(lines)) + 0.15 * (place - (len(networks) - 1) / 2)
            color = COLORS[place % len(COLORS)]
            axis.hlines(at, lines["low"], lines["high"], color=color, linewidth=1)
            axis.plot(lines["value"], at, MARKERS[place % len(MARKERS)], ms=3.5, color=color, label=network)
        axis.axvline(0, color="0.6", linewidth=0.8)
        axis.set(title=measure, xlabel="difference, 95 % interval")
    axes[0].set_yticks(range(len(lines)), [name.split(": ")[0] for name in names[measures[0]]], fontsize=7)
    axes[0].invert_yaxis()
    figure.legend(*axes[0].get_legend_handles_labels(), frameon=False, ncols=3, loc="outside lower center")
    return figure


if __name__ == "__main__":
    plots.use_style()
    source, target = ROOT / (sys.argv[1] if len(sys.argv) > 1 else "runs/networks"), ROOT / "figures/networks"
    count = gather(source, target / "conclusions.csv")
    save_figure(draw(pd.read_csv(target / "conclusions.csv")), target, "networks")
    print(f"{count} lines in figures/networks/conclusions.csv")
