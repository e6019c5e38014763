"""Every name and type is checked before a run starts; a run leaves clean notebooks, or the old ones."""

import nbformat
import pytest
from click.testing import CliRunner
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from helpers import pipeline
from helpers.pipeline import plan_run

PARAMETERS = """\
n_samples: int = 10  # sentences
level: float = 0.5  # share
sets: list = ["movies"]  # names
name: str = "auto"  # name
quick: bool = False  # or not
figures_dir: str = "figures"  # folder"""


@pytest.fixture
def collection(tmp_path, monkeypatch):
    """A collection of two notebooks and a default profile in place of ours; its root."""
    for attribute, folder in (("NOTEBOOKS", "notebooks"), ("PROFILES", "profiles")):
        (tmp_path / folder).mkdir()
        monkeypatch.setattr(pipeline, attribute, tmp_path / folder)
    monkeypatch.setattr(pipeline, "PROJECT_ROOT", tmp_path)
    monkeypatch.setattr("helpers.runtime.PROJECT_ROOT", tmp_path)
    write_notebook("02_second", PARAMETERS.replace("quick: bool = False  # or not\n", ""))
    write_notebook("01_first", PARAMETERS)
    write_profile("default", "all: {}")
    return tmp_path


def write_notebook(name, parameters=PARAMETERS, *code):
    cells = [new_code_cell(parameters, metadata={"tags": ["parameters"]}), *map(new_code_cell, code)]
    metadata = {"kernelspec": {"name": "python3", "display_name": "python", "language": "python"}}
    path = pipeline.NOTEBOOKS / f"{name}.ipynb"
    nbformat.write(new_notebook(cells=[new_markdown_cell(f"# {name}"), *cells], metadata=metadata), path)
    return path


def write_profile(name, text):
    path = pipeline.PROFILES / f"{name}.yaml"
    path.write_text(text, encoding="utf8")
    return str(path)


def run(*arguments):
    return CliRunner().invoke(pipeline.app, ["run", *arguments])


# Plans


def test_notebooks_run_in_the_order_of_their_numbers(collection):
    (pipeline.NOTEBOOKS / "scratch.ipynb").write_text("{}")
    assert list(plan_run("default")) == ["01_first", "02_second"]


def test_own_values_override_shared_ones_and_the_command_line_both(collection):
    write_profile("mine", "all: {n_samples: 1, level: 1, quick: true}\n01_first: {n_samples: 2, level: 0.25}")
    assert plan_run("mine", overrides={"n_samples": 3}) == {
        "01_first": {"n_samples": 3, "level": 0.25, "quick": True},
        "02_second": {"n_samples": 3, "level": 1},  # it has no parameter `quick`
    }


def test_profile_may_be_a_file_anywhere(collection, tmp_path):
    path = tmp_path / "elsewhere.yml"
    path.write_text("02_second: {name: cpu}")
    assert plan_run(str(path), ["02_second"]) == {"02_second": {"name": "cpu"}}


def test_only_the_named_notebooks_run(collection):
    write_profile("mine", "01_first: {n_samples: 2}")
    assert plan_run("mine", only=["02_second"]) == {"02_second": {}}


@pytest.mark.parametrize("wrong", ["n_sample", "nsamples"])
def test_unknown_parameter_suggests_the_nearest(collection, wrong):
    with pytest.raises(ValueError, match=f"parameter '{wrong}' is unknown; did you mean 'n_samples'"):
        plan_run("default", overrides={wrong: 3})
    write_profile("mine", f"01_first: {{{wrong}: 3}}")
    with pytest.raises(ValueError, match=f"parameter of 01_first '{wrong}' is unknown; did you mean 'n_samples'"):
        plan_run("mine")


def test_shared_parameter_that_no_notebook_has_is_refused(collection):
    write_profile("mine", "all: {n_sample: 3}")
    with pytest.raises(ValueError, match="'n_sample' is unknown; did you mean 'n_samples'"):
        plan_run("mine")


def test_parameter_of_another_notebook_is_refused_where_it_stands(collection):
    write_profile("mine", "02_second: {quick: true}")
    with pytest.raises(ValueError, match="parameter of 02_second 'quick' is unknown"):
        plan_run("mine")


@pytest.mark.parametrize("place", ["only", "profile"])
def test_unknown_notebook_suggests_the_nearest(collection, place):
    write_profile("mine", "01_frist: {n_samples: 1}")
    with pytest.raises(ValueError, match="notebook '01_frist' is unknown; did you mean '01_first'.*known: 01_first, "):
        plan_run(*(("default", ["01_frist"]) if place == "only" else ("mine",)))


@pytest.mark.parametrize(
    ("parameter", "value", "kind"),
    [
        ("n_samples", "ten", "int"), ("n_samples", 2.5, "int"), ("n_samples", True, "int"), ("n_samples", None, "int"),
        ("level", "0.5", "float"), ("level", True, "float"), ("sets", "movies", "list"), ("name", 3, "str"),
        ("quick", 1, "bool"), ("quick", "yes", "bool"),
    ],
)  # fmt: skip
def test_value_of_another_type_is_refused_before_anything_runs(collection, parameter, value, kind):
    with pytest.raises(ValueError, match=f"parameter '{parameter}' must be {kind}, not {value!r}"):
        plan_run("default", overrides={parameter: value})


def test_missing_profile_lists_the_ones_there_are(collection):
    write_profile("smoke", "")
    with pytest.raises(FileNotFoundError, match="profile 'smok' does not exist; use one of default, smoke, or "):
        plan_run("smok")


