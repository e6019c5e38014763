"""Where things are: the project root, its cache, and the folders and hub names that parameters ask for."""

from pathlib import Path

PROJECT_ROOT = Path(__file__).resolve().parents[1]
CACHE = PROJECT_ROOT / "data" / "cache"
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
    """Return where an input is: in the working directory if it is there, else below the project root."""
    given = Path(path).expanduser()
    return given.resolve() if given.exists() else PROJECT_ROOT / given


def local_folder(name: str) -> Path | None:
    """Return the folder that a name stands for, from the working directory or the project root, or None."""
    return folder if (folder := local_path(name)).is_dir() else None
