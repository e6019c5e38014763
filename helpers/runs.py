"""Running a notebook through papermill: nothing finished is repeated, nothing half done is taken for
finished.
"""

import base64
import io
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import distributions
from pathlib import Path

import fsspec
import nbformat
import papermill
from papermill.exceptions import PapermillExecutionError
from PIL import Image

from helpers.manifests import (
    IN_PLACE,
    digest,
    file_prefix,
    is_finished,
    is_url,
    lock,
    log_path,
    notebook_address,
    read_manifest,
    replace_file,
    run_addresses,
    staging_folder,
    upstream_notebooks,
    write_manifest,
)
from helpers.plans import NOTEBOOKS, PROJECT_ROOT, notebook_default

WIDGET = "application/vnd.jupyter.widget-view+json"


def run_notebook(name: str, parameters: dict, output: Path) -> Path:
    """Execute one notebook into `output`/notebooks, its figures into `output`/figures, and return the
    executed file.

    Below the project root the collection itself is refreshed: the parameters are the notebook's own, and the
    file changes only when every cell has run. Elsewhere a failed notebook is left as far as it came, with its
    error.
    """
    target = output / "notebooks" / f"{name}.ipynb"
    if output != PROJECT_ROOT:
        _execute(name, target, {**parameters, "figures_dir": str((output / "figures").resolve())})
        return target
    executed = IN_PLACE / "notebooks" / target.name
    _execute(name, executed, parameters)
    replace_file(target, executed.read_bytes())
    return target


def complete_plan(plan: dict[str, dict], folder: str | Path) -> Iterator[dict]:
    """Complete the notebooks of a plan in order and yield the manifest of each, as `complete_notebook`
    returns it.
    """
    addresses, done = run_addresses(plan, folder), {}
    for name, parameters in plan.items():
        earlier = [done[other] for other in upstream_notebooks(name) if other in done]
        done[name] = complete_notebook(name, parameters, folder, addresses, earlier)
        yield done[name]


def complete_notebook(
    name: str, parameters: dict, folder: str | Path, addresses: dict, earlier: list[dict]
) -> dict:
    """Run a notebook unless its manifest in `folder` says that this very run is finished; return the
    manifest.

    name         of the notebook
    parameters   that it runs with
    folder       of the run: IN_PLACE for the collection itself, a local folder, or a URL
    addresses    what `run_addresses` returned for the plan of this run
    earlier      manifests of the notebooks that it reads from; unless all are finished, this one is held back

    The manifest's `status` is finished, failed or held back; `kept` is there where nothing had to be done,
    and `error` where something went wrong. Two calls for one notebook and folder, in whatever processes, take
    turns.
    """
    manifest = {"notebook": name, "status": "failed", "log": log_path(name, folder)}
    missing = [other["notebook"] for other in earlier if other["status"] != "finished"]
    if missing:
        return {
            **manifest,
            "status": "held back",
            "error": f"was held back, because {missing[0]} did not finish",
        }
    if notebook_address(name, parameters, addresses) != addresses[name]:
        return {**manifest, "error": "failed: its source is not what the command began with; start it again"}
    try:
        with lock(name, folder):
            found = read_manifest(name, folder)
            if is_finished(found, addresses[name], folder):
                return {**found, "kept": True}
            if is_url(folder):
                return _complete_at_url(name, parameters, folder, addresses)
            return _complete_here(name, parameters, Path(folder), addresses)
    except Exception as error:  # a sweep goes on, whatever happens to one of its runs
        return {**manifest, "error": _describe(error)}


def clean_notebook(path: Path) -> None:
    """Remove progress bars and the bookkeeping of papermill and widgets from a notebook, and pack its
    pictures.
    """
    notebook = nbformat.read(path, as_version=4)
    for key in ("papermill", "widgets"):
        notebook.metadata.pop(key, None)
    for cell in notebook.cells:
        for key in ("papermill", "execution"):
            cell.metadata.pop(key, None)
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if not _is_progress(output)]
            for output in cell.outputs:
                if "image/png" in output.get("data", {}):
                    output.data["image/png"] = _with_palette(output.data["image/png"])
    nbformat.write(notebook, path)


