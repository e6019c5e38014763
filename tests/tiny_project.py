"""A project of its own in a temporary folder: our pipeline over notebooks of a few lines.

It asserts nothing, hence PYTEST_DONT_REWRITE.
"""

import os
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import nbformat
import papermill
import pytest
from click.testing import CliRunner
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from papermill.exceptions import PapermillExecutionError

HELPERS = Path(__file__).parents[1] / "helpers"
MODULES = ["__init__", "places", "plans", "manifests", "runs", "sweeps", "pipeline"]
PARAMETERS = """\
n_samples: int = 10  # sentences
level: float = 0.5  # share
sets: list = ["movies"]  # names
name: str = "auto"  # name
quick: bool = False  # or not
seed: int = 0  # of every draw
figures_dir: str = "figures"  # folder"""
COUNT = "from pathlib import Path\nwith open('count.txt', 'a') as file: print('{name}', n_samples, seed, file=file)"
RESULT = """\
import json, random
from pathlib import Path
results = Path(figures_dir, "results")
results.mkdir(parents=True, exist_ok=True)
found = {{"mean": random.Random(seed).random() * n_samples, "rows": {{"a b": [1, 2.5]}}, "name": name}}
(results / "{name}.json").write_text(json.dumps(found))"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project whose two notebooks note each of their runs in count.txt and write results; its modules and
    root.
    """
    root = tmp_path / "project"
    for folder in ("helpers", "notebooks", "data/profiles"):
        (root / folder).mkdir(parents=True)
    for module in MODULES:
        shutil.copy(HELPERS / f"{module}.py", root / "helpers")
    ours = [name for name in sys.modules if name.split(".")[0] == "helpers"]
    for name in ours:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(root))
    monkeypatch.chdir(root)
    modules = {name: import_module(f"helpers.{name}") for name in MODULES[1:]}
    write_profile(root, "default", "all: {}")
    for name in ("01_first", "02_second"):
        write_notebook(root, name)
    yield SimpleNamespace(root=root, **modules)
    for name in [name for name in sys.modules if name.split(".")[0] == "helpers"]:
        del sys.modules[name]


@pytest.fixture
def quick(monkeypatch):
    """Execute notebooks in this process, which needs no kernel: a second less for each."""

    def execute(source, target, parameters, **options):
        notebook, names = nbformat.read(source, as_version=4), {}
        for index, cell in enumerate(notebook.cells):
            try:
                exec(cell.source if cell.cell_type == "code" else "", names)
            except OSError:
                raise
            except Exception as error:
                nbformat.write(notebook, target)
                about = index, index, cell.source, type(error).__name__, str(error), []
                raise PapermillExecutionError(*about) from error
            names |= parameters if "parameters" in cell.metadata.get("tags", []) else {}
        nbformat.write(notebook, target)

    monkeypatch.setattr(papermill, "execute_notebook", execute)


def write_notebook(root, name, *code, parameters=PARAMETERS):
    """Write a notebook that runs `code`; by default it counts its runs and writes results."""
    code = code or (COUNT.format(name=name), RESULT.format(name=name))
    cells = [new_code_cell(parameters, metadata={"tags": ["parameters"]}), *map(new_code_cell, code)]
    metadata = {"kernelspec": {"name": "python3", "display_name": "python", "language": "python"}}
    path = root / "notebooks" / f"{name}.ipynb"
    nbformat.write(new_notebook(cells=[new_markdown_cell(f"# {name}"), *cells], metadata=metadata), path)
    return path


def write_profile(root, name, text):
    path = root / "data" / "profiles" / f"{name}.yaml"
    path.write_text(text, encoding="utf8")
    return str(path)


def invoke(project, *arguments):
    """Give a command within this process."""
    return CliRunner().invoke(project.pipeline.app, list(map(str, arguments)))


def start(project, *arguments):
    """Give a command in a process of its own."""
    command = [sys.executable, "-m", "helpers.pipeline", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(project.root)}
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=project.root, env=environment, **output)


def counted(project):
    """The runs so far, each as name, n_samples and seed."""
    path = project.root / "count.txt"
    return path.read_text().splitlines() if path.exists() else []
