"""Every name and type is checked before a run starts; a run leaves clean notebooks, or the old ones."""

import base64
import io

import helpers.plans
import matplotlib
import nbformat
import numpy as np
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image
from tiny_project import PARAMETERS, invoke, write_notebook, write_profile

import helpers.runs

pytest_plugins = ["tiny_project"]


@pytest.fixture
def collection(project):
    """Two notebooks, of which the second has no parameter `quick`; `plan_run` of that project; its root."""
    write_notebook(
        project.root, "02_second", parameters=PARAMETERS.replace("quick: bool = False  # or not\n", "")
    )
    return project


# Plans


def test_notebooks_run_in_the_order_of_their_numbers(collection):
    (collection.root / "notebooks" / "scratch.ipynb").write_text("{}")
    assert list(collection.plans.plan_run("default")) == ["01_first", "02_second"]


def test_own_values_override_shared_ones_and_the_command_line_both(collection):
    text = "all: {n_samples: 1, level: 1, quick: true}\n01_first: {n_samples: 2, level: 0.25}"
    write_profile(collection.root, "mine", text)
    assert collection.plans.plan_run("mine", overrides={"n_samples": 3}) == {
        "01_first": {"n_samples": 3, "level": 0.25, "quick": True},
        "02_second": {"n_samples": 3, "level": 1},  # it has no parameter `quick`
    }


def test_profile_may_be_a_file_anywhere(collection, tmp_path):
    path = tmp_path / "elsewhere.yml"
    path.write_text("02_second: {name: cpu}")
    assert collection.plans.plan_run(str(path), ["02_second"]) == {"02_second": {"name": "cpu"}}


def test_only_the_named_notebooks_run(collection):
    write_profile(collection.root, "mine", "01_first: {n_samples: 2}")
    assert collection.plans.plan_run("mine", only=["02_second"]) == {"02_second": {}}


@pytest.mark.parametrize("wrong", ["n_sample", "nsamples"])
def test_unknown_parameter_suggests_the_nearest(collection, wrong):
    with pytest.raises(ValueError, match=f"parameter '{wrong}' is unknown; did you mean 'n_samples'"):
        collection.plans.plan_run("default", overrides={wrong: 3})
    write_profile(collection.root, "mine", f"01_first: {{{wrong}: 3}}")
    with pytest.raises(
        ValueError, match=f"parameter of 01_first '{wrong}' is unknown; did you mean 'n_samples'"
    ):
        collection.plans.plan_run("mine")


def test_shared_parameter_that_no_notebook_has_is_refused(collection):
    write_profile(collection.root, "mine", "all: {n_sample: 3}")
    with pytest.raises(ValueError, match="'n_sample' is unknown; did you mean 'n_samples'"):
        collection.plans.plan_run("mine")


def test_parameter_of_another_notebook_is_refused_where_it_stands(collection):
    write_profile(collection.root, "mine", "02_second: {quick: true}")
    with pytest.raises(ValueError, match="parameter of 02_second 'quick' is unknown"):
        collection.plans.plan_run("mine")


@pytest.mark.parametrize("place", ["only", "profile"])
def test_unknown_notebook_suggests_the_nearest(collection, place):
    write_profile(collection.root, "mine", "01_frist: {n_samples: 1}")
    with pytest.raises(
        ValueError, match="notebook '01_frist' is unknown; did you mean '01_first'.*known: 01_first, "
    ):
        collection.plans.plan_run(*(("default", ["01_frist"]) if place == "only" else ("mine",)))


@pytest.mark.parametrize(
    ("parameter", "value", "kind"),
    [
        ("n_samples", "ten", "int"),
        ("n_samples", 2.5, "int"),
        ("n_samples", True, "int"),
        ("n_samples", None, "int"),
        ("level", "0.5", "float"),
        ("level", True, "float"),
        ("sets", "movies", "list"),
        ("name", 3, "str"),
        ("quick", 1, "bool"),
        ("quick", "yes", "bool"),
    ],
)
def test_value_of_another_type_is_refused_before_anything_runs(collection, parameter, value, kind):
    with pytest.raises(ValueError, match=f"parameter '{parameter}' must be {kind}, not {value!r}"):
        collection.plans.plan_run("default", overrides={parameter: value})


def test_missing_profile_lists_the_ones_there_are(collection):
    write_profile(collection.root, "smoke", "")
    with pytest.raises(
        FileNotFoundError, match="profile 'smok' does not exist; use one of default, smoke, or "
    ):
        collection.plans.plan_run("smok")


def test_broken_profile_names_file_and_line(collection):
    write_profile(collection.root, "mine", "all:\n  n_samples: 3\n  sets: [movies\n")
    said = r"^mine.yaml is not valid YAML: line 4, column 1: expected ',' or '\]'[^\n]*$"
    with pytest.raises(ValueError, match=said):
        collection.plans.plan_run("mine")


