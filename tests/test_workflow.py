"""One engine: nothing finished is repeated or lost, nothing half done is taken for finished, whoever dies.

A project of its own in a temporary folder: our workflow over notebooks of a few lines. Tests with `quick`
execute in this process, without kernels and without Snakemake; the others give commands as a user does.
"""

import base64
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import fsspec
import matplotlib
import nbformat
import numpy as np
import pandas as pd
import papermill
import pytest
from click.testing import CliRunner
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from papermill.exceptions import PapermillExecutionError
from PIL import Image

WORKFLOW = Path(__file__).parents[1] / "workflow"
MODULES = ["parameters", "provenance", "execute", "jobs", "runs", "front"]
PARAMETERS = """\
n_samples: int = 10  # sentences
sets: list = ["movies"]  # names
seed: int = 0  # of every draw
figures_dir: str = "runs/by-hand/figures"  # folder"""
COUNT = """\
import json, os, random, time
from pathlib import Path
with open("count.txt", "a") as file: print("{name}", n_samples, seed, file=file)
own = Path(figures_dir, "{name}")"""
RESULT = """\
found = {"mean": random.Random(seed).random() * n_samples, "rows": {"a b": [1, 2.5]}, "name": "x"}
(own / "results.json").write_text(json.dumps(found))"""
HOLD = """\
own.joinpath("half.csv").write_text("half")
Path("held").write_text(f"{os.getpid()} {os.getppid()}")
while Path("hold").exists(): time.sleep(0.02)"""
UNLUCKY = "if Path('unlucky').exists(): raise RuntimeError('out of\\nluck')"
READ = "print('first', json.loads(Path(figures_dir, '01_first', 'results.json').read_text())['mean'])"


def write_notebook(root, name, *code):
    """Write a notebook that counts its runs, then runs `code`, which by default writes results."""
    cells = [new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]})]
    cells += [new_code_cell(text) for text in (COUNT.format(name=name), *(code or [RESULT]))]
    metadata = {"kernelspec": {"name": "python3", "display_name": "python", "language": "python"}}
    notebook = new_notebook(cells=[new_markdown_cell(f"# {name}"), *cells], metadata=metadata)
    nbformat.write(notebook, root / "notebooks" / f"{name}.ipynb")


