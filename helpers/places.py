"""Where things are: the project root, and the folders and hub names that parameters ask for."""

from pathlib import Path

PROJECT_ROOT = Path(__file__).resolve().parents[1]
HUB_SETS = {  # name: hub id
    "sst2": "stanfordnlp/sst2",
    "imdb": "stanfordnlp/imdb",
    "ag_news": "fancyzhx/ag_news",
}
SENTENCE_SETS = ("movies", "amazon", "nyt", "tweets", "movies_short", *HUB_SETS, "sst2_short")


def project_path(path: str | Path) -> Path:
    """Return where an output goes: `path` as it is when absolute, else below the project root."""
    return PROJECT_ROOT / Path(path).expanduser()


def local_path(path: str | Path) -> Path:
    """Return the place of an input: from the working directory where it is there, else as `project_path`."""
    here = Path(path).expanduser().absolute()
    return here if here.exists() else project_path(path)


def local_folder(name: str) -> Path | None:
    """Return the folder that a name stands for, from the working directory or the project root, or None."""
    path = local_path(name)
    return path if path.is_dir() else None
