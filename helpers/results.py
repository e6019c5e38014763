"""What a notebook leaves behind, and what it reads of the earlier ones: pictures, tables, records, numbers.

Every notebook has a folder of its own name below `figures_dir`; its headline numbers are in results.json
there.
"""

import json
from pathlib import Path

import pandas as pd

from helpers.paths import PROJECT_ROOT, project_path


def results_folder(figures_dir: str | Path, notebook: str) -> Path:
    """Return where a notebook leaves its results: the folder of its name below `figures_dir`, made if need
    be.
    """
    folder = project_path(figures_dir) / notebook
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def find_results(figures_dir: str | Path, notebook: str, file: str = "results.json") -> Path:
    """Return the folder of an earlier notebook's results, and say whose they are.

    Those below `figures_dir` come first, then those of the default run, then the committed ones. Raises
    FileNotFoundError, with the command that makes them, where none of these holds `file`.
    """
    places = {
        "this run": project_path(figures_dir),
        "the default run": PROJECT_ROOT / "runs" / "default" / "figures",
        "the committed figures": PROJECT_ROOT / "figures",
    }
    for said, figures in places.items():
        folder = figures / notebook
        if (folder / file).exists():
            print(f"{notebook}: results of {said}")
            return folder
    raise FileNotFoundError(
        f"there is no {file} of {notebook}; run that notebook first, by hand or as "
        f"`attention run --only {notebook}` with the profile and --output of this run"
    )


def save_figure(figure, folder: Path, name: str) -> None:
    """Write `figure` as PNG for reading and PDF for print into `folder`."""
    figure.savefig(folder / f"{name}.png", dpi=200, bbox_inches="tight", metadata={"Software": None})
    figure.savefig(folder / f"{name}.pdf", bbox_inches="tight", metadata={"CreationDate": None})


def save_table(table: pd.DataFrame, folder: Path, name: str) -> None:
    """Write a DataFrame as CSV into `folder`."""
    table.to_csv(folder / f"{name}.csv", float_format="%.6g")


def save_records(records: pd.DataFrame, folder: Path, name: str) -> None:
    """Write a DataFrame with one line an input, or a token, as parquet into `folder` for other notebooks."""
    records.to_parquet(folder / f"{name}.parquet", index=False, compression="zstd")


def save_results(results: dict, folder: Path) -> Path:
    """Write the headline numbers of a notebook to results.json in its folder and return that path."""
    path = folder / "results.json"
    path.write_text(json.dumps(results, indent=2, allow_nan=False) + "\n", encoding="utf8")
    return path


def load_results(folder: Path, **expected) -> dict:
    """Read the headline numbers in a notebook's folder, made with the `expected` parameters.

    Raises ValueError where they were made with other ones, or the file is damaged; it says how to make them.
    """
    path = folder / "results.json"
    try:
        results = json.loads(path.read_text(encoding="utf8"))
    except ValueError as error:
        raise ValueError(
            f"{folder.name}/{path.name} is damaged ({error}); run {folder.name} again"
        ) from error
    differing = {key: value for key, value in expected.items() if results.get(key) != value}
    if differing:
        found = ", ".join(f"{key} {results.get(key)!r} and not {value!r}" for key, value in differing.items())
        raise ValueError(
            f"the results of {folder.name} were made with {found}; run it and this notebook with the same "
            f"parameters"
        )
    return results
