"""Gather what the notebooks conclude on each network of a sweep: python -m report.networks [RUN]

Writes figures/networks/conclusions.csv, one line a conclusion and network: its value and 95 % interval.
"""

import csv
import json
import sys
from pathlib import Path

from workflow.parameters import ROOT
from workflow.runs import recorded_runs, run_states

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


if __name__ == "__main__":
    source = ROOT / (sys.argv[1] if len(sys.argv) > 1 else "runs/networks")
    count = gather(source, ROOT / "figures" / "networks" / "conclusions.csv")
    print(f"{count} lines in figures/networks/conclusions.csv")
