"""What runs with which parameters: the notebooks, profiles and grids, checked before anything starts."""

import ast
import hashlib
import itertools
import json
import re
from difflib import get_close_matches
from functools import cache
from pathlib import Path

import papermill
import yaml
from jsonschema import Draft202012Validator

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = ROOT / "notebooks"
PROFILES = ROOT / "workflow" / "profiles"
TYPES = {"int": int, "float": (int, float), "str": str, "bool": bool, "list": list, "dict": dict}
RANGES = yaml.safe_load((ROOT / "workflow" / "ranges.yaml").read_text(encoding="utf8"))
FOLDERS = r"(.+_)?model_ids?|sets|text_set|domains|images|(images|concepts|targets)_dir"  # what may name some
OWN = {"00_quickstart": {"model_id"}}  # names that elsewhere mean something else: not taken from what all get


def notebook_names() -> list[str]:
    """Return the names of the collection's notebooks in running order."""
    return sorted(path.stem for path in NOTEBOOKS.glob("[0-9]*.ipynb"))


def notebook_parameters(name: str) -> dict[str, str]:
    """Return the type, as written in its parameters cell, of each parameter of a notebook."""
    return {parameter: kind for parameter, (kind, _) in _inspect(name).items()}


def notebook_default(name: str, parameter: str):
    """Return a parameter's value in a notebook's own parameters cell, or None where it has no such one."""
    return ast.literal_eval(_inspect(name).get(parameter, ("", "None"))[1])


def load_profile(profile: str) -> dict[str, dict]:
    """Read workflow/profiles/`profile`.yaml, or a YAML file by path: {"all" or notebook: parameters}.

    Raises FileNotFoundError for a profile that does not exist, ValueError for one that is not such a mapping.
    """
    path = Path(profile) if profile.endswith((".yaml", ".yml")) else PROFILES / f"{profile}.yaml"
    if not path.is_file():
        names = [file.stem for file in PROFILES.glob("*.yaml")]
        raise FileNotFoundError(
            f"profile {profile!r} does not exist; {_nearest(profile, names)}; or give the path of a YAML file"
        )
    content = _read_yaml(path)
    if not isinstance(content, dict) or not all(isinstance(part or {}, dict) for part in content.values()):
        raise ValueError(f"{path.name} must map 'all' and notebook names to parameters")
    return {name: part or {} for name, part in content.items()}


def plan_run(profile: str, only: list[str] | None = None, overrides: dict | None = None) -> dict[str, dict]:
    """Return {notebook: parameters} in running order; names, types and ranges checked.

    Parameters under `all`, and overrides, go to each chosen notebook that has them; the quick start's
    model_id, which is a text model's, is given with `only` or in its own part of the profile. A relative
    folder that is found from the working directory alone becomes absolute, for notebooks run at the root.
    Raises ValueError for an unknown notebook or parameter (with the nearest name), or a value that cannot be.
    """
    content, overrides, plan = load_profile(profile), overrides or {}, {}
    shared = content.pop("all", {})
    known = {name: notebook_parameters(name) for name in notebook_names()}
    for name in [*(only or []), *content]:
        _check_known(name, known, "notebook")
    chosen = [name for name in known if not only or name in only]
    for given, names in ((shared, known), (overrides, chosen)):
        for parameter in given:
            _check_known(parameter, set().union(*(known[name] for name in names)), "parameter")
    for name in chosen:
        for parameter in content.get(name, {}):
            _check_known(parameter, known[name], f"parameter of {name}")
        apart = OWN.get(name, set()) if len(chosen) > 1 else set()
        first, last = ({k: v for k, v in part.items() if k not in apart} for part in (shared, overrides))
        values = {**first, **content.get(name, {}), **last}
        for parameter in (values := {key: value for key, value in values.items() if key in known[name]}):
            _check_value(name, parameter, values[parameter], known[name][parameter])
        _check_together(name, values)
        plan[name] = {key: _located(key, value) for key, value in values.items()}
    return plan


def plan_grid(path: str | Path) -> dict[str, dict]:
    """Return {run: {"plan": {notebook: parameters}, "varied": parameters}} of a YAML file that holds

    profile      that the runs begin with  [default: default]
    notebooks    names of those that run in each  [default: all]
    parameters   lists of values by parameter; every combination is a run
    runs         single runs beside the grid: a list of {notebooks: ..., parameters: {name: value}}

    A run is named by what varies and the hash of its plan, so that it keeps its folder when the grid grows.
    Raises FileNotFoundError or ValueError with the way out, as plan_run does.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"grid {str(path)!r} does not exist; give the path of a YAML file")
    keys = {"profile": str, "notebooks": list, "parameters": dict, "runs": list}
    content = _checked_part(_read_yaml(path), keys, path)
    product, singles = content.get("parameters", {}), content.get("runs", [])
    for parameter, values in product.items():
        if not isinstance(values, list) or not values:
            raise ValueError(f"{path.name}: {parameter!r} must be a list of values to try, not {values!r}")
    asked = [
        {"parameters": dict(zip(product, each, strict=True))} for each in itertools.product(*product.values())
    ]
    asked = (asked if product else []) + [
        _checked_part(single, {"notebooks": list, "parameters": dict}, path) for single in singles
    ]
    if not asked:
        raise ValueError(f"{path.name} is empty; name parameters with lists of values, or runs")
    runs = {}
    for part in asked:
        notebooks, varied = part.get("notebooks", content.get("notebooks")), part.get("parameters", {})
        try:
            plan = plan_run(content.get("profile", "default"), notebooks, varied)
        except ValueError as error:
            raise ValueError(f"{path.name}: {error}") from error
        runs[_run_name(varied, plan)] = {"plan": plan, "varied": varied}
    return runs


def read_value(text: str):
    """Return a value given on the command line, written as in YAML. Raises ValueError where it is not."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"value {text!r} is not valid YAML; quote it, as in -p name \"'[text'\"") from error