def edit(path, change):
    """Change a notebook in its file."""
    notebook = nbformat.read(path, as_version=4)
    change(notebook)
    nbformat.write(notebook, path)


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project of three notebooks, of which the third reads what the first writes; its modules and root."""
    root = tmp_path / "project"
    shutil.copytree(
        WORKFLOW, root / "workflow", ignore=shutil.ignore_patterns("__pycache__", "profiles", "grids")
    )
    for folder in ("helpers", "notebooks", "workflow/profiles"):
        (root / folder).mkdir()
    (root / "helpers" / "__init__.py").touch()
    (root / "workflow" / "preflight.py").write_text("def check_at_hand(plan): pass")
    (root / "helpers" / "games.py").write_text("from helpers.maps import width\n")
    (root / "helpers" / "maps.py").write_text("width = 3\n")
    (root / "helpers" / "plots.py").write_text("colour = 'red'\n")
    (root / "workflow" / "profiles" / "default.yaml").write_text("all: {}")
    (root / "workflow" / "profiles" / "small.yaml").write_text("all: {n_samples: 4}")
    (root / "workflow" / "reads.yaml").write_text("03_third: [01_first]")
    write_notebook(root, "01_first", "from helpers.games import width", RESULT)
    write_notebook(root, "02_second", "from helpers import plots", RESULT)
    write_notebook(root, "03_third", READ, RESULT)
    ours = lambda: [name for name in sys.modules if name.split(".")[0] in ("workflow", "helpers")]
    for name in ours():
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(root))
    monkeypatch.chdir(root)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    yield SimpleNamespace(root=root, **{name: import_module(f"workflow.{name}") for name in MODULES})
    for name in ours():
        del sys.modules[name]


@pytest.fixture
def quick(project, monkeypatch):
    """Execute notebooks one after the other in this process."""

    def execute(source, target, parameters, **options):
        notebook, names = nbformat.read(source, as_version=4), {}
        for index, cell in enumerate(notebook.cells):
            try:
                exec(cell.source if cell.cell_type == "code" else "", names)
            except Exception as error:
                nbformat.write(notebook, target)
                about = index, index, cell.source, type(error).__name__, str(error), []
                raise PapermillExecutionError(*about) from error
            names |= parameters if "parameters" in cell.metadata.get("tags", []) else {}
        nbformat.write(notebook, target)

    def run_jobs(jobs, folder, cores, more):
        left = []
        for place, job in jobs.items():
            run, asked = (folder / place).parents[1], (job["parameters"], job["digest"], job["force"])
            try:
                assert not set(left) & set(job["after"])
                project.execute.complete_notebook(Path(place).name, asked[0], run, *asked[1:])
            except Exception as error:
                print(f"{place} failed: {error}")
                left.append(place)
        return left

    monkeypatch.setattr(papermill, "execute_notebook", execute)
    monkeypatch.setattr(project.front, "run_jobs", run_jobs)


def invoke(project, *arguments):
    """Give a command within this process."""
    return CliRunner().invoke(project.front.main, list(map(str, arguments)))


def start(project, *arguments, **variables):
    """Give a command in a process of its own."""
    command = [sys.executable, "-m", "workflow.front", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(project.root), **variables}
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=project.root, env=environment, **output)


def finish(process, seconds=120):
    """Wait for a command; return its exit status and what it said."""
    try:
        said = process.communicate(timeout=seconds)[0]
    finally:
        process.kill()
    return process.returncode, said


def counted(project):
    """The runs so far, each as name, n_samples and seed, in alphabetical order."""
    path = project.root / "count.txt"
    return sorted(path.read_text().splitlines()) if path.exists() else []


def states(project, folder="."):
    rows = [line.split() for line in invoke(project, "status", folder).output.splitlines()[1:]]
    return {row[1] if row[0] == "." else f"{row[0].split('-')[0]} {row[1]}": row[2] for row in rows}


def contents(folder):
    """The files of a folder but those of the engine itself."""
    hidden = (".snakemake", ".staging", "__pycache__")
    files = [path for path in folder.rglob("*") if path.is_file() and not set(path.parts) & set(hidden)]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.02)


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


ONCE = ["01_first 10 0", "02_second 10 0", "03_third 10 0"]
FINISHED = dict.fromkeys(["01_first", "02_second", "03_third"], "finished")


# What decides whether a notebook runs again


def test_digest_changes_with_all_that_is_computed_from(project):
    path = project.root / "notebooks" / "01_first.ipynb"
    digest = lambda **parameters: project.provenance.plan_digests({"01_first": parameters}, project.root)[
        "01_first"
    ]
    found = [digest(), digest(seed=1), digest(seed=2)]
    for change in (
        lambda notebook: notebook.cells[2].update(source="other = 1"),
        lambda notebook: notebook.cells[3].update(source=notebook.cells[3].source + "\n1 + 1"),
        lambda notebook: notebook.cells[1].metadata.update(tags=["parameters", "more"]),
    ):
        edit(path, change)
        found.append(digest())
    for module in ("games", "maps", "__init__"):  # imported, imported by that, and what every import runs
        (project.root / "helpers" / f"{module}.py").write_text("from . import maps\nx = 2")
        found.append(digest())
    assert len(set(found)) == len(found) == 9


def test_digest_does_not_change_with_prose_outputs_time_or_helpers_of_others(project):
    path = project.root / "notebooks" / "01_first.ipynb"
    digest = lambda: project.provenance.plan_digests({"01_first": {"sets": ["b"], "seed": 1}}, project.root)
    before = digest()

    def run_it(notebook):
        notebook.cells[0].update(source="# Other words")
        notebook.cells[2].update(outputs=[new_output("stream", text="done")], execution_count=7)
        notebook.metadata["kernelspec"]["display_name"] = "other"

    edit(path, run_it)
    os.utime(path, (1, 1))
    (project.root / "helpers" / "plots.py").write_text("colour = 'blue'\n")
    assert digest() == before


def test_code_that_is_not_plain_python_depends_on_every_helper(project):
    edit(
        project.root / "notebooks" / "01_first.ipynb",
        lambda notebook: notebook.cells[2].update(source="%time 1"),
    )
    digest = lambda: project.provenance.plan_digests({"01_first": {}}, project.root)
    before = digest()
    (project.root / "helpers" / "plots.py").write_text("colour = 'blue'\n")
    assert digest() != before


@pytest.mark.parametrize(
    ("change", "again"),
    [
        ("nothing", []),
        ("touch", []),
        ("games", ["01_first 10 0", "03_third 10 0"]),
        ("plots", ["02_second 10 0"]),
        ("01_first", ["01_first 10 0", "03_third 10 0"]),
        ("03_third", ["03_third 10 0"]),
        ("profile", ["02_second 10 5"]),
    ],
)
def test_an_edit_repeats_what_depends_on_it_and_nothing_else(project, quick, change, again):
    assert invoke(project, "run", "--profile", "small").exit_code == 0
    (project.root / "count.txt").unlink()
    if change == "touch":
        for path in project.root.rglob("*"):
            os.utime(path)
    elif change == "profile":
        (project.root / "workflow" / "profiles" / "small.yaml").write_text(
            "{all: {n_samples: 4}, 02_second: {seed: 5}}"
        )
    elif change in ("games", "plots"):
        with (project.root / "helpers" / f"{change}.py").open("a") as file:
            file.write("# more\n")
    elif change != "nothing":
        edit(
            project.root / "notebooks" / f"{change}.ipynb",
            lambda notebook: notebook.cells[2].update(source=notebook.cells[2].source + "\n# more"),
        )
    again = [line.replace(" 10 ", " 4 ") for line in again]
    found = states(project, "runs/small")
    assert [name for name in found if found[name] == "stale"] == [
        line.split()[0] for line in again
    ] or change == "profile"
    assert invoke(project, "run", "--profile", "small").exit_code == 0 and counted(project) == again
    assert states(project, "runs/small") == FINISHED


def test_what_reads_from_a_rerun_notebook_is_stale_until_it_ran_too(project, quick):
    invoke(project, "run", "--profile", "small")
    edit(
        project.root / "notebooks" / "01_first.ipynb",
        lambda notebook: notebook.cells[2].update(source=notebook.cells[2].source + "\n# new"),
    )
    assert (
        invoke(project, "run", "--profile", "small", "--only", "01_first").exit_code == 0
    )  # as if killed after it
    assert states(project, "runs/small") == {**FINISHED, "03_third": "stale"}
    invoke(project, "run", "--profile", "small")
    assert counted(project).count("03_third 4 0") == 2 and counted(project).count("02_second 4 0") == 1


@pytest.mark.parametrize("damage", ["changed", "gone", "notebook changed", "half a record", "no record"])
def test_what_is_not_as_it_was_written_is_noticed(project, quick, damage):
    command, folder = ["run", "--output", "out", "--only", "01_first"], project.root / "out"
    invoke(project, *command)
    results, executed = folder / "figures/01_first/results.json", folder / "notebooks/01_first.ipynb"
    record, whole = results.with_name("provenance.json"), results.read_bytes()
    {
        "changed": lambda: results.write_bytes(whole[:-1] + b" "),
        "gone": results.unlink,
        "notebook changed": lambda: executed.write_text(executed.read_text()[:-2]),
        "half a record": lambda: record.write_text(record.read_text()[:100]),
        "no record": record.unlink,
    }[damage]()
    assert states(project, "out") == {"01_first": "missing" if damage == "no record" else "stale"}
    assert invoke(project, *command).exit_code == 0
    assert counted(project) == ["01_first 10 0"] * 2 and results.read_bytes() == whole


def test_provenance_says_what_ran_with_what_and_how_long(project, quick):
    git = f"git -C {project.root} -c user.name=a -c user.email=a@b.c"
    (project.root / ".gitignore").write_text("*")
    assert os.system(f"{git} init -q && {git} add --force helpers && {git} commit -qm all") == 0
    read = lambda: json.loads((project.root / "out/figures/01_first/provenance.json").read_text())
    invoke(project, "run", "--output", "out", "-p", "n_samples", 3, "--only", "01_first")
    found = read()
    said = {"notebook": "01_first", "parameters": {"n_samples": 3}, "seed": 0}
    assert {key: found[key] for key in said} == said and len(found["digest"]) == 64
    assert found["python"].startswith("3.") and found["packages"]["papermill"]
    assert len(found["git"]["commit"]) == 40 and found["git"]["dirty"] is False
    assert found["started"] <= found["ended"] and 0 <= found["seconds"] < 10
    assert set(found["files"]) == {"notebooks/01_first.ipynb", "figures/01_first/results.json"}
    with (project.root / "helpers" / "maps.py").open("a") as file:
        file.write("\n")
    invoke(project, "run", "--output", "out", "-p", "n_samples", 3, "--only", "01_first")
    assert read()["git"]["dirty"] is True


# Where results go


@pytest.mark.parametrize(
    ("arguments", "folder"),
    [
        (["--profile", "small"], "runs/small"),
        (["--profile", "small", "--output", "here"], "here"),
        (["--profile", "small", "-p", "seed", "1"], "runs/small-a4bbadc1"),
        (["-p", "seed", "1"], "runs/default-a4bbadc1"),
        (["--output", "here"], "here"),
    ],
)
def test_other_parameters_go_to_a_folder_of_their_own(project, quick, arguments, folder):
    before = contents(project.root / "notebooks")
    assert invoke(project, "run", *arguments).exit_code == 0
    found = {path.parents[2] for path in project.root.rglob("figures/01_first/results.json")}
    assert found == {project.root / folder} and contents(project.root / "notebooks") == before


def test_finished_results_of_other_parameters_are_refused_unless_forced(project, quick):
    command = ["run", "--output", "out", "--only", "01_first"]
    invoke(project, *command)
    before = contents(project.root / "out")
    result = invoke(project, *command, "-p", "n_samples", "3")
    assert result.exit_code == 2 and "(n_samples 10 there, 3 asked); choose another --output" in result.output
    assert contents(project.root / "out") == before
    assert invoke(project, *command, "-p", "n_samples", "3", "--force").exit_code == 0
    assert invoke(project, *command, "-p", "n_samples", "3").exit_code == 0
    assert counted(project) == ["01_first 10 0", "01_first 3 0"]


def test_failed_rerun_keeps_what_was_finished(project, quick):
    command = ["run", "--output", "out", "--only", "01_first"]
    invoke(project, *command)
    before = contents(project.root / "out")
    write_notebook(project.root, "01_first", "(own / 'results.json').write_text('half')", "1 / 0")
    assert invoke(project, *command).exit_code == 1
    after = contents(project.root / "out")
    assert {path: after[path] for path in before if not path.startswith("logs")} == {
        path: before[path] for path in before if not path.startswith("logs")
    }
    assert after["logs/01_first.log"].decode().endswith("\ncell 4: ZeroDivisionError: division by zero\n")
    assert states(project, "out") == {"01_first": "failed"}


def test_rerun_leaves_nothing_that_it_did_not_make(project, quick):
    invoke(project, "run", "--profile", "small")
    (project.root / "runs/small/figures/01_first/old.png").write_text("old")
    invoke(project, "run", "--profile", "small", "--force", "--only", "01_first")
    found = {path.name for path in (project.root / "runs/small/figures/01_first").iterdir()}
    assert found == {"results.json", "provenance.json"}


def test_default_profile_is_published_when_all_of_it_is_finished(project, quick):
    (project.root / "figures" / "01_first").mkdir(parents=True)
    (project.root / "figures" / "01_first" / "old.png").write_text("old")
    before = contents(project.root)
    (project.root / "unlucky").touch()
    write_notebook(project.root, "02_second", UNLUCKY, RESULT)
    source = contents(project.root)["notebooks/02_second.ipynb"]
    assert invoke(project, "run").exit_code == 1
    (project.root / "unlucky").unlink()
    kept = {path for path in contents(project.root) if path.split("/")[0] in ("figures", "notebooks")}
    assert kept == {path for path in before if path.split("/")[0] in ("figures", "notebooks")}
    assert contents(project.root)["notebooks/02_second.ipynb"] == source
    assert "stay until 02_second is finished" in invoke(project, "run", "--only", "01_first").output
    assert invoke(project, "run").exit_code == 0 and states(project) == FINISHED
    figures = project.root / "figures"
    assert contents(figures) == contents(project.root / "runs/default/figures")
    assert set(contents(figures / "01_first")) == {"results.json", "provenance.json"}
    (figures / "01_first" / "results.json").unlink()
    edit(project.root / "notebooks/02_second.ipynb", lambda notebook: notebook.cells[2].update(outputs=[]))
    assert states(project) == {**FINISHED, "01_first": "stale"}
    count = counted(project)
    assert invoke(project, "run").exit_code == 0 and states(project) == FINISHED and counted(project) == count
    write_notebook(project.root, "01_first", RESULT, "(own / 'cavs.safetensors').touch()")
    edit(
        project.root / "notebooks/01_first.ipynb",
        lambda notebook: notebook.cells[1].update(source=PARAMETERS.replace("10", "8")),
    )
    assert invoke(project, "run").exit_code == 0 and states(project) == FINISHED
    results = [
        folder / "figures/01_first/results.json" for folder in (project.root, project.root / "runs/default")
    ]
    assert results[0].read_bytes() == results[1].read_bytes()
    assert not (figures / "01_first" / "cavs.safetensors").exists()  # vectors stay with the run


def test_prose_may_be_mended_without_a_new_run_and_is_not_taken_back(project, quick):
    path, count = project.root / "notebooks/01_first.ipynb", 3
    assert invoke(project, "run").exit_code == 0 and len(counted(project)) == count
    edit(path, lambda notebook: notebook.cells[0].update(source="# Mended"))
    edit(path, lambda notebook: notebook.cells.insert(2, new_markdown_cell("more")))
    assert states(project) == FINISHED
    edit(path, lambda notebook: notebook.cells[1].update(outputs=[new_output("stream", text="false")]))
    assert states(project) == {**FINISHED, "01_first": "stale"}
    assert invoke(project, "run").exit_code == 0 and states(project) == FINISHED
    cells = nbformat.read(path, as_version=4).cells
    assert [cell.source for cell in (cells[0], cells[2])] == ["# Mended", "more"] and not cells[1].outputs
    assert len(counted(project)) == count


def test_a_notebook_alone_chains_what_lies_in_its_folder_else_what_is_committed(project, quick):
    digest = lambda: project.provenance.plan_digests({"03_third": {}}, project.root / "out")
    found = [digest()]
    invoke(project, "run")
    found.append(digest())
    invoke(project, "run", "--output", "out", "--only", "01_first", "-p", "seed", "4")
    found.append(digest())
    assert found[0] != found[1] != found[2] != found[0]


# Cleaning


def test_published_notebook_has_its_own_parameters_and_counts_and_no_path(project):
    injected = '# Parameters\nfigures_dir = "/far"\n'
    cells = [
        new_code_cell(PARAMETERS, execution_count=1, metadata={"tags": ["parameters"]}),
        new_code_cell(injected, execution_count=2, metadata={"tags": ["injected-parameters"]}),
        new_code_cell(
            "x",
            execution_count=3,
            outputs=[
                new_output("execute_result", data={"text/plain": "/far/figures/x.png"}, execution_count=3)
            ],
        ),
    ]
    clean = project.execute.clean_notebook(new_notebook(cells=cells), Path("/far"))
    assert [cell.execution_count for cell in clean.cells] == [1, 2] and clean.cells[0].source == PARAMETERS
    assert clean.cells[1].outputs[0].execution_count == 2
    assert clean.cells[1].outputs[0].data["text/plain"] == "figures/x.png"
    cells.insert(1, new_code_cell(injected + "seed = 3", metadata={"tags": ["injected-parameters"]}))
    clean = project.execute.clean_notebook(new_notebook(cells=cells), Path("/far"))
    assert clean.cells[1].source == "# Parameters\nseed = 3" and len(clean.cells) == 3


def test_cleaning_removes_progress_bars_and_bookkeeping_but_keeps_what_a_reader_needs(project):
    widget = {project.execute.WIDGET: {"model_id": "1"}, "text/plain": "0%|"}
    noise = [
        new_output("stream", name="stderr", text="\rsampling:  12%|█▏        | 1/8 [00:00<00:01]"),
        new_output("stream", name="stderr", text="\n"),
        new_output("display_data", data=widget),
    ]
    kept = [
        new_output("stream", name="stderr", text="UserWarning: explained 512 of 812 tokens"),
        new_output("stream", name="stdout", text="50%|half of it\n"),
        new_output("display_data", data={"text/plain": "table"}),
    ]
    metadata = {"tags": ["parameters"], "papermill": {"status": "completed"}, "execution": {"iopub": "now"}}
    words = new_markdown_cell("words", metadata={"papermill": {}})
    code = new_code_cell("x", metadata=metadata, outputs=noise + kept)
    about = {
        "kernelspec": {"name": "python3", "display_name": "python"},
        "papermill": {"input_path": "x"},
        "widgets": {},
    }
    clean = project.execute.clean_notebook(new_notebook(cells=[words, code], metadata=about))
    assert clean.cells[1].outputs == kept and clean.cells[1].metadata == {"tags": ["parameters"]}
    assert list(clean.metadata) == ["kernelspec"] and not clean.cells[0].metadata


def test_packed_pictures_keep_the_colours_that_are_rare_in_them(project):
    """A colour bar holds each colour in a few pixels; white is one sign, pale red another."""
    colours = lambda low, high, count: (
        255 * matplotlib.colormaps["RdBu_r"](np.linspace(low, high, count))[:, :3]
    ).astype(np.uint8)
    page = np.full((400, 600, 3), 255, np.uint8)
    page[50:250, 50:250] = np.random.default_rng(0).integers(
        0, 256, (200, 200, 1), np.uint8
    )  # greys, which are many
    page[390:393, 100:300] = colours(0, 1, 200)
    page[50:250, 300:500] = colours(0.45, 0.55, 20).repeat(10, 0)  # nearly zero on that scale, on either side
    picture = io.BytesIO()
    Image.fromarray(page).save(picture, "PNG")
    data = {"image/png": base64.b64encode(picture.getvalue()).decode()}
    cell = new_code_cell("x", outputs=[new_output("display_data", data=data)])
    clean = project.execute.clean_notebook(new_notebook(cells=[cell]))
    packed = base64.b64decode(clean.cells[0].outputs[0].data["image/png"])
    shown = np.asarray(Image.open(io.BytesIO(packed)).convert("RGB")).astype(int)
    assert (
        np.abs(shown - page).max() < 25 and (shown[0] == 255).all() and len(packed) < len(picture.getvalue())
    )
    signs = [np.sign(np.subtract(*image[100, 300:500, ::2].T.astype(int))) for image in (page, shown)]
    assert (signs[0] * signs[1] >= 0).all() and signs[0].min() < 0 < signs[0].max()


def test_findings_of_the_committed_run_are_left_out_of_other_runs(project, quick):
    """Of runs with other parameters, and of what reads from these; a computing device changes nothing."""
    finding = "**In the committed run** the mean is .42:\n- highest of all."
    words = f"## 1\n\nTrue of all.\n\n{finding}\n\nIn the committed run\nagain.\n\nTrue, too."
    for name in ("01_first", "03_third"):
        path = project.root / "notebooks" / f"{name}.ipynb"
        edit(path, lambda notebook: notebook.cells.append(new_markdown_cell(words)))
    said = lambda run, name: (
        nbformat.read(project.root / run / "notebooks" / f"{name}.ipynb", 4).cells[-1].source
    )
    own = ["run", "--only", "01_first", "-p", "seed", "3", "--output", "own"]
    assert invoke(project, *own).exit_code == 0
    note = project.execute.LEFT_OUT
    assert said("own", "01_first") == f"## 1\n\nTrue of all.\n\n{note}\n\nTrue, too."
    assert invoke(project, "run", "--only", "03_third", "--output", "own").exit_code == 0
    assert note in said("own", "03_third") and "again" not in said("own", "03_third")
    same = ["run", "--only", "01_first", "-p", "seed", "0", "--output", "same"]
    assert invoke(project, *same).exit_code == 0
    assert said("same", "01_first") == words


# Refused before anything starts


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "--profile", "nowhere"], "profile 'nowhere' does not exist"),
        (["run", "--only", "01_frist"], "did you mean '01_first'"),
        (
            ["run", "--only", "01_first", "02_second"],
            "what is '02_second' for? Each notebook needs an --only",
        ),
        (["run", "-p", "n_sample", "8"], "did you mean 'n_samples'"),
        (["run", "-p", "n_samples", "eight"], "parameter 'n_samples' must be int, not 'eight'"),
        (["run", "-p", "sets", "[a"], "value '[a' is not valid YAML"),
        (["run", "-p", "figures_dir", "here"], "figures_dir is where --output puts it"),
        (["run", "--output", "s4://bucket"], "output 's4://bucket' cannot be used: Protocol not known: s4"),
        (["run", "--output", "."], "choose another --output"),
        (["sweep", "nowhere.yaml"], "grid 'nowhere.yaml' does not exist"),
        (["status", "nowhere"], "nowhere holds no run; give the --output of one"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(project, quick, arguments, said):
    before = contents(project.root)
    result = invoke(project, *arguments)
    assert result.exit_code == 2 and said in result.output and len(result.output.splitlines()) == 1
    assert contents(project.root) == before and not (project.root / "runs").exists()


def test_only_what_is_not_finished_has_to_be_at_hand(project, quick, monkeypatch):
    asked = []
    monkeypatch.setattr("workflow.preflight.check_at_hand", asked.append)
    for _ in range(2):
        invoke(project, "run", "--profile", "small", "--only", "02_second")
    invoke(project, "run", "--profile", "small")
    assert [list(plan) for plan in asked] == [["02_second"], ["01_first", "03_third"]]

    def refuse(plan):
        raise ConnectionError("the hub cannot be reached")

    monkeypatch.setattr("workflow.preflight.check_at_hand", refuse)
    result = invoke(project, "run")
    assert result.exit_code == 2 and result.output == "Error: the hub cannot be reached\n"
    assert not (project.root / "runs" / "default").exists()


def test_output_that_cannot_be_written_to_is_one_line(project, quick):
    (project.root / "out").write_text("a file")
    result = invoke(project, "run", "--output", "out/deeper")
    assert result.exit_code == 1 and "out" in result.output and "choose another --output" in result.output
    assert len(result.output.splitlines()) == 1 and counted(project) == []


def test_broken_record_of_a_folder_names_the_file_and_the_way_out(project, quick):
    invoke(project, "run", "--profile", "small")
    (project.root / "runs/small/plan.json").write_text("{")
    result = invoke(project, "status", "runs/small")
    assert result.exit_code == 2 and "runs/small/plan.json cannot be read; remove it" in result.output


def test_sources_that_changed_since_the_command_began_are_refused(project, quick):
    run, plan = project.root / "out", {"01_first": {}}
    begun = project.provenance.plan_digests(plan, run)["01_first"]
    write_notebook(project.root, "01_first")
    with pytest.raises(RuntimeError, match="01_first: its source is not what the command began with"):
        project.execute.complete_notebook("01_first", {}, run, begun)
    assert counted(project) == []


@pytest.mark.parametrize(
    ("arguments", "source", "target"),
    [
        ([], ".", "runs/report"),
        (["runs/x"], "runs/x", "runs/x/report"),
        (["--output", "pages"], ".", "pages"),
    ],
)
def test_report_renders_the_collection_or_a_run(project, monkeypatch, arguments, source, target):
    module = SimpleNamespace(render=lambda source, target: f"{source} to {target}")
    monkeypatch.setitem(sys.modules, "report", SimpleNamespace(render=module))
    monkeypatch.setitem(sys.modules, "report.render", module)
    said = f"{project.root / source} to {project.root / target}\n"
    assert invoke(project, "report", *arguments).output == said


# Commands as a user gives them


@pytest.mark.slow
def test_notebooks_run_side_by_side_with_one_thread_each_and_are_not_repeated(project):
    """Each waits for the other to begin, so one after the other they would never end."""
    meet = "\n".join(
        [
            "assert [os.environ[name] for name in ('OMP_NUM_THREADS', 'MKL_NUM_THREADS')] == ['1', '1']",
            "assert os.environ['OPENBLAS_NUM_THREADS'] == os.environ['LOKY_MAX_CPU_COUNT'] == '1'",
            "assert os.environ['PYTHONHASHSEED'] == '0' and Path.cwd() == Path('{root}')",
            "Path('{name}.met').touch()",
            "while not Path('{other}.met').exists(): time.sleep(0.02)",
        ]
    ).replace("{root}", str(project.root))
    for name, other in (("01_first", "02_second"), ("02_second", "01_first")):
        write_notebook(project.root, name, meet.replace("{name}", name).replace("{other}", other), RESULT)
    code, said = finish(start(project, "run", "--cores", "2"))
    assert code == 0, said
    assert "01_first finished in " in said and said.count("\n") == 7
    assert counted(project) == ONCE and states(project) == FINISHED
    done = nbformat.read(project.root / "notebooks" / "03_third.ipynb", 4)
    assert [cell.execution_count for cell in done.cells[1:]] == [
        1,
        2,
        3,
        4,
    ] and "papermill" not in done.metadata
    assert done.cells[3].outputs[0].text.startswith("first 8.4")
    for path in project.root.rglob("*"):
        os.utime(path)
    code, said = finish(start(project, "run"))
    assert code == 0 and "3 of 3 notebooks were finished before" in said and counted(project) == ONCE


@pytest.mark.slow
def test_failure_holds_back_only_what_reads_from_it_and_the_same_command_resumes(project, quick):
    invoke(project, "run", "--profile", "small", "--only", "01_first")
    before = contents(project.root / "runs/small/figures")
    (project.root / "count.txt").unlink()
    write_notebook(project.root, "01_first", "print('so far')", UNLUCKY, RESULT)
    (project.root / "unlucky").touch()
    (project.root / "runs/small/logs/03_third.ipynb").touch()  # it failed once; now it is not even tried
    code, said = finish(start(project, "run", "--profile", "small"))
    log = project.root / "runs/small/logs/01_first.log"
    assert code == 1 and f"01_first failed: cell 5: RuntimeError: out of luck; log: {log}" in said
    assert "03_third was held back, because 01_first did not finish" in said and "Traceback" not in said
    assert "Error: 2 of 3 notebooks did not finish; the same command tries them again" in said
    assert "so far" in log.with_suffix(".ipynb").read_text() and "\x1b" not in log.read_text()
    assert states(project, "runs/small") == {**FINISHED, "01_first": "failed", "03_third": "missing"}
    after = contents(project.root / "runs/small/figures")
    assert {path: after.get(path) for path in before} == before  # of the run before
    (project.root / "unlucky").unlink()
    code, said = finish(start(project, "run", "--profile", "small"))
    assert code == 0 and "1 of 3 notebooks were finished before" in said
    assert counted(project) == ["01_first 4 0", "01_first 4 0", "02_second 4 0", "03_third 4 0"]
    assert states(project, "runs/small") == FINISHED and not log.with_suffix(".ipynb").exists()


@pytest.mark.parametrize("victim", ["front", "executor", "kernel"])
@pytest.mark.slow
def test_whoever_is_killed_the_same_command_does_the_rest(project, quick, victim):
    """The front and Snakemake are one process; the executor holds the kernel."""
    command = ["run", "--profile", "small"]
    invoke(project, *command, "--only", "01_first", "--only", "02_second")
    write_notebook(project.root, "03_third", READ, HOLD, RESULT)
    (project.root / "hold").touch()
    running = start(project, *command)
    try:
        wait_for(lambda: (project.root / "held").exists() and (project.root / "held").read_text())
        kernel, executor = map(int, (project.root / "held").read_text().split())
        killed = {"front": running.pid, "executor": executor, "kernel": kernel}[victim]
        assert states(project, "runs/small") == {
            "01_first": "finished",
            "02_second": "finished",
            "03_third": "running",
        }
        os.kill(killed, signal.SIGKILL)
        wait_for(lambda: not alive(executor) and not alive(kernel), 20)  # no orphan computes on
        code, said = finish(running)
    finally:
        running.kill()
    state = "failed" if victim == "kernel" else "missing"
    assert code == (-signal.SIGKILL if victim == "front" else 1) and "Traceback" not in said
    assert {"front": "", "executor": "03_third was cut off", "kernel": "DeadKernelError"}[victim] in said
    assert states(project, "runs/small") == {**FINISHED, "03_third": state}
    assert not list((project.root / "runs/small/figures").rglob("half.csv"))
    (project.root / "hold").unlink()
    code, said = finish(start(project, *command))
    assert code == 0 and "2 of 3 notebooks were finished before" in said, said
    assert counted(project) == ["01_first 4 0", "02_second 4 0", "03_third 4 0", "03_third 4 0"]
    assert not [path for path in (project.root / "runs/small/.staging").iterdir() if path.is_dir()]


@pytest.mark.slow
def test_two_commands_for_one_folder_run_each_notebook_once(project):
    write_notebook(project.root, "01_first", HOLD, RESULT)
    (project.root / "hold").touch()
    command = ["run", "--profile", "small", "--only", "01_first"]
    first = start(project, *command)
    wait_for(lambda: (project.root / "held").exists())
    second = start(project, *command)
    assert second.stdout.readline().startswith("another command is at work in")
    (project.root / "hold").unlink()
    assert finish(first)[0] == 0
    code, said = finish(second)
    assert (
        code == 0 and "1 of 1 notebooks were finished before" in said and counted(project) == ["01_first 4 0"]
    )


def test_two_at_one_notebook_take_turns_and_the_second_finds_it_finished(project, quick):
    write_notebook(project.root, "01_first", "time.sleep(0.3)", RESULT)
    run, found = project.root / "runs" / "small", []
    complete = lambda: found.append(project.execute.complete_notebook("01_first", {}, run))
    both = [threading.Thread(target=complete) for _ in range(2)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    assert len(found) == 2 and found[0] == found[1] and counted(project) == ["01_first 10 0"]


@pytest.mark.slow
def test_grid_is_one_command_and_a_larger_one_adds(project):
    grid, folder = project.root / "grid.yaml", project.root / "runs" / "grid"
    grid.write_text("notebooks: [02_second]\nparameters: {n_samples: [4], sets: [[a], [b, c]]}")
    code, said = finish(start(project, "sweep", grid, "--cores", "4"))
    assert code == 0 and "6 numbers in" in said, said
    table = pd.read_csv(folder / "metrics.csv")
    assert list(table) == ["run", "notebook", "n_samples", "sets", "metric", "value"] and len(table) == 6
    assert set(table.metric) == {"mean", "rows.a b.0", "rows.a b.1"} and set(table.sets) == {
        "['a']",
        "['b', 'c']",
    }
    assert set(states(project, "runs/grid").values()) == {"finished"} and len(counted(project)) == 2
    grid.write_text("notebooks: [02_second]\nparameters: {n_samples: [4], sets: [[a], [b, c], [d]]}")
    code, said = finish(start(project, "sweep", grid))
    assert code == 0 and "2 of 3 notebooks were finished before" in said and len(counted(project)) == 3
    assert pd.read_csv(folder / "metrics.csv").run.nunique() == 3


def test_metrics_are_of_what_is_finished_only(project, quick):
    grid, folder = project.root / "grid.yaml", project.root / "runs" / "grid"
    grid.write_text("notebooks: [02_second]\nparameters: {seed: [0, 1]}")
    invoke(project, "sweep", grid)
    assert project.runs.gather_metrics(folder) == 6
    next(folder.rglob("results.json")).write_text('{"mean": 0}')
    assert project.runs.gather_metrics(folder) == 3


@pytest.mark.parametrize("scheme", ["file", "memory"])
def test_url_gets_all_of_a_run_and_is_resumed_from_another_machine(project, quick, scheme):
    url = f"{scheme}://{project.root}/far"
    write_notebook(project.root, "03_third", READ, UNLUCKY, RESULT)
    (project.root / "unlucky").touch()
    command = ["run", "--profile", "small", "--output", url]
    assert invoke(project, *command).exit_code == 1
    assert states(project, url) == {**FINISHED, "03_third": "failed"}
    (project.root / "unlucky").unlink()
    shutil.rmtree(project.root / "runs")
    result = invoke(project, *command)
    assert result.exit_code == 0 and "2 of 3 notebooks were finished before" in result.output
    assert states(project, url) == FINISHED and len(counted(project)) == 4
    fs, far = fsspec.url_to_fs(url)
    found = {path.removeprefix(f"{far}/") for path in fs.find(far)}
    of_each = "notebooks/{0}.ipynb logs/{0}.log figures/{0}/results.json figures/{0}/provenance.json"
    assert found == {"plan.json", *" ".join(map(of_each.format, FINISHED)).split()}
    fs.pipe_file(f"{far}/figures/01_first/results.json", b"{}")
    fs.rm_file(f"{far}/figures/02_second/results.json")
    fs.pipe_file(f"{far}/figures/03_third/old.png", b"of an earlier version")
    assert states(project, url) == {"01_first": "stale", "02_second": "stale", "03_third": "finished"}
    assert invoke(project, *command).exit_code == 0 and states(project, url) == FINISHED
    assert len(counted(project)) == 4 and not fs.exists(f"{far}/figures/03_third/old.png")


@pytest.mark.slow
def test_options_after_two_dashes_are_for_snakemake(project):
    code, said = finish(start(project, "run", "--profile", "small", "--", "--dry-run"))
    assert code == 0 and "rule notebook" in said and "figures/03_third/provenance.json" in said
    assert counted(project) == [] and states(project, "runs/small") == dict.fromkeys(FINISHED, "missing")


def test_declared_readers_and_their_sources_are_notebooks_in_running_order():
    from workflow.parameters import notebook_names
    from workflow.provenance import earlier_notebooks

    names = notebook_names()
    for name in names:
        assert all(names.index(other) < names.index(name) for other in earlier_notebooks(name))
    assert (
        "03_concept_training" in earlier_notebooks("04_tcav")
        and len(earlier_notebooks("05_comparisons")) == 4
        and not earlier_notebooks("06_checks")
    )
