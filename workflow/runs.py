"""All that was asked for in a folder: how it stands, its numbers in one table, its way into the project."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path

import click
import nbformat

from workflow.parameters import ROOT, notebook_names, plan_run
from workflow.provenance import notebook_state, plan_digests, read_provenance

UNPUBLISHED = ".safetensors"  # megabytes of vectors, which stay with the run


def recorded_runs(folder: Path) -> dict[str, dict]:
    """Return the runs that were ever asked for in `folder`, a single one named ".".

    Raises ValueError where the record is broken.
    """
    try:
        return json.loads((folder / "plan.json").read_text(encoding="utf8"))["runs"]
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{folder / 'plan.json'} cannot be read; remove it and give the command again"
        ) from error


def record_runs(runs: dict[str, dict], folder: Path) -> None:
    """Add runs to plan.json of `folder`, at once."""
    known = recorded_runs(folder)
    for run, about in runs.items():
        plan = {**known.get(run, {"plan": {}})["plan"], **about["plan"]}
        known[run] = {"plan": dict(sorted(plan.items())), "varied": about["varied"]}
    written = folder / ".staging" / "plan.json"
    written.write_text(json.dumps({"runs": known}, indent=1, default=str), encoding="utf8")
    written.replace(folder / "plan.json")


def run_states(runs: dict[str, dict], folder: Path) -> Iterator[tuple[str, str, str]]:
    """Yield (run, notebook, state) of all of `runs` in `folder`; `notebook_state` explains the states."""
    for run, about in runs.items():
        plan = {name: about["plan"][name] for name in notebook_names() if name in about["plan"]}
        for name, digest in plan_digests(plan, folder / run).items():
            yield run, name, notebook_state(name, digest, folder / run)


def gather_metrics(folder: Path) -> int:
    """Write metrics.csv of all finished runs in `folder` and return the number of its rows.

    Its columns are run, notebook, a column for each parameter that varies, metric and value: the metrics are
    the numbers of results.json, with dots between the names that lead to them.
    """
    runs = recorded_runs(folder)
    columns = dict.fromkeys(parameter for about in runs.values() for parameter in about["varied"])
    rows = []
    for run, name, state in run_states(runs, folder):
        path = folder / run / "figures" / name / "results.json"
        if state == "finished" and path.exists():
            about = {"run": run, "notebook": name, **runs[run]["varied"]}
            numbers = _numbers(json.loads(path.read_text(encoding="utf8")))
            rows += [{**about, "metric": metric, "value": value} for metric, value in numbers]
    written = folder / ".staging" / "metrics.csv"
    with written.open("w", newline="", encoding="utf8") as file:
        table = csv.DictWriter(file, ["run", "notebook", *columns, "metric", "value"], lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
    written.replace(folder / "metrics.csv")
    return len(rows)


def _numbers(part, name: str = "") -> Iterator[tuple]:
    if isinstance(part, dict | list):
        for key, inner in part.items() if isinstance(part, dict) else enumerate(part):
            yield from _numbers(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(part, int | float) and not isinstance(part, bool):
        yield name, part


def publish_run(run: Path) -> Path:
    """Replace the committed results by those of a run of the default profile, when all of it is finished.

    Returns the folder where they now are. Vectors, which are large and which git ignores, stay in the run.
    The prose of the notebooks stays as it is now, whatever it was when they were executed.
    """
    plan = plan_run("default")
    rest = [name for _, name, state in run_states({".": {"plan": plan}}, run) if state != "finished"]
    if rest:
        click.echo(f"the committed results stay until {', '.join(rest)} is finished, too")
        return run
    for name in plan:
        record = f"figures/{name}/provenance.json"
        found = read_provenance(name, run)
        found["files"] = {path: sha for path, sha in found["files"].items() if not path.endswith(UNPUBLISHED)}
        for path in found["files"]:
            new = (run / path).read_bytes()
            _replace(ROOT / path, _with_outputs(ROOT / path, new) if path.endswith(".ipynb") else new)
        _replace(ROOT / record, json.dumps(found, indent=1).encode())
        for path in (ROOT / "figures" / name).rglob("*"):
            if path.is_file() and path.relative_to(ROOT).as_posix() not in (record, *found["files"]):
                path.unlink()
    return ROOT


def _with_outputs(target: Path, executed: bytes) -> bytes:
    """Return the notebook `target` with the outputs of one that was executed from the same code."""
    notebook, done = (nbformat.reads(part.decode(), as_version=4) for part in (target.read_bytes(), executed))
    pairs = [[cell for cell in part.cells if cell.cell_type == "code"] for part in (notebook, done)]
    for cell, new in zip(*pairs, strict=True):
        cell.outputs, cell.execution_count = new.outputs, new.execution_count
    notebook.metadata = done.metadata
    return nbformat.writes(notebook).encode()


def _replace(target: Path, content: bytes) -> None:
    """Write a file at once, unless it holds that already."""
    if not target.is_file() or target.read_bytes() != content:
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished = target.with_name(f".running-{target.name}")
        unfinished.write_bytes(content)
        unfinished.replace(target)