def _inspect(name: str) -> dict[str, tuple[str, str]]:
    """Return {parameter: (type, default as written)} of a notebook."""
    path = NOTEBOOKS / f"{name}.ipynb"
    return _inspect_file(path, path.stat().st_mtime_ns)


@cache
def _inspect_file(path: Path, changed: int) -> dict[str, tuple[str, str]]:
    found = papermill.inspect_notebook(path)
    return {parameter: (about["inferred_type_name"], about["default"]) for parameter, about in found.items()}


def _read_yaml(path: Path):
    try:
        return yaml.safe_load(path.read_text(encoding="utf8")) or {}
    except UnicodeDecodeError as error:
        raise ValueError(f"{path.name} is not valid YAML: it is no UTF-8 text") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}" if mark else str(error)
        raise ValueError(f"{path.name} is not valid YAML: {where}") from error


def _checked_part(part, types: dict, path: Path) -> dict:
    """Return a part of a grid without what is left empty; one notebook's name serves as a list of it."""
    if not isinstance(part, dict):
        raise ValueError(f"{path.name} must map some of {', '.join(types)} to their values, not be {part!r}")
    part = {key: value for key, value in part.items() if value is not None}
    if isinstance(part.get("notebooks"), str):
        part["notebooks"] = [part["notebooks"]]
    for key, value in part.items():
        _check_known(key, types, f"key of {path.name}")
        if not isinstance(value, types[key]):
            raise ValueError(f"{path.name}: {key!r} must be a {types[key].__name__}, not {value!r}")
    return part


def _run_name(varied: dict, plan: dict) -> str:
    words = ",".join(f"{name}={value}" for name, value in varied.items()) or ",".join(plan)
    digest = hashlib.sha256(json.dumps(plan, sort_keys=True, default=str).encode()).hexdigest()
    return f"{re.sub(r'[^A-Za-z0-9_.,=-]+', '_', words)[:60].strip('_')}-{digest[:8]}"


def _nearest(name, known) -> str:
    near = get_close_matches(str(name), known, n=1)
    return (f"did you mean {near[0]!r}? " if near else "") + f"known: {', '.join(sorted(known))}"


def _check_known(name: str, known, kind: str) -> None:
    if name not in known:
        raise ValueError(f"{kind} {name!r} is unknown; {_nearest(name, known)}")


def _check_value(notebook: str, name: str, value, kind: str) -> None:
    """Raise ValueError unless a value fits the annotated type of its parameter, and its range."""
    kind = kind.split("[")[0]
    if not isinstance(value, TYPES.get(kind, object)) or (
        isinstance(value, bool) and kind in ("int", "float")
    ):
        hint = f", such as '[{value}]'; in a grid, each of its values is a list" if kind == "list" else ""
        raise ValueError(f"parameter {name!r} must be {kind}, not {value!r}{hint}")
    at = (range for keys, range in RANGES.items() if re.fullmatch(keys, name) or keys == f"{notebook}.{name}")
    if not Draft202012Validator(allowed := next(at, {})).is_valid(value):
        must = allowed.get("description") or f"one of {', '.join(allowed['enum'])}"
        raise ValueError(f"parameter {name!r} of {notebook} must be {must}, not {value!r}")


def _check_together(notebook: str, values: dict) -> None:
    """Raise ValueError where parameters of a notebook, or its own values of them, do not go together."""
    names = ("n_selection", "n_samples", "sets", "model_ids")
    chosen, samples, sets, models = (values.get(name, notebook_default(notebook, name)) for name in names)
    if chosen and chosen >= samples:
        raise ValueError(
            f"parameter 'n_selection' of {notebook} must be below n_samples = {samples}, not {chosen}"
        )
    if sets and models and len(models) not in (1, len(sets)):
        raise ValueError(
            f"parameter 'model_ids' of {notebook} must name one for all {len(sets)} sets, or one for each"
        )


def _located(name: str, value):
    """Return a value with the folders that only the working directory leads to made absolute."""
    if isinstance(value, list):
        return [_located(name, each) for each in value]
    if not re.fullmatch(FOLDERS, name) or not isinstance(value, str) or Path(value).is_absolute():
        return value
    is_set = name in ("sets", "text_set", "domains")  # which a bare name is more likely the name of
    path = Path(value.removesuffix("_short") if is_set and not Path(value).is_dir() else value)
    here = (path.is_dir() and ("/" in value or not is_set)) or (name == "images" and path.is_file())
    return str(Path.cwd() / value) if here and path.resolve() != (ROOT / path).resolve() else value
