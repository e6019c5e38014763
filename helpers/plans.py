"""What runs with which parameters: the collection, profiles and the grids of sweeps, checked before anything
starts.
"""

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

from helpers.places import PROJECT_ROOT

NOTEBOOKS = PROJECT_ROOT / "notebooks"
PROFILES = PROJECT_ROOT / "data" / "profiles"
TYPES = {"int": int, "float": (int, float), "str": str, "bool": bool, "list": list, "dict": dict}


def notebook_names() -> list[str]:
    """Return the names of the collection's notebooks in running order."""
    return sorted(path.stem for path in NOTEBOOKS.glob("[0-9]*.ipynb"))


def notebook_parameters(name: str) -> dict[str, str]:
    """Return the type, as written in its parameters cell, of each parameter of a notebook."""
    path = NOTEBOOKS / f"{name}.ipynb"
    return {parameter: kind for parameter, (kind, _) in _inspect(path, path.stat().st_mtime_ns).items()}


def notebook_default(name: str, parameter: str):
    """Return the value that a notebook's own parameters cell gives to a parameter, or None where it has no
    such one.
    """
    path = NOTEBOOKS / f"{name}.ipynb"
    _, written = _inspect(path, path.stat().st_mtime_ns).get(parameter, ("", "None"))
    return ast.literal_eval(written)


def load_profile(profile: str) -> dict[str, dict]:
    """Read data/profiles/`profile`.yaml, or a YAML file by path: parameters under `all` and under notebook
    names.

    Raises FileNotFoundError for a profile that does not exist, ValueError for one that is not such a mapping.
    """
    path = Path(profile) if profile.endswith((".yaml", ".yml")) else PROFILES / f"{profile}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in PROFILES.glob("*.yaml")))
        raise FileNotFoundError(
            f"profile {profile!r} does not exist; use one of {known}, or the path of a YAML file"
        )
    content = _read_yaml(path)
    if not isinstance(content, dict) or not all(isinstance(part or {}, dict) for part in content.values()):
        raise ValueError(f"{path.name} must map 'all' and notebook names to parameters")
    return {name: part or {} for name, part in content.items()}


def plan_run(profile: str, only: list[str] | None = None, overrides: dict | None = None) -> dict[str, dict]:
    """Return {notebook: parameters} in running order, every name and type checked before anything starts.

    Parameters under `all`, and overrides, go to each chosen notebook that has them.
    Raises ValueError for an unknown notebook or parameter (with the nearest name), or a value of another
    type.
    """
    content, names, overrides = load_profile(profile), notebook_names(), overrides or {}
    for name in [*(only or []), *(key for key in content if key != "all")]:
        _check_known(name, names, "notebook")
    chosen = [name for name in names if not only or name in only]
    types = {name: notebook_parameters(name) for name in chosen}
    known_by_any = {parameter for found in types.values() for parameter in found}
    for parameter in content.get("all", {}):
        _check_known(parameter, {known for name in names for known in notebook_parameters(name)}, "parameter")
    for parameter in overrides:
        _check_known(parameter, known_by_any, "parameter")
    plan = {}
    for name in chosen:
        shared = {key: value for key, value in content.get("all", {}).items() if key in types[name]}
        own = content.get(name, {})
        for parameter in own:
            _check_known(parameter, types[name], f"parameter of {name}")
        given = {key: value for key, value in overrides.items() if key in types[name]}
        plan[name] = {
            key: _checked(key, value, types[name][key]) for key, value in {**shared, **own, **given}.items()
        }
    return plan


def plan_sweep(grid: str | Path) -> dict[str, dict]:
    """Return {run: {"plan": {notebook: parameters}, "varied": parameters}} of a YAML file that holds

    profile      that the runs begin with  [default: default]
    notebooks    names of those that run in each  [default: all]
    parameters   lists of values by parameter; every combination is a run
    runs         single runs beside the grid: a list of {notebooks: ..., parameters: {name: value}}

    A run is named by what varies and the hash of its plan, so that it keeps its folder when the grid grows.
    Raises FileNotFoundError or ValueError with the way out, as plan_run does.
    """
    path = Path(grid)
    if not path.is_file():
        raise FileNotFoundError(f"grid {str(grid)!r} does not exist; give the path of a YAML file")
    keys = {"profile": str, "notebooks": list, "parameters": dict, "runs": list}
    content = _checked_part(_read_yaml(path), keys, path)
    product = content.get("parameters", {})
    for parameter, values in product.items():
        if not isinstance(values, list) or not values:
            raise ValueError(f"{path.name}: {parameter!r} must be a list of values to try, not {values!r}")
    combinations = [
        dict(zip(product, values, strict=True)) for values in itertools.product(*product.values())
    ]
    asked = [(content.get("notebooks"), varied) for varied in combinations if varied]
    for single in content.get("runs", []):
        part = _checked_part(single, {"notebooks": list, "parameters": dict}, path)
        asked.append((part.get("notebooks", content.get("notebooks")), part.get("parameters", {})))
    if not asked:
        raise ValueError(f"{path.name} is empty; name parameters with lists of values, or runs")
    runs = {}
    for notebooks, varied in asked:
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


@cache
def _inspect(path: Path, changed: int) -> dict[str, tuple[str, str]]:
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


def _check_known(name: str, known, kind: str) -> None:
    if name not in known:
        near = get_close_matches(str(name), known, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"{kind} {name!r} is unknown; {hint}known: {', '.join(sorted(known))}")


def _checked(name: str, value, kind: str):
    """Return the value if it fits the annotated type of its parameter; an int serves as a float."""
    kind = kind.split("[")[0]
    if not isinstance(value, TYPES.get(kind, object)) or (
        isinstance(value, bool) and kind in ("int", "float")
    ):
        hint = "; in a grid, each of its values is a list of its own" if kind == "list" else ""
        raise ValueError(f"parameter {name!r} must be {kind}, not {value!r}{hint}")
    return value
