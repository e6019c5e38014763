"""Is what a plan names at hand? Its models, sets and folders of images are looked up before anything starts."""

import json
import re
from difflib import get_close_matches
from pathlib import Path

from huggingface_hub import HfApi, constants, try_to_load_from_cache
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError

from helpers.places import local_folder

NAMED = {  # what parameters of notebooks name
    "model_ids|text_model_id": "text model",
    "model_id|image_model_id": "image model",
    "sets|text_set": "set",
    "(images|concepts|targets)_dir": "folder",
}
LOADERS = {
    "text model": ("AutoModelForSequenceClassification", "AutoTokenizer"),
    "image model": ("AutoModelForImageClassification", "AutoImageProcessor"),
}
INDEX = "model.safetensors.index.json"
READERS = {  # one of these files beside the weights, and what it is
    "text model": (
        r"tokenizer\.json|vocab\.(txt|json)|.*\.model",
        "tokenizer files (tokenizer.json or vocab.txt)",
    ),
    "image model": (r"(pre)?processor_config\.json", "preprocessor_config.json"),
}
SECONDS = 5  # that the hub has for an answer


def check_at_hand(plan: dict[str, dict]) -> None:
    """Check that what a plan {notebook: parameters} names is here, in the cache, or to be had from the hub.

    Raises FileNotFoundError that lists all names that cannot be used, where each is asked for, why, and what
    to do; ConnectionError where all that is wrong is that the hub does not answer.
    """
    asked, findings, closed = {}, [], "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else ""
    for notebook, parameters in plan.items():
        for parameter, value in parameters.items():
            for what in _named(parameter, value):
                asked.setdefault(what, {})[f"{parameter} of {notebook}"] = None
    out_of_reach = set()
    for kind, name in sorted(asked):
        try:
            found = _look_up(kind, name, closed)
        except ConnectionError as error:
            found, closed = "is neither a local folder nor in the hub's cache", str(error)
            out_of_reach.add(name)
        if found:
            findings.append(f"{kind} {name} ({', '.join(asked[kind, name])}): {found}")
    if not findings:
        return
    advice = [f"\n  {finding}" for finding in findings]
    if out_of_reach:
        advice.append(
            f"\nThe model hub cannot be reached ({closed}). Where there is a network: `hf download NAME --local-dir "
            "FOLDER`, for a set with `--repo-type dataset`. Then give the folders in place of the names, in a profile "
            "or as in -p model_ids '[FOLDER, ...]'; FOLDER_short still stands for the short texts of a set"
        )
    if any(kind == "folder" for kind, _ in asked) and any(line.startswith("folder ") for line in findings):
        advice.append("\nThe images of the paper profile are gathered by `python data/paper_images.py`")
    kind_of_error = ConnectionError if len(out_of_reach) == len(findings) else FileNotFoundError
    raise kind_of_error(f"{len(findings)} of {len(asked)} names cannot be used:" + "".join(advice))


def _named(parameter: str, value):
    """Yield (kind, name) of what a parameter's value names; sets by their hub id, where they have one."""
    kind = next((kind for names, kind in NAMED.items() if re.fullmatch(names, parameter)), None)
    for name in value if isinstance(value, list) else [value]:
        if not kind or not name or not isinstance(name, str):
            continue
        if kind == "set":
            from helpers.data import HUB_SETS  # seconds, which a run without sets does not wait for

            name = name if local_folder(name) else name.removesuffix("_short")
            name = name if local_folder(name) else HUB_SETS.get(name, name)
        yield kind, name


def _look_up(kind: str, name: str, closed: str) -> str:
    """Return what is wrong with a name, or nothing. Raises ConnectionError where only the hub could tell.

    closed  why the hub is not asked; empty where it may be
    """
    folder = local_folder(name)
    if kind == "folder" or name.startswith((".", "/", "~", "data/")) or name.count("/") > 1:
        missing = "" if folder else "there is no such folder"
        return missing or (_lacking(kind, name, _files(folder)) if kind in LOADERS else "")
    if folder:
        return _lacking(kind, name, _files(folder)) if kind in LOADERS else ""
    if kind == "set" and "/" not in name:
        return _unknown_set(name)
    try:
        if _is_cached(kind, name):
            return ""
        if closed:
            raise ConnectionError(closed)
        return _ask_hub(kind, name)
    except HFValidationError:
        return "there is no such folder, and no hub has such a name"


