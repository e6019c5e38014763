"""Runs at a URL that fsspec knows: executed in a local folder, which mirrors what is finished there."""

import hashlib
from contextlib import suppress
from pathlib import Path

import fsspec

from workflow.parameters import ROOT
from workflow.provenance import earlier_notebooks, is_finished, plan_digests, read_provenance


def is_url(output: str) -> bool:
    """Tell whether an output is a URL, such as s3://bucket/runs."""
    return "://" in output


def mirror_folder(url: str) -> Path:
    """Return the local folder of what runs at a URL. Raises ValueError where nothing here can write to it."""
    try:
        fsspec.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise ValueError(f"output {url!r} cannot be used: {error}") from error
    return ROOT / "runs" / "staging" / hashlib.sha256(url.rstrip("/").encode()).hexdigest()[:16]


def pull(url: str, folder: Path, runs: dict[str, dict]) -> None:
    """Fetch what is finished at a URL of `runs`, and of what they read from, unless it is here already."""
    fs, root = fsspec.url_to_fs(url)
    with suppress(FileNotFoundError):
        _get(fs, f"{root}/plan.json", folder / "plan.json")
    for run, about in runs.items():
        place, far = folder / run, root if run == "." else f"{root}/{run}"
        digests = plan_digests(about["plan"], place)
        for name in {*digests, *(other for reader in digests for other in earlier_notebooks(reader))}:
            here = read_provenance(name, place)
            if here and is_finished(name, digests.get(name, here["digest"]), place):
                continue
            record = f"figures/{name}/provenance.json"
            with suppress(
                FileNotFoundError
            ):  # as it is where something is lost: then the notebook runs again
                _get(fs, f"{far}/{record}", place / record)
                for path in (read_provenance(name, place) or {"files": {}})["files"]:
                    _get(fs, f"{far}/{path}", place / path)


def push(url: str, folder: Path, runs: dict[str, dict]) -> None:
    """Bring to a URL what of `runs` it has not as it is here, the provenance of each notebook last."""
    fs, root = fsspec.url_to_fs(url)
    for run, about in runs.items():
        place, far = folder / run, root if run == "." else f"{root}/{run}"
        for name in about["plan"]:
            files = [
                *(read_provenance(name, place) or {"files": {}})["files"],
                f"figures/{name}/provenance.json",
            ]
            sizes = {path: file["size"] for path, file in fs.find(far, detail=True).items()}
            logs = (
                [f"logs/{name}.log", f"logs/{name}.ipynb"]
                if (place / "logs" / f"{name}.log").exists()
                else []
            )
            for path in [*files[:-1], *logs, files[-1]]:
                _put(fs, place / path, f"{far}/{path}", sizes)
            for path in fs.find(f"{far}/figures/{name}"):
                if path.removeprefix(f"{far}/") not in files:
                    fs.rm_file(path)
    for name in ("metrics.csv", "plan.json"):
        _put(fs, folder / name, f"{root}/{name}", {})


def _get(fs, far: str, here: Path) -> None:
    here.parent.mkdir(parents=True, exist_ok=True)
    fs.get_file(far, str(here))


def _put(fs, here: Path, far: str, sizes: dict) -> None:
    small = here.suffix in (".json", ".log", ".csv")
    if not here.exists():
        with suppress(FileNotFoundError):
            fs.rm_file(far)
    elif small or sizes.get(far) != here.stat().st_size:
        fs.makedirs(far.rpartition("/")[0], exist_ok=True)
        fs.put_file(str(here), far)