def test_broken_profile_names_file_and_line(collection):
    write_profile("mine", "all:\n  n_samples: 3\n  sets: [movies\n")
    with pytest.raises(ValueError, match=r"(?s)mine.yaml is not valid YAML.*line [34]"):
        plan_run("mine")


@pytest.mark.parametrize("text", ["- n_samples", "n_samples: 3", "just words"])
def test_profile_that_is_no_mapping_of_notebooks_is_refused(collection, text):
    write_profile("mine", text)
    with pytest.raises(ValueError, match="mine.yaml must map 'all' and notebook names to parameters"):
        plan_run("mine")


@pytest.mark.parametrize("profile", ["smoke", "default", "paper"])
def test_committed_profiles_fit_the_committed_notebooks(profile):
    assert list(plan_run(profile)) == pipeline.notebook_names()


# The command


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--profile", "nowhere"], "profile 'nowhere' does not exist"),
        (["--only", "01_frist"], "did you mean '01_first'"),
        (["-p", "n_sample", "8"], "did you mean 'n_samples'"),
        (["-p", "n_samples", "eight"], "parameter 'n_samples' must be int, not 'eight'"),
    ],
)
def test_bad_input_is_a_usage_error_and_writes_nothing(collection, arguments, said):
    before = {path: path.read_bytes() for path in collection.rglob("*") if path.is_file()}
    result = run(*arguments)
    assert result.exit_code == 2 and said in " ".join(result.output.split()) and "Traceback" not in result.output
    assert {path: path.read_bytes() for path in collection.rglob("*") if path.is_file()} == before


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
def test_only_the_plain_default_profile_goes_in_place(collection, monkeypatch, arguments, folder):
    write_profile("smoke", "")
    went = []
    monkeypatch.setattr(pipeline, "run_notebook", lambda name, parameters, output: went.append(output))
    assert run(*arguments).exit_code == 0
    assert set(went) == {(collection / folder).resolve()}


def test_other_parameters_than_the_default_never_overwrite_the_collection(collection):
    path = pipeline.NOTEBOOKS / "01_first.ipynb"
    before = path.read_bytes()
    result = run("--output", str(collection), "-p", "n_samples", "3", "--only", "01_first")
    assert result.exit_code == 2 and "refreshes the collection" in " ".join(result.output.split())
    assert path.read_bytes() == before


# Runs


def test_failing_notebook_leaves_the_file_in_place_as_it_was(collection):
    path = write_notebook("01_first", PARAMETERS, "x = 1", "raise RuntimeError('out of luck')")
    before = path.read_bytes()
    result = run("--only", "01_first")
    assert result.exit_code == 1 and "01_first failed in cell 3: RuntimeError: out of luck" in result.output
    assert path.read_bytes() == before
    assert sorted(file.name for file in pipeline.NOTEBOOKS.iterdir()) == ["01_first.ipynb", "02_second.ipynb"]


def test_run_in_place_refreshes_the_outputs_and_nothing_else(collection):
    code = "import sys\nprint(n_samples, figures_dir)\nprint('12%|#  | 1/8', file=sys.stderr)"
    path = write_notebook("01_first", PARAMETERS, code)
    before = nbformat.read(path, 4)
    assert run("--only", "01_first").exit_code == 0
    after = nbformat.read(path, 4)
    about = lambda cell: (cell.cell_type, cell.source, cell.id, cell.metadata.get("tags", []))  # noqa: E731
    assert list(map(about, after.cells)) == list(map(about, before.cells))
    assert [output.text for output in after.cells[-1].outputs] == ["10 figures\n"]
    assert [cell.execution_count for cell in after.cells[1:]] == [1, 2] and "papermill" not in after.metadata


def test_run_elsewhere_takes_the_parameters_and_leaves_the_collection_alone(collection):
    path = write_notebook("01_first", PARAMETERS, "import os\nprint(n_samples, figures_dir, os.getcwd())")
    before, output = path.read_bytes(), collection / "out"
    result = run("--only", "01_first", "-p", "n_samples", "3", "--output", "out")
    assert result.exit_code == 0 and path.read_bytes() == before
    done = nbformat.read(output / "notebooks" / "01_first.ipynb", 4)
    assert done.cells[-1].outputs[0].text == f"3 {output / 'figures'} {collection}\n"


# Cleaning


def test_cleaning_removes_progress_bars_and_bookkeeping_but_keeps_what_a_reader_needs(tmp_path):
    noise = [
        new_output("stream", name="stderr", text="\rsampling:  12%|█▏        | 1/8 [00:00<00:01]"),
        new_output("stream", name="stderr", text="\n"),
        new_output("display_data", data={pipeline.WIDGET: {"model_id": "1"}, "text/plain": "0%|"}),
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
    notebook = new_notebook(cells=[words, code], metadata={**kernel, "papermill": {"input_path": "x"}, "widgets": {}})
    path = tmp_path / "notebook.ipynb"
    nbformat.write(notebook, path)
    pipeline.clean_notebook(path)
    clean = nbformat.read(path, 4)
    assert clean.cells[1].outputs == kept and clean.cells[1].metadata == {"tags": ["parameters"]}
    assert list(clean.metadata) == ["kernelspec"] and not clean.cells[0].metadata


def test_types_of_parameters_are_read_from_the_notebook(collection):
    types = {"n_samples": "int", "level": "float", "sets": "list", "name": "str", "quick": "bool", "figures_dir": "str"}
    assert pipeline.notebook_parameters("01_first") == types