def _ask_hub(kind: str, name: str) -> str:
    api, repo_type = HfApi(), "dataset" if kind == "set" else "model"
    page = f"{constants.ENDPOINT}/{'datasets/' if kind == 'set' else ''}{name}"
    try:
        about = api.repo_info(name, repo_type=repo_type, timeout=SECONDS)
        if about.gated:
            api.auth_check(name, repo_type=repo_type)
    except GatedRepoError:
        return f"is gated; accept its terms at {page}, then log in with `hf auth login`"
    except RepositoryNotFoundError:
        return "does not exist on the hub, or is private and asks for `hf auth login`; check the spelling"
    except HfHubHTTPError as error:
        said = error.server_message or error.response.reason_phrase
        return f"the hub answers {error.response.status_code} ({said}); try later, or after `hf auth login`"
    except HFValidationError:
        raise
    except Exception as error:  # whatever a network or a proxy says
        raise ConnectionError(" ".join(str(error).split()) or type(error).__name__) from error
    return _lacking(kind, name, {file.rfilename for file in about.siblings or []}) if kind in LOADERS else ""


def _files(folder: Path) -> set[str]:
    """Return the names of a folder's files, without an index of weights that are not all there."""
    files = {path.name for path in folder.iterdir() if path.is_file()}
    if INDEX in files:
        try:
            parts = set(json.loads((folder / INDEX).read_text(encoding="utf8"))["weight_map"].values())
        except (ValueError, KeyError):
            parts = {INDEX + " that can be read"}
        files -= {INDEX} if parts - files else set()
    return files


def _lacking(kind: str, name: str, files: set[str]) -> str:
    """Return what a model's files lack, with the recipe that converts its pickled weights where it has some."""
    model, reader = LOADERS[kind]
    adapter = "adapter_config.json" in files  # which brings the tokenizer of its base
    pattern, what = READERS[kind]
    lacks = [] if "config.json" in files or adapter else ["config.json"]
    if not adapter and not any(re.fullmatch(pattern, file) for file in files):
        lacks.append(what)
    if not files & {"model.safetensors", INDEX, "adapter_model.safetensors"}:
        lacks.append("model.safetensors")
    if not lacks:
        return ""
    recipe = ""
    if lacks == ["model.safetensors"] and any(re.fullmatch(r"pytorch_model.*\.bin", file) for file in files):
        recipe = (
            "; pickled weights are not read. Where you trust them, convert them once and give FOLDER in place of the "
            f'name:\n    python -c "from transformers import {model} as M, {reader} as R; '
            f"[part.from_pretrained({name!r}).save_pretrained('FOLDER') for part in (M, R)]\""
        )
    return f"has no {' and no '.join(lacks)}{recipe}"


def _is_cached(kind: str, name: str) -> bool:
    """Return whether all that loading reads is in the cache: the files of a model, a finished build of a set."""
    if kind in LOADERS:
        config = try_to_load_from_cache(name, "config.json")
        return isinstance(config, str) and not _lacking(kind, name, _files(Path(config).parent))
    from datasets import config, naming

    owner, _, own_name = name.rpartition("/")
    folder = Path(config.HF_DATASETS_CACHE, f"{owner}___{naming.camelcase_to_snakecase(own_name)}")
    return any(
        not info.parent.name.endswith(".incomplete") for info in folder.glob("*/*/*/dataset_info.json")
    )


def _unknown_set(name: str) -> str:
    from helpers.data import SENTENCE_SETS

    if name in SENTENCE_SETS:
        return ""
    near = get_close_matches(name, SENTENCE_SETS, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"is unknown; {hint}use one of {', '.join(SENTENCE_SETS)}, a hub id, or a folder as ./{name}"
