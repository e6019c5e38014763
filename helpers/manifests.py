"""What is known of a run: the address of its content, the manifest that says it is finished, the plan of its
folder.

The folder of a run holds notebooks/ (each as executed, its log NAME.log and, once all else is there, its
manifest NAME.json), figures/ with the results, and plan.json. It may be a local folder or any URL that fsspec
writes to.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import fsspec
from filelock import FileLock, Timeout
from fsspec.implementations.local import LocalFileSystem

from helpers.plans import NOTEBOOKS, PROJECT_ROOT, notebook_names

FORMAT = 1  # of plans and manifests
IN_PLACE = PROJECT_ROOT / "runs" / "in-place"  # logs and manifests of the collection itself
STAGING = PROJECT_ROOT / "runs" / "staging"  # what is on its way to a URL


def upstream_notebooks(name: str) -> list[str]:
    """Return the earlier notebooks that a notebook reads from: those whose number stands in its code, as in
    03_cavs.
    """
    code = "\n".join(text for kind, text, _ in _source(name) if kind == "code")
    earlier = notebook_names()[: notebook_names().index(name)]
    return [other for other in earlier if re.search(rf"\b{file_prefix(other)}", code)]


def notebook_address(name: str, parameters: dict, addresses: dict[str, str]) -> str:
    """Return the sha256 of all that decides what a notebook computes.

    That is its source without outputs, the source of every helper, its parameters, and the `addresses` of the
    notebooks that it reads from. Data and models that the parameters name are taken to stay what they are.
    """
    helpers = {
        path.name: path.read_text(encoding="utf8") for path in sorted(Path(__file__).parent.glob("*.py"))
    }
    upstream = {other: addresses.get(other, "") for other in upstream_notebooks(name)}
    content = json.dumps([_source(name), helpers, parameters, upstream], sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()


def run_addresses(plan: dict[str, dict], folder: str | Path) -> dict[str, str]:
    """Return the address of each notebook of a plan, and of those outside it that they read from in
    `folder`.
    """
    addresses = {}
    for name, parameters in plan.items():
        for other in upstream_notebooks(name):
            manifest = None if other in plan else read_manifest(other, folder)
            if manifest and manifest["status"] == "finished":
                addresses[other] = manifest["address"]
        addresses[name] = notebook_address(name, parameters, addresses)
    return addresses


def read_manifest(name: str, folder: str | Path) -> dict | None:
    """Return the manifest of a notebook's run, None where there is none. Raises ValueError for another
    version's.
    """
    return _read(folder, f"notebooks/{name}.json")


def write_manifest(manifest: dict, folder: str | Path) -> None:
    """Write the manifest of a notebook's run, with the version of its format."""
    content = json.dumps({"format": FORMAT, **manifest}, indent=1, default=str)
    write_text(folder, f"notebooks/{manifest['notebook']}.json", content)


def is_finished(manifest: dict | None, address: str, folder: str | Path) -> bool:
    """Tell whether a manifest stands for a finished run of that address whose files are all as they were
    written.
    """
    if not manifest or manifest["status"] != "finished" or manifest["address"] != address:
        return False
    fs, root = fsspec.url_to_fs(str(folder))
    local = isinstance(
        fs, LocalFileSystem
    )  # elsewhere the size must do: reading everything back costs too much
    try:
        return all(
            (digest(Path(root, path)) == about["sha256"])
            if local
            else (fs.size(f"{root}/{path}") == about["bytes"])
            for path, about in manifest["outputs"].items()
        )
    except FileNotFoundError:
        return False


def forget(runs: dict[str, dict], folder: str | Path) -> None:
    """Remove the manifests of all notebooks of `runs`, so that they run again."""
    fs, root = fsspec.url_to_fs(str(folder))
    for run, about in runs.items():
        for name in about["plan"]:
            with suppress(FileNotFoundError):
                fs.rm_file(f"{run_folder(root, run)}/notebooks/{name}.json")


def unfinished_runs(runs: dict[str, dict], folder: str | Path) -> tuple[list[tuple], dict[str, dict]]:
    """Return the (run, manifest) of what is finished in `folder`, marked as kept, and the runs without it."""
    kept, rest = [], {}
    for run, about in runs.items():
        place = run_folder(folder, run)
        addresses = run_addresses(about["plan"], place)
        found = {name: read_manifest(name, place) for name in about["plan"]}
        finished = [name for name in found if is_finished(found[name], addresses[name], place)]
        kept += [(run, {**found[name], "kept": True}) for name in finished]
        rest[run] = {**about, "plan": {name: about["plan"][name] for name in found if name not in finished}}
    return kept, rest


