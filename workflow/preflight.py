"""Is what a plan names at hand? Models, sets and folders of images are looked up before anything starts."""

import json
import os
import re
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path

from huggingface_hub import HfApi, constants, try_to_load_from_cache
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import get_session

from helpers.paths import HUB_SETS, SENTENCE_SETS, local_folder, local_path

NAMED = {  # what parameters of notebooks name
    r"00_quickstart\.model_id|model_ids|text_model_id": "text model",
    "model_id|image_model_id": "image model",
    "sets|text_set|domains": "set",
    "(images|concepts|targets)_dir": "folder",
    "images": "image",
}
READERS = {  # what comes with the weights of a model: its two loaders, files of the second, and their names
    "text model": (
        *("AutoModelForSequenceClassification", "AutoTokenizer"),
        *(r"tokenizer\.json|vocab\.(txt|json)|.+\.model", "tokenizer files (tokenizer.json or vocab.txt)"),
    ),
    "image model": (
        *("AutoModelForImageClassification", "AutoImageProcessor"),
        *(r"(pre)?processor_config\.json", "preprocessor_config.json"),
    ),
}
INDEX = "model.safetensors.index.json"
WEIGHTS = {"model.safetensors", INDEX, "adapter_model.safetensors", "head.safetensors"}
RECIPE = """; pickled weights are not read. Where you trust them, convert them and give FOLDER instead:
    python -c "from transformers import {} as M, {} as R; \
[part.from_pretrained({!r}).save_pretrained('FOLDER') for part in (M, R)]\""""
UNREACHABLE = """
The hub cannot be reached ({}). Where there is a network: `hf download NAME --local-dir FOLDER`, \
for a set with `--repo-type dataset`. Then give the folders in place of the names, in a profile or as in \
-p model_ids '[FOLDER, ...]'; FOLDER_short still stands for the short texts of a set"""
AWAY = "is neither a local folder nor in the hub's cache"
SECONDS = 5  # that the hub has for an answer


def check_at_hand(plan: dict[str, dict]) -> None:
    """Check that what a plan {notebook: parameters} names is here, in the cache, or to be had from the hub.

    Where all of it is here and the hub does not answer, HF_HUB_OFFLINE is set for what this process starts:
    loading from the cache would otherwise wait minutes for the hub.
    Raises FileNotFoundError that lists all names that cannot be used, where each is asked for, why, and what
    to do; ConnectionError where all that is wrong is that the hub does not answer.
    """
    asked = {}  # {(kind, name): where it is asked for, each once}
    for notebook, parameters in plan.items():
        for parameter, value in parameters.items():
            for what in _named(notebook, parameter, value):
                asked.setdefault(what, {})[f"{parameter} of {notebook}"] = None
    of_hub = {what for what in asked if _is_of_hub(*what)}
    missing = {what for what in of_hub if not _is_cached(*what)}
    closed = _out_of_reach() if of_hub else ""
    if closed and not missing:
        os.environ["HF_HUB_OFFLINE"] = "1"
    wrong = {what: _wrong_here(*what) for what in asked.keys() - of_hub}
    wrong |= {what: AWAY if closed else _wrong_on_hub(*what) for what in missing}
    wrong = {what: wrong[what] for what in sorted(wrong) if wrong[what]}
    if wrong:
        found = [
            f"\n  {kind} {name} ({', '.join(asked[kind, name])}) {wrong[kind, name]}" for kind, name in wrong
        ]
        advice = UNREACHABLE.format(closed) if closed and missing else ""
        if any(kind == "folder" and "cache/paper" in name for kind, name in wrong):
            advice += "\nThe images of the paper profile are gathered by `python data/paper_images.py`"
        error = ConnectionError if set(wrong.values()) == {AWAY} else FileNotFoundError
        raise error(f"{len(wrong)} of {len(asked)} names cannot be used:{''.join(found)}{advice}")


def _named(notebook: str, parameter: str, value) -> Iterator[tuple[str, str]]:
    """Yield (kind, name) of what a parameter's value names; a set by its hub id, where it has one."""
    asked = f"{notebook.split()[0]}.{parameter}", parameter
    found = (NAMED[names] for name in asked for names in NAMED if re.fullmatch(names, name))
    kind = next(found, None)
    for name in value if isinstance(value, list) else [value]:
        if kind == "set" and name and not local_folder(name):
            name = name.removesuffix("_short")
            name = name if local_folder(name) else HUB_SETS.get(name, name)
        if kind and name:
            yield kind, name


