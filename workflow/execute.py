"""Execute one notebook of a run, as the Snakefile does: python -m workflow.execute FOLDER PLACE PARENT.

It writes into a fresh place below .staging, which replaces what was there before only when it is whole.
"""

import base64
import io
import itertools
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import distributions
from pathlib import Path

import nbformat
import papermill
from papermill.exceptions import PapermillExecutionError
from PIL import Image

from workflow.parameters import NOTEBOOKS, ROOT, notebook_default
from workflow.provenance import (
    earlier_notebooks,
    failure_path,
    file_digest,
    is_finished,
    notebook_lock,
    place_title,
    plan_digests,
    read_provenance,
)

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "LOKY_MAX_CPU_COUNT")
LARGE = 2**16  # bytes of a packed picture
FINDING = re.compile(r"[*_]*In the committed run\b")  # how a paragraph begins that tells what came out
LEFT_OUT = "*What the committed run found is left out here: this run has other parameters.*"
WIDGET = "application/vnd.jupyter.widget-view+json"


def complete_notebook(
    name: str, parameters: dict, run: Path, digest: str | None = None, force: bool = False
) -> dict:
    """Execute a notebook into the folder `run`, unless that is done already, and return its provenance.

    digest   that it is to have, as `plan_digests` returned it when the command began
    force    execute it even if it is finished

    Whoever else is at this notebook in `run` is waited for. Raises what the notebook raised, which
    logs/NAME.log says in its last line, and RuntimeError where sources are not what the command began with.
    """
    with notebook_lock(name, run):
        now = plan_digests({name: parameters}, run)[name]
        if now != (digest or now):
            raise RuntimeError(f"{name}: its source is not what the command began with; give it again")
        if is_finished(name, now, run) and not force:
            return read_provenance(name, run)
        for left in (run / ".staging").glob(f"{name}-*"):  # by a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        stage = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=run / ".staging")).resolve()
        try:
            return _attempt(name, parameters, run, now, stage)
        finally:
            shutil.rmtree(stage, ignore_errors=True)


def clean_notebook(notebook, stage: Path | None = None):
    """Return an executed notebook without progress bars and bookkeeping, its pictures packed.

    stage    folder that it was executed in, whose path goes from its outputs
    """
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
    _drop_figures_dir(notebook)
    text = nbformat.writes(notebook)
    return nbformat.reads(text.replace(f"{stage}/", "") if stage else text, as_version=4)


def paragraphs(text: str) -> list[str]:
    """Return the parts of a Markdown text that blank lines set apart."""
    return re.split(r"\n\s*\n", text)


def leave_out_findings(notebook) -> None:
    """Replace what the committed run found, which is not true of another run, by a note in each cell."""
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            parts = [LEFT_OUT if FINDING.match(part) else part for part in paragraphs(cell.source)]
            cell.source = "\n\n".join(part for part, _ in itertools.groupby(parts))


def _differs(name: str, parameters: dict) -> bool:
    """Whether a run's parameters may change what comes out of a notebook."""
    given = {key: value for key, value in parameters.items() if key not in ("device", "batch_size")}
    return any(value != notebook_default(name, key) for key, value in given.items())


def _attempt(name: str, parameters: dict, run: Path, digest: str, stage: Path) -> dict:
    executed, figures, log = stage / f"{name}.ipynb", stage / "figures" / name, run / "logs" / f"{name}.log"
    for folder in (figures, log.parent, run / "figures", run / "notebooks"):
        folder.mkdir(parents=True, exist_ok=True)
    failure_path(name, run).unlink(missing_ok=True)
    for other in earlier_notebooks(name):
        if read_provenance(other, run):
            (figures.parent / other).symlink_to((run / "figures" / other).resolve())
    provenance, begun = _provenance(name, parameters, digest), time.perf_counter()
    try:
        _execute(name, executed, {**parameters, "figures_dir": str(figures.parent)}, log)
    except Exception:
        source = executed if executed.exists() else NOTEBOOKS / executed.name
        shutil.copyfile(source, failure_path(name, run))
        raise
    notebook = clean_notebook(nbformat.read(executed, as_version=4), stage)
    earlier = {other: read_provenance(other, run) for other in earlier_notebooks(name)}
    asked = {name: parameters} | {other: found["parameters"] for other, found in earlier.items() if found}
    if any(map(_differs, asked, asked.values())):
        leave_out_findings(notebook)
    nbformat.write(notebook, executed)
    made = {f"notebooks/{name}.ipynb": executed}
    made |= {
        path.relative_to(stage).as_posix(): path for path in sorted(figures.rglob("*")) if path.is_file()
    }
    provenance |= {"ended": _now(), "seconds": round(time.perf_counter() - begun, 3)}
    provenance["files"] = {path: file_digest(file) for path, file in made.items()}
    (figures / "provenance.json").write_text(json.dumps(provenance, indent=1, default=str), encoding="utf8")
    with suppress(FileNotFoundError):
        (run / "figures" / name).rename(stage / "before")
    figures.rename(run / "figures" / name)
    executed.replace(run / "notebooks" / executed.name)
    return provenance


