"""What results were made from, and whether they still are what was made.

The folder of a run holds notebooks/NAME.ipynb as executed; figures/NAME/ with what the notebook wrote and,
written last, provenance.json; logs/NAME.log and, where it failed, logs/NAME.ipynb as far as it came.
The project itself is such a folder, of the committed results.
"""

import ast
import hashlib
import json
import os
from contextlib import suppress
from functools import cache
from pathlib import Path

import yaml
from filelock import FileLock, Timeout

from workflow.parameters import NOTEBOOKS, ROOT


def earlier_notebooks(name: str) -> list[str]:
    """Return the notebooks whose results a notebook reads, as workflow/reads.yaml declares."""
    return (yaml.safe_load((ROOT / "workflow" / "reads.yaml").read_text(encoding="utf8")) or {}).get(name, [])


def plan_digests(plan: dict[str, dict], run: Path) -> dict[str, str]:
    """Return, for each notebook of a plan in order, the sha256 of all that decides what it computes.

    That is its code, the helpers that it imports, its parameters, and the digests of those that it reads
    from; where the plan has them not, they lie in `run`, else among the committed ones. Prose does not
    count, and models and data that parameters name are taken to stay what they are.
    """
    digests, helpers = {}, _helpers()
    for name, parameters in plan.items():
        earlier = {}
        for other in earlier_notebooks(name):
            found = read_provenance(other, run) or read_provenance(other, ROOT) or {}
            earlier[other] = digests.get(other, found.get("digest"))
        cells = _code_cells((NOTEBOOKS / f"{name}.ipynb").read_bytes())
        source = [["".join(cell["source"]), cell["metadata"].get("tags", [])] for cell in cells]
        code = "\n".join(text for text, _ in source)
        content = [source, _imported(code, helpers), parameters, earlier]
        digests[name] = hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()
    return digests


def read_provenance(name: str, run: Path) -> dict | None:
    """Return what is recorded of a notebook's finished results in `run`, None where nothing sound is."""
    try:
        found = json.loads((run / "figures" / name / "provenance.json").read_text(encoding="utf8"))
    except (FileNotFoundError, ValueError):
        return None
    return found if isinstance(found, dict) and {"digest", "parameters", "files"} <= found.keys() else None


def file_digest(path: Path) -> str:
    """Return the sha256 of a file; of a notebook, that of its code and outputs: prose may be mended at any
    time.
    """
    if path.suffix == ".ipynb":
        with suppress(ValueError, KeyError, TypeError):  # what is no notebook is digested as any file
            cells = [{**cell, "id": None, "metadata": None} for cell in _code_cells(path.read_bytes())]
            return hashlib.sha256(json.dumps(cells, sort_keys=True).encode()).hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_finished(name: str, digest: str, run: Path) -> bool:
    """Tell whether results of that digest are in `run`, every file as it was written."""
    found = read_provenance(name, run)
    if not found or found["digest"] != digest:
        return False
    files = {path: run / path for path in found["files"]}
    return all(path.is_file() and file_digest(path) == found["files"][key] for key, path in files.items())


def notebook_state(name: str, digest: str, run: Path) -> str:
    """Return how a notebook stands in `run`.

    running    a process on this machine is at it
    finished   from these very sources, and every file is as it was written
    failed     when it was last tried; results of an earlier run may still be there
    stale      finished once, but sources, parameters or files have changed since
    missing    never begun, cut off, or held back
    """
    try:
        if (run / ".staging" / f"{name}.lock").exists():
            notebook_lock(name, run).acquire(timeout=0).lock.release()
    except Timeout:
        return "running"
    if is_finished(name, digest, run):
        return "finished"
    if failure_path(name, run).exists():
        return "failed"
    return "stale" if os.path.lexists(run / "figures" / name / "provenance.json") else "missing"


def notebook_lock(name: str, run: Path) -> FileLock:
    """Return the lock of whoever executes a notebook in `run`, not yet taken; it dies with its holder."""
    (run / ".staging").mkdir(parents=True, exist_ok=True)
    return FileLock(run / ".staging" / f"{name}.lock")


def failure_path(name: str, run: Path) -> Path:
    """Return where a notebook is, as far as it came, if it failed when it was last tried in `run`."""
    return run / "logs" / f"{name}.ipynb"


def place_title(place: str) -> str:
    """Return what to call the job of a folder of figures: NAME, or NAME in RUN."""
    run = Path(place).parents[1].as_posix()
    return Path(place).name + ("" if run == "." else f" in {run}")


def _code_cells(notebook: bytes) -> list[dict]:
    return [cell for cell in json.loads(notebook)["cells"] if cell["cell_type"] == "code"]


def _helpers() -> dict[str, str]:
    return {path.stem: path.read_text(encoding="utf8") for path in (ROOT / "helpers").glob("*.py")}


def _imported(code: str, helpers: dict[str, str]) -> dict[str, str]:
    """Return the helpers that code imports, also through each other; all where it is not plain Python."""
    found, new = {"__init__"} & helpers.keys(), _named(code)
    while new is not None and new & helpers.keys() - found:
        found |= new & helpers.keys()
        parts = [_named(helpers[name]) for name in found]
        new = None if None in parts else set().union(*parts)
    return helpers if new is None else {name: helpers[name] for name in found}


@cache
def _named(code: str) -> set[str] | None:
    """Return the modules of helpers that stand in the imports of code, None where it does not parse."""
    names = set()
    try:
        tree = ast.parse(code)
    except SyntaxError:
        return None
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(["helpers"] * bool(node.level) + [node.module or ""]).strip(".")
            names |= {f"{base}.{alias.name}" for alias in node.names}
    return {name.split(".")[1] for name in names if name.startswith("helpers.")}