def read_plan(folder: str | Path) -> dict[str, dict]:
    """Return the runs that were ever asked for in `folder`, as `plan_sweep` gives them; a single run is named
    ".".
    """
    return (_read(folder, "plan.json") or {"runs": {}})["runs"]


def record_plan(folder: str | Path, runs: dict[str, dict]) -> None:
    """Add runs to plan.json of `folder`, which is made where it is not there.

    Raises OSError where that cannot be written, ValueError where another version has written before.
    """
    with lock("plan", folder):
        known = read_plan(folder)
        for run, about in runs.items():
            plan = {**known.get(run, {"plan": {}})["plan"], **about["plan"]}
            known[run] = {"plan": dict(sorted(plan.items())), "varied": about["varied"]}
            for name in plan:
                read_manifest(name, run_folder(folder, run))
        write_text(folder, "plan.json", json.dumps({"format": FORMAT, "runs": known}, indent=1, default=str))


def run_states(folder: str | Path) -> Iterator[tuple[str, str, str, dict]]:
    """Yield (run, notebook, state, manifest) of all that was ever asked for in `folder`; the state is one of

    finished, failed   as its manifest says
    running            somebody on this machine is at it
    stale              finished, but its sources or its files have changed since
    missing            not begun, cut off or held back
    """
    for run, about in read_plan(folder).items():
        place = run_folder(folder, run)
        plan = {name: parameters for name, parameters in about["plan"].items() if name in notebook_names()}
        addresses = run_addresses(plan, place)
        for name in plan:
            manifest = read_manifest(name, place)
            yield run, name, _state(name, place, manifest, addresses[name]), manifest or {}


def run_folder(folder: str | Path, run: str) -> str | Path:
    """Return where in `folder` the run of that name is."""
    return folder if run == "." else f"{str(folder).rstrip('/')}/{run}"


def log_path(name: str, folder: str | Path) -> str:
    """Return where the log of a notebook's run is."""
    return f"{str(folder).rstrip('/')}/notebooks/{name}.log"


def file_prefix(name: str) -> str:
    """Return what the figures and results of a notebook begin with: 03_ for 03_concept_training."""
    return name.split("_")[0] + "_"


def is_url(folder: str | Path) -> bool:
    """Tell whether a folder is a URL, such as s3://bucket/runs."""
    return "://" in str(folder)


def staging_folder(url: str) -> Path:
    """Return the local folder of what is on its way to a URL."""
    return STAGING / hashlib.sha256(url.rstrip("/").encode()).hexdigest()[:16]


def lock(name: str, folder: str | Path) -> FileLock:
    """Return the lock, not yet taken, of a notebook's run in `folder`. It is freed even when its holder is
    killed.
    """
    path = _lock_path(name, folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(path)


def digest(path: Path) -> str:
    """Return the sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_text(folder: str | Path, path: str, text: str) -> None:
    """Write a file of `folder` at once: whoever reads it, at any moment, finds all or nothing of it."""
    fs, root = fsspec.url_to_fs(str(folder))
    if isinstance(fs, LocalFileSystem):
        replace_file(Path(root, path), text.encode())
    else:
        fs.makedirs(f"{root}/{path}".rpartition("/")[0], exist_ok=True)
        fs.pipe_file(f"{root}/{path}", text.encode())


def replace_file(path: Path, content: bytes) -> None:
    """Write a local file at once, through a sibling that git ignores and that the next writer replaces."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".running-{path.name}")
    unfinished.write_bytes(content)
    os.replace(unfinished, path)


def _source(name: str) -> list[tuple]:
    """Return the kind, the text and the tags of each cell."""
    cells = json.loads((NOTEBOOKS / f"{name}.ipynb").read_text(encoding="utf8"))["cells"]
    return [(cell["cell_type"], "".join(cell["source"]), cell["metadata"].get("tags", [])) for cell in cells]


def _read(folder: str | Path, path: str) -> dict | None:
    fs, root = fsspec.url_to_fs(str(folder))
    try:
        content = json.loads(fs.cat_file(f"{root}/{path}"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = f"{path} has not format {FORMAT}"
        raise ValueError(f"{folder} was written by another version ({found}); choose another --output")
    return content


def _lock_path(name: str, folder: str | Path) -> Path:
    return (staging_folder(str(folder)) if is_url(folder) else Path(folder)) / ".locks" / f"{name}.lock"


def _state(name: str, folder: str | Path, manifest: dict | None, address: str) -> str:
    try:
        if _lock_path(name, folder).exists():
            lock(name, folder).acquire(timeout=0).lock.release()
    except Timeout:
        return "running"
    if not manifest or manifest["status"] == "failed":
        return "failed" if manifest else "missing"
    return "finished" if is_finished(manifest, address, folder) else "stale"
