"""Run the notebooks in order through papermill: `python -m helpers.pipeline run --profile default`."""

import base64
import io
import tempfile
from difflib import get_close_matches
from pathlib import Path

import click
import nbformat
import papermill
import yaml
from PIL import Image
from papermill.exceptions import PapermillExecutionError

from helpers.runtime import PROJECT_ROOT, project_path

NOTEBOOKS = PROJECT_ROOT / "notebooks"
PROFILES = PROJECT_ROOT / "data" / "profiles"
FIGURES = PROJECT_ROOT / "figures"
WIDGET = "application/vnd.jupyter.widget-view+json"


def notebook_names() -> list[str]:
    """Return the names of the collection's notebooks in running order."""
    return sorted(path.stem for path in NOTEBOOKS.glob("[0-9]*.ipynb"))


def notebook_parameters(name: str) -> dict[str, str]:
    """Return the type, as written in its parameters cell, of each parameter of a notebook."""
    found = papermill.inspect_notebook(NOTEBOOKS / f"{name}.ipynb")
    return {parameter: about["inferred_type_name"] for parameter, about in found.items()}


def load_profile(profile: str) -> dict[str, dict]:
    """Read data/profiles/`profile`.yaml, or a YAML file by path: parameters under `all` and under notebook names.

    Raises FileNotFoundError for a profile that does not exist, ValueError for one that is not such a mapping.
    """
    path = Path(profile) if profile.endswith((".yaml", ".yml")) else PROFILES / f"{profile}.yaml"
    if not path.exists():
        known = ", ".join(sorted(file.stem for file in PROFILES.glob("*.yaml")))
        raise FileNotFoundError(f"profile {profile!r} does not exist; use one of {known}, or the path of a YAML file")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf8")) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path.name} is not valid YAML: {error}") from error
    if not isinstance(content, dict) or not all(isinstance(part or {}, dict) for part in content.values()):
        raise ValueError(f"{path.name} must map 'all' and notebook names to parameters")
    return {name: part or {} for name, part in content.items()}


def plan_run(profile: str, only: list[str] | None = None, overrides: dict | None = None) -> dict[str, dict]:
    """Return {notebook: parameters} in running order, every name and type checked before anything starts.

    Parameters under `all`, and overrides, go to each chosen notebook that has them.
    Raises ValueError for an unknown notebook or parameter (with the nearest name), or a value of another type.
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
        plan[name] = {key: _checked(key, value, types[name][key]) for key, value in {**shared, **own, **given}.items()}
    return plan


def run_notebook(name: str, parameters: dict, output: Path) -> Path:
    """Execute one notebook into `output`/notebooks, its figures into `output`/figures, and return the executed file.

    Below the project root the collection itself is refreshed: the parameters are the notebook's own, and the file
    changes only when every cell has run. Elsewhere a failed notebook is left as far as it came, with its error.
    """
    target = output / "notebooks" / f"{name}.ipynb"
    target.parent.mkdir(parents=True, exist_ok=True)
    if output != PROJECT_ROOT:
        parameters = {**parameters, "figures_dir": str((output / "figures").resolve())}
        _execute(name, target, parameters)
        return target
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".running-") as folder:
        executed = Path(folder, target.name)
        _execute(name, executed, parameters)
        executed.replace(target)
    return target


def clean_notebook(path: Path) -> None:
    """Remove what a reader should not meet: progress bars, the bookkeeping of papermill and of widgets; pack the pictures."""
    notebook = nbformat.read(path, as_version=4)
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
    nbformat.write(notebook, path)


def _execute(name: str, target: Path, parameters: dict) -> None:
    papermill.execute_notebook(
        NOTEBOOKS / f"{name}.ipynb", target, parameters, kernel_name="python3", cwd=str(PROJECT_ROOT)
    )
    clean_notebook(target)


def _with_palette(picture: str) -> str:
    """Return a base64 PNG in 256 colours: a third of the size, and the eye sees no difference."""
    packed = io.BytesIO()
    Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGB").quantize(256).save(packed, "PNG", optimize=True)
    return base64.b64encode(packed.getvalue()).decode()


def _is_progress(output) -> bool:
    if WIDGET in output.get("data", {}):
        return True
    text = output.get("text", "")
    return output.output_type == "stream" and output.name == "stderr" and (not text.strip() or "%|" in text)


def _check_known(name: str, known, kind: str) -> None:
    if name not in known:
        near = get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"{kind} {name!r} is unknown; {hint}known: {', '.join(sorted(known))}")


def _checked(name: str, value, kind: str):
    """Return the value if it fits the annotated type of its parameter; an int serves as a float."""
    python_type = {"int": int, "float": (int, float), "str": str, "bool": bool, "list": list}[kind.split("[")[0]]
    if not isinstance(value, python_type) or (isinstance(value, bool) and kind != "bool"):
        raise ValueError(f"parameter {name!r} must be {kind}, not {value!r}")
    return value


@click.group(help=__doc__)
def app() -> None:
    pass


@app.command()
@click.option("--profile", default="default", show_default=True, help="smoke, default or paper, or a YAML file's path")
@click.option("-p", "--parameter", "pairs", nargs=2, multiple=True, metavar="NAME VALUE", help="may be repeated")
@click.option("--only", multiple=True, metavar="NOTEBOOK", help="a notebook's name, may be repeated")
@click.option("--output", type=Path, help="folder for notebooks and figures  [default: see above]")
def run(profile: str, pairs: tuple, only: tuple, output: Path | None) -> None:
    """Run the notebooks of a profile in order.

    The default profile with nothing overridden refreshes the collection in place; anything else goes to --output, or
    to runs/PROFILE.
    """
    try:
        overrides = {name: yaml.safe_load(value) for name, value in pairs}
        plan = plan_run(profile, list(only), overrides)
    except (ValueError, FileNotFoundError) as error:
        raise click.UsageError(str(error)) from error
    in_place = profile == "default" and not pairs
    folder = project_path(output or ("." if in_place else Path("runs", Path(profile).stem))).resolve()
    if folder == PROJECT_ROOT and not in_place:
        raise click.UsageError("only the default profile with nothing overridden refreshes the collection; choose another --output")
    for name, parameters in plan.items():
        try:
            click.echo(f"{name} -> {run_notebook(name, parameters, folder)}")
        except PapermillExecutionError as error:
            raise click.ClickException(f"{name} failed in cell {error.exec_count}: {error.ename}: {error.evalue}") from error


if __name__ == "__main__":
    app()