def test_profile_in_another_encoding_is_refused(collection, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_bytes("all: {name: Zoë}".encode("latin1"))
    with pytest.raises(ValueError, match="mine.yaml is not valid YAML: it is no UTF-8 text"):
        collection.plans.plan_run(str(path))


@pytest.mark.parametrize("text", ["- n_samples", "n_samples: 3", "just words"])
def test_profile_that_is_no_mapping_of_notebooks_is_refused(collection, text):
    write_profile(collection.root, "mine", text)
    with pytest.raises(ValueError, match="mine.yaml must map 'all' and notebook names to parameters"):
        collection.plans.plan_run("mine")


@pytest.mark.parametrize("profile", ["smoke", "default", "paper"])
def test_committed_profiles_fit_the_committed_notebooks(profile):
    assert list(helpers.plans.plan_run(profile)) == helpers.plans.notebook_names()


# The command


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--profile", "nowhere"], "profile 'nowhere' does not exist"),
        (["--only", "01_frist"], "did you mean '01_first'"),
        (["-p", "n_sample", "8"], "did you mean 'n_samples'"),
        (["-p", "n_samples", "eight"], "parameter 'n_samples' must be int, not 'eight'"),
        (["-p", "name", "[a"], "value '[a' is not valid YAML"),
        (["--output", "s4://bucket"], "output 's4://bucket' cannot be used: Protocol not known: s4"),
        (["--profile", "smoke", "--output", "."], "choose another --output"),
        (["--profile", "smoke", "--output", "runs/in-place"], "choose another --output"),
    ],
)
def test_bad_input_is_a_usage_error_and_writes_nothing(collection, arguments, said):
    write_profile(collection.root, "smoke", "")
    before = {path: path.read_bytes() for path in collection.root.rglob("*") if path.is_file()}
    result = invoke(collection, "run", *arguments)
    assert (
        result.exit_code == 2 and said in " ".join(result.output.split()) and "Traceback" not in result.output
    )
    assert {path: path.read_bytes() for path in collection.root.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("arguments", "folder"),
    [
        ([], "."),
        (["--only", "01_first"], "."),
        (["-p", "n_samples", "8"], "runs/default"),
        (["--profile", "smoke"], "runs/smoke"),
        (["--profile", "smoke", "--output", "here"], "here"),
        (["--output", "here"], "here"),
    ],
)
def test_only_the_plain_default_profile_goes_in_place(collection, quick, arguments, folder):
    write_profile(collection.root, "smoke", "")
    assert invoke(collection, "run", *arguments).exit_code == 0
    found = {path.parents[2] for path in collection.root.rglob("figures/results/01_first.json")}
    assert found == {collection.root / folder}


def test_other_parameters_than_the_default_never_overwrite_the_collection(collection):
    path = collection.root / "notebooks" / "01_first.ipynb"
    before = path.read_bytes()
    result = invoke(
        collection, "run", "--output", collection.root, "-p", "n_samples", "3", "--only", "01_first"
    )
    assert result.exit_code == 2 and "refreshes the collection" in " ".join(result.output.split())
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "source", "target"),
    [
        ([], ".", "runs/report"),
        (["runs/x"], "runs/x", "runs/x/report"),
        (["--output", "pages"], ".", "pages"),
    ],
)
def test_report_renders_the_collection_or_a_run(collection, arguments, source, target):
    module = "def render(source, target):\n    return f'{source} to {target}'"
    (collection.root / "helpers" / "report.py").write_text(module)
    said = f"{collection.root / source} to {collection.root / target}\n"
    assert invoke(collection, "report", *arguments).output == said


# In place and elsewhere


def test_failing_notebook_leaves_the_file_in_place_as_it_was(collection):
    path = write_notebook(collection.root, "01_first", "x = 1", "raise RuntimeError('out of luck')")
    before = path.read_bytes()
    result = invoke(collection, "run", "--only", "01_first")
    log = collection.root / "runs" / "in-place" / "notebooks" / "01_first.log"
    assert result.exit_code == 1
    assert f"01_first failed in cell 3: RuntimeError: out of luck; log: {log}" in result.output
    assert "raise RuntimeError('out of luck')" in log.read_text() and "\x1b" not in log.read_text()
    assert "RuntimeError" in log.with_suffix(".ipynb").read_text()
    assert path.read_bytes() == before
    assert sorted(file.name for file in path.parent.iterdir()) == ["01_first.ipynb", "02_second.ipynb"]


def test_run_in_place_refreshes_the_outputs_and_nothing_else(collection):
    code = "import sys\nprint(n_samples, figures_dir)\nprint('12%|#  | 1/8', file=sys.stderr)"
    path = write_notebook(collection.root, "01_first", code)
    before = nbformat.read(path, 4)
    files = {file for file in collection.root.rglob("*") if "runs" not in file.parts}
    assert invoke(collection, "run", "--only", "01_first").exit_code == 0
    after = nbformat.read(path, 4)
    about = lambda cell: (cell.cell_type, cell.source, cell.id, cell.metadata.get("tags", []))
    assert list(map(about, after.cells)) == list(map(about, before.cells))
    assert [output.text for output in after.cells[-1].outputs] == ["10 figures\n"]
    assert [cell.execution_count for cell in after.cells[1:]] == [1, 2] and "papermill" not in after.metadata
    new = {file for file in collection.root.rglob("*") if "runs" not in file.parts} - files
    assert {file for file in new if "__pycache__" not in file.parts} == set()