def _execute(name: str, target: Path, parameters: dict, log: Path) -> None:
    for variable in THREADS:
        os.environ.setdefault(variable, os.environ.get("OMP_NUM_THREADS", "1"))
    os.environ.setdefault("PYTHONHASHSEED", "0")  # the order of sets, in which some libraries draw
    with log.open("w", buffering=1, encoding="utf8") as file:
        try:
            papermill.execute_notebook(
                NOTEBOOKS / f"{name}.ipynb",
                target,
                parameters,
                kernel_name="python3",
                cwd=str(ROOT),
                progress_bar=False,
                stdout_file=file,
                stderr_file=file,
                extra_arguments=["--log-level=CRITICAL"],  # its goodbyes are no news
            )
        except Exception as error:
            where = f"cell {error.exec_count}: " if isinstance(error, PapermillExecutionError) else ""
            kind = getattr(error, "ename", type(error).__name__)
            said = " ".join(str(getattr(error, "evalue", error)).split())
            file.write(
                f"\n{error if where else traceback.format_exc()}\n{where}{kind}: {said}".rstrip(": ") + "\n"
            )
            raise


def _provenance(name: str, parameters: dict, digest: str) -> dict:
    git = {}
    for key, arguments in {"commit": ["rev-parse", "HEAD"], "dirty": ["status", "--porcelain"]}.items():
        with suppress(OSError):  # no git
            done = subprocess.run(["git", "-C", ROOT, *arguments], capture_output=True, text=True)
            git[key] = done.stdout.strip() if done.returncode == 0 else None
    return {
        "notebook": name,
        "digest": digest,
        "parameters": parameters,
        "seed": parameters.get("seed", notebook_default(name, "seed")),
        "python": platform.python_version(),
        "packages": dict(sorted({found.name: found.version for found in distributions()}.items())),
        "git": {
            "commit": git.get("commit"),
            "dirty": bool(git["dirty"]) if git.get("dirty") is not None else None,
        },
        "started": _now(),
    }


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _drop_figures_dir(notebook) -> None:
    """Take the folder out of the cell that papermill injected; the cell goes where nothing else is in it."""
    for index, cell in enumerate(notebook.cells):
        if "injected-parameters" in cell.metadata.get("tags", []):
            lines = [line for line in cell.source.splitlines() if not line.startswith("figures_dir = ")]
            cell.source = "\n".join(lines)
            if all(line.startswith("#") or not line for line in lines):
                del notebook.cells[index]
                for part in (
                    item for later in notebook.cells[index:] for item in (later, *later.get("outputs", []))
                ):
                    if part.get("execution_count"):
                        part.execution_count -= 1
            return


def _with_palette(picture: str) -> str:
    """Return a base64 PNG in 256 colours that cover all: a third of the size, and rare hues stay true.

    A picture that is still large, of many maps over scenes, gets 80.
    """
    picture = Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGB")
    for colors in (256, 80):
        packed = io.BytesIO()
        picture.quantize(colors, Image.Quantize.MAXCOVERAGE, kmeans=1).save(packed, "PNG", optimize=True)
        if len(packed.getvalue()) <= LARGE:
            break
    return base64.b64encode(packed.getvalue()).decode()


def _is_progress(output) -> bool:
    if WIDGET in output.get("data", {}):
        return True
    text = output.get("text", "")
    return output.output_type == "stream" and output.name == "stderr" and (not text.strip() or "%|" in text)


def _die_with(parent: int) -> None:
    """Leave at once when the process that started this one is gone. The kernel does the same by itself."""

    def watch():
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _main(folder: str, place: str, parent: str) -> None:
    _die_with(int(parent))
    run, name, title = Path(folder, place).parents[1], Path(place).name, place_title(place)
    job = json.loads(Path(folder, ".staging", "jobs.json").read_text(encoding="utf8"))["jobs"][place]
    print(f"{title} started", flush=True)
    try:
        done = complete_notebook(name, job["parameters"], run, job["digest"], job["force"])
        print(f"{title} finished in {done['seconds']:.1f} s", flush=True)
    except Exception as error:
        told, log = failure_path(name, run).exists(), run / "logs" / f"{name}.log"
        said = log.read_text(encoding="utf8").splitlines()[-1] if told else f"{type(error).__name__}: {error}"
        print(f"{title} failed: {said}" + (f"; log: {log}" if told else ""), flush=True)
        sys.exit(1)
    except KeyboardInterrupt:  # the front says that it was cut off
        sys.exit(130)


if __name__ == "__main__":
    _main(*sys.argv[1:])
