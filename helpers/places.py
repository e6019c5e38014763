"""Where things are: the project root, and the folders and hub names that parameters ask for."""

from collections.abc import Iterator
from pathlib import Path

PROJECT_ROOT = Path(__file__).resolve().parents[1]
HUB_SETS = {  # name: hub id
    "sst2": "stanfordnlp/sst2",
    "imdb": "stanfordnlp/imdb",
    "ag_news": "fancyzhe/ag_news",
}
NAMING = {  # parameters of notebooks that name what a hub may have
    "model_ids": "model",
    "model_id": "model",
    "image_model_id": "model",
    "text_model_id": "model",
    "sets": "set",
    "text_set": "set",
}
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors")
FOLDERS = ("images_dir", "concepts_dir", "targets_dir")  # parameters that name folders of images


def project_path(path: str | Path) -> Path:
    """Return `path` as it is when absolute, else below the project root, whatever the working directory."""
    return PROJECT_ROOT / Path(path).expanduser()


def local_folder(name: str) -> Path | None:
    """Return the folder that a name stands for, from the working directory or the project root, or None."""
    return next((path for path in (Path(name).expanduser(), project_path(name)) if path.is_dir()), None)


def check_at_hand(plan: dict[str, dict]) -> None:
    """Check, before anything starts, that what a plan {notebook: parameters} names is here or can be fetched.

    Raises ConnectionError for models and sets that are neither folders nor in the hub's cache while the hub
    cannot be reached, FileNotFoundError where folders of images are not there; either names all that is
    missing, and the way out.
    """
    asked = {}  # {(kind, name): where it is asked for}
    for notebook, parameters in plan.items():
        for parameter, value in parameters.items():
            for what in _elsewhere(parameter, value):
                asked.setdefault(what, []).append(f"{parameter} of {notebook}")
    listed = {what: f"\n  {' '.join(what)} ({', '.join(places)})" for what, places in sorted(asked.items())}
    absent = "".join(line for (kind, _), line in listed.items() if kind == "folder")
    missing = "".join(line for what, line in listed.items() if what[0] != "folder" and not _is_cached(*what))
    unreachable = (
        missing
        and (reason := _out_of_reach())
        and (
            f"the model hub cannot be reached ({reason}), and these are neither local folders nor in its cache:{missing}\n"
            "Where there is a network: `hf download NAME --local-dir FOLDER`, for a set with `--repo-type dataset`. Then "
            "give the folders in place of the names, in a profile or as in -p model_ids '[FOLDER, ...]'; FOLDER_short still "
            "stands for the short texts of a set"
        )
    )
    if absent:
        raise FileNotFoundError(
            f"these folders of images do not exist:{absent}\n"
            "Name your own there; those of the paper profile are made by `python data/paper_images.py`"
            + (f"\nAnd {unreachable}" if unreachable else "")
        )
    if unreachable:
        raise ConnectionError(unreachable)


def _elsewhere(parameter: str, value) -> Iterator[tuple[str, str]]:
    """Yield (kind, name) of each hub id, and of each absent folder, that a parameter's value names."""
    kind = "folder" if parameter in FOLDERS else NAMING.get(parameter)
    for name in value if isinstance(value, list) else [value]:
        if not kind or not name or not isinstance(name, str) or project_path(name).is_dir():
            continue
        if kind == "set":
            name = name.removesuffix("_short")
            name = HUB_SETS.get(name, name)
            if project_path(name).is_dir():
                continue
        if kind == "folder" or ("/" in name and not name.startswith((".", "/", "~", "data/"))):
            yield kind, name  # other names, and paths that lead nowhere, are for the notebook to refuse


def _is_cached(kind: str, name: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    if kind == "model":
        return any(isinstance(try_to_load_from_cache(name, file), str) for file in WEIGHTS)
    from datasets import config, naming  # seconds, which a run without sets of a hub does not wait for

    owner, _, own_name = name.rpartition("/")
    return Path(config.HF_DATASETS_CACHE, f"{owner}___{naming.camelcase_to_snakecase(own_name)}").is_dir()


def _out_of_reach() -> str:
    """Return why the hub cannot be reached, or nothing where it can."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except Exception as error:  # whatever the network or a proxy says
        return " ".join(str(error).split()) or type(error).__name__
    return ""