def _complete_here(name: str, parameters: dict, folder: Path, addresses: dict) -> dict:
    output = PROJECT_ROOT if folder == IN_PLACE else folder
    if folder != IN_PLACE and Path(log_path(name, folder)).exists():
        for leftover in _outputs(name, output):
            leftover.unlink()
    with suppress(FileNotFoundError):
        (folder / "notebooks" / f"{name}.json").unlink()
    manifest = {"notebook": name, "address": addresses[name], **_provenance(name, parameters)}
    start = time.perf_counter()
    try:
        run_notebook(name, parameters, output)
        files = {os.path.relpath(path, folder): path for path in _outputs(name, output)}
        outputs = {
            path: {"sha256": digest(file), "bytes": file.stat().st_size} for path, file in files.items()
        }
        manifest |= {"status": "finished", "outputs": outputs}
    except Exception as error:
        manifest |= {"status": "failed", "error": _describe(error)}
    manifest |= {
        "ended": _now(),
        "seconds": round(time.perf_counter() - start, 3),
        "log": log_path(name, folder),
    }
    if manifest["status"] == "finished":
        write_manifest(manifest, folder)
    else:
        with suppress(OSError):  # where the disk is full, what to say is said by the manifest returned
            write_manifest(manifest, folder)
    return manifest


def _complete_at_url(name: str, parameters: dict, url: str, addresses: dict) -> dict:
    """Run in a local folder that outlives a failed upload, and upload what came of it, the manifest last."""
    fs, root = fsspec.url_to_fs(url)
    stage = staging_folder(url) / name
    for other in upstream_notebooks(name):
        for path in (read_manifest(other, url) or {"outputs": {}})["outputs"]:
            (stage / path).parent.mkdir(parents=True, exist_ok=True)
            fs.get_file(f"{root}/{path}", str(stage / path))
    manifest = read_manifest(name, stage)
    if not is_finished(manifest, addresses[name], stage):
        manifest = _complete_here(name, parameters, stage, addresses)
    for path in [*_outputs(name, stage), Path(log_path(name, stage))]:
        target = f"{root}/{path.relative_to(stage)}"
        fs.makedirs(target.rpartition("/")[0], exist_ok=True)
        fs.put_file(str(path), target)
    manifest["log"] = log_path(name, url)
    write_manifest(manifest, url)
    shutil.rmtree(stage)
    return manifest


def _execute(name: str, target: Path, parameters: dict) -> None:
    os.environ.setdefault(
        "PYTHONHASHSEED", "0"
    )  # the order of sets, in which some libraries draw; the kernel inherits it
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.with_suffix(".log").open("w", encoding="utf8") as log:
        try:
            papermill.execute_notebook(
                NOTEBOOKS / f"{name}.ipynb",
                target,
                parameters,
                kernel_name="python3",
                cwd=str(PROJECT_ROOT),
                progress_bar=False,
                stdout_file=log,
                stderr_file=log,
                extra_arguments=["--log-level=ERROR"],
            )
        except Exception as error:
            log.write(f"\n{error}\n")
            raise
    clean_notebook(target)


def _outputs(name: str, output: Path) -> list[Path]:
    """Return the files that a notebook left: itself, and the figures and results that bear its number."""
    figures = sorted((output / "figures").rglob(f"{file_prefix(name)}*"))
    return [path for path in [output / "notebooks" / f"{name}.ipynb", *figures] if path.is_file()]


def _provenance(name: str, parameters: dict) -> dict:
    git = {}
    for key, arguments in {"commit": ["rev-parse", "HEAD"], "dirty": ["status", "--porcelain"]}.items():
        with suppress(OSError):
            done = subprocess.run(["git", "-C", PROJECT_ROOT, *arguments], capture_output=True, text=True)
            git[key] = done.stdout.strip() if done.returncode == 0 else None
    packages = sorted({found.name: found.version for found in distributions()}.items())
    return {
        "parameters": parameters,
        "seed": parameters.get("seed", notebook_default(name, "seed")),
        "python": platform.python_version(),
        "packages": dict(packages),
        "git": {
            "commit": git.get("commit"),
            "dirty": bool(git["dirty"]) if git.get("dirty") is not None else None,
        },
        "started": _now(),
    }


def _describe(error: Exception) -> str:
    """Say in one line what went wrong, to go on after the notebook's name."""
    if isinstance(error, PapermillExecutionError):
        return f"failed in cell {error.exec_count}: {error.ename}: {' '.join(error.evalue.split())}".rstrip(
            ": "
        )
    if isinstance(error, OSError):
        return (
            f"failed: {type(error).__name__}: {error}; free space or choose another --output, then give the same "
            "command: it goes on with what is not finished"
        )
    return f"failed: {type(error).__name__}: {' '.join(str(error).split())}".rstrip(": ")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _with_palette(picture: str) -> str:
    """Return a base64 PNG in 256 colours, that cover all and fit most: a third of the size, and rare hues
    stay true.
    """
    packed = io.BytesIO()
    picture = Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGB")
    picture.quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=1).save(packed, "PNG", optimize=True)
    return base64.b64encode(packed.getvalue()).decode()


def _is_progress(output) -> bool:
    if WIDGET in output.get("data", {}):
        return True
    text = output.get("text", "")
    return output.output_type == "stream" and output.name == "stderr" and (not text.strip() or "%|" in text)