def test_run_elsewhere_takes_the_parameters_and_leaves_the_collection_alone(collection):
    code = "import os, sys\nprint(n_samples, figures_dir, os.getcwd())\nprint('on the way', file=sys.stderr)"
    path = write_notebook(collection.root, "01_first", code)
    before, output = path.read_bytes(), collection.root / "out"
    result = invoke(collection, "run", "--only", "01_first", "-p", "n_samples", "3", "--output", "out")
    assert result.exit_code == 0 and path.read_bytes() == before
    done = nbformat.read(output / "notebooks" / "01_first.ipynb", 4)
    said = f"3 {output / 'figures'} {collection.root}\n"
    assert done.cells[-1].outputs[0].text == said
    assert (output / "notebooks" / "01_first.log").read_text() == f"{said}on the way\n"


def test_sets_have_one_order_in_every_kernel(collection, monkeypatch):
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    write_notebook(collection.root, "01_first", "print(hash('a'))")
    said = []
    for output in ("one", "two"):
        assert invoke(collection, "run", "--only", "01_first", "--output", output).exit_code == 0
        said.append((collection.root / output / "notebooks" / "01_first.log").read_text())
    assert said[0] == said[1] != ""


# Cleaning


def test_cleaning_removes_progress_bars_and_bookkeeping_but_keeps_what_a_reader_needs(tmp_path):
    noise = [
        new_output("stream", name="stderr", text="\rsampling:  12%|█▏        | 1/8 [00:00<00:01]"),
        new_output("stream", name="stderr", text="\n"),
        new_output("display_data", data={helpers.runs.WIDGET: {"model_id": "1"}, "text/plain": "0%|"}),
    ]
    kept = [
        new_output("stream", name="stderr", text="UserWarning: explained 512 of 812 tokens"),
        new_output("stream", name="stdout", text="50%|half of it\n"),
        new_output("display_data", data={"text/plain": "table"}),
    ]
    metadata = {"tags": ["parameters"], "papermill": {"status": "completed"}, "execution": {"iopub": "now"}}
    words = new_markdown_cell("words", metadata={"papermill": {}})
    code = new_code_cell("x", metadata=metadata, outputs=noise + kept)
    kernel = {"kernelspec": {"name": "python3", "display_name": "python"}}
    notebook = new_notebook(
        cells=[words, code], metadata={**kernel, "papermill": {"input_path": "x"}, "widgets": {}}
    )
    path = tmp_path / "notebook.ipynb"
    nbformat.write(notebook, path)
    helpers.runs.clean_notebook(path)
    clean = nbformat.read(path, 4)
    assert clean.cells[1].outputs == kept and clean.cells[1].metadata == {"tags": ["parameters"]}
    assert list(clean.metadata) == ["kernelspec"] and not clean.cells[0].metadata


def test_packed_pictures_keep_the_colours_that_are_rare_in_them(tmp_path):
    """A colour bar holds every colour of its scale, each in a few pixels; white is one sign, and pale red
    another.
    """
    scale = (
        (255 * matplotlib.colormaps["RdBu_r"](np.linspace(0, 1, 200))[None, :, :3])
        .astype(np.uint8)
        .repeat(3, 0)
    )
    page = np.full((400, 600, 3), 255, np.uint8)
    page[50:250, 50:250] = np.random.default_rng(0).integers(
        0, 256, (200, 200, 1), np.uint8
    )  # greys, which are many
    page[390:393, 100:300] = scale
    pale = 255 * matplotlib.colormaps["RdBu_r"](np.linspace(0.45, 0.55, 20))[:, :3]
    page[50:250, 300:500] = pale.astype(np.uint8).repeat(10, 0)  # nearly zero on that scale, on either side
    picture = io.BytesIO()
    Image.fromarray(page).save(picture, "PNG")
    cell = new_code_cell(
        "x",
        outputs=[
            new_output("display_data", data={"image/png": base64.b64encode(picture.getvalue()).decode()})
        ],
    )
    nbformat.write(new_notebook(cells=[cell]), tmp_path / "notebook.ipynb")
    helpers.runs.clean_notebook(tmp_path / "notebook.ipynb")
    packed = nbformat.read(tmp_path / "notebook.ipynb", 4).cells[0].outputs[0].data["image/png"]
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(packed))).convert("RGB")).astype(int)
    assert np.abs(shown - page).max() < 25 and (shown[0] == 255).all()
    signs = [np.sign(np.subtract(*image[100, 300:500, ::2].T.astype(int))) for image in (page, shown)]
    assert (signs[0] * signs[1] >= 0).all() and signs[0].min() < 0 < signs[0].max()


def test_types_of_parameters_are_read_from_the_notebook(collection):
    types = {
        "n_samples": "int",
        "level": "float",
        "sets": "list",
        "name": "str",
        "quick": "bool",
        "seed": "int",
    }
    assert collection.plans.notebook_parameters("01_first") == {**types, "figures_dir": "str"}