def _is_of_hub(kind: str, name: str) -> bool:
    """Return whether a name is a hub id, by its looks, and no folder of that name is here."""
    is_path = name.startswith((".", "/", "~", "data/")) or name.count("/") > 1
    is_bare_set = kind == "set" and "/" not in name
    return kind not in ("folder", "image") and not (is_path or is_bare_set or local_folder(name))


def _wrong_here(kind: str, name: str) -> str:
    """Return what is wrong with a name that no hub is asked for, or nothing."""
    if kind == "image":
        return "" if local_path(name).exists() else "does not exist; give files, or folders of them"
    if folder := local_folder(name):
        return _lacking(kind, name, _files(folder))
    if local_path(name).is_file():
        return "is a file; give the folder that it is in"
    if kind != "set" or "/" in name:
        return "does not exist; give a folder" + ("" if kind == "folder" else ", or a hub id")
    near = get_close_matches(name, SENTENCE_SETS, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    known = f"{hint}use one of {', '.join(SENTENCE_SETS)}, a hub id or a folder"
    return "" if name in SENTENCE_SETS else f"is unknown; {known}"


def _out_of_reach() -> str:
    """Return why the hub cannot be reached, or nothing where it can."""
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        get_session().head(constants.ENDPOINT, timeout=SECONDS)
    except Exception as error:  # whatever a network or a proxy says
        return " ".join(str(error).split()) or type(error).__name__
    return ""


def _wrong_on_hub(kind: str, name: str) -> str:
    """Return what is wrong with a name by what the hub says of it, or nothing."""
    api, repo_type = HfApi(), "dataset" if kind == "set" else "model"
    try:
        about = api.repo_info(name, repo_type=repo_type, timeout=SECONDS)
        if about.gated:
            api.auth_check(name, repo_type=repo_type)
        return _lacking(kind, name, {file.rfilename for file in about.siblings or ()})
    except GatedRepoError:
        page = f"{constants.ENDPOINT}/{'datasets/' if kind == 'set' else ''}{name}"
        return f"is gated; accept its terms at {page}, then log in with `hf auth login`"
    except RepositoryNotFoundError:
        return "does not exist on the hub, or is private; check the spelling, or log in with `hf auth login`"
    except HFValidationError:
        return "is neither a folder nor what a hub takes for a name"
    except Exception as error:  # an answer that says no more, or none after all
        said = str(error).strip().splitlines() or [type(error).__name__]
        return f"cannot be had now ({said[0]}); try again, perhaps after `hf auth login`"


def _files(folder: Path) -> set[str]:
    """Return the names of a folder's files, without an index of weights that are not all there."""
    files = {path.name for path in folder.iterdir() if path.is_file()}
    if INDEX in files:
        try:
            parts = json.loads((folder / INDEX).read_text(encoding="utf8"))["weight_map"].values()
        except (ValueError, KeyError):
            parts = ["a list that can be read"]
        files -= {INDEX} if set(parts) - files else set()
    return files


def _lacking(kind: str, name: str, files: set[str]) -> str:
    """Return what the files of a model lack, with the recipe for pickled weights, or nothing."""
    if kind not in READERS:
        return ""
    *loaders, pattern, what = READERS[kind]
    needed = {"config.json": "config.json" in files, "model.safetensors": files & WEIGHTS}
    needed[what] = any(re.fullmatch(pattern, file) for file in files) or "adapter_config.json" in files
    lacks = [file for file, found in needed.items() if not found]
    pickled = any(re.fullmatch(r"pytorch_model.*\.bin", file) for file in files)
    recipe = RECIPE.format(*loaders, name) if pickled and "model.safetensors" in lacks else ""
    return f"has no {' and no '.join(lacks)}{recipe}" if lacks else ""


def _is_cached(kind: str, name: str) -> bool:
    """Return whether all that loading reads is cached: a model's files, a finished build of a set."""
    if kind in READERS:
        try:
            config = try_to_load_from_cache(name, "config.json")
        except HFValidationError:
            return False
        return isinstance(config, str) and not _lacking(kind, name, _files(Path(config).parent))
    root = Path(
        os.environ.get("HF_DATASETS_CACHE", Path(constants.HF_HOME, "datasets"))
    )  # as datasets has it
    own = [folder for folder in root.glob("*___*") if _plain(folder.name) == _plain(name)]
    builds = [info.parent for folder in own for info in folder.glob("*/*/*/dataset_info.json")]
    return any(build.suffix != ".incomplete" for build in builds)


def _plain(name: str) -> str:
    """Return a set's name as neither capitals nor what divides words can change it, as its cache does."""
    return re.sub("[/_]", "", name).lower()
