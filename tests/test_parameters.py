"""Every name, type and value of a plan is checked before anything starts; a grid is, too."""

import json
import subprocess
import sys

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from helpers import faithfulness, images, models, paths, tcav
from workflow import parameters
from workflow.parameters import plan_grid, plan_run

CELL = """\
n_samples: int = 10  # sentences
level: float = 0.5  # share
sets: list = ["movies"]  # names
name: str = "auto"  # name
quick: bool = False  # or not
seed: int = 0  # of every draw
figures_dir: str = "figures"  # folder"""


@pytest.fixture
def collection(tmp_path, monkeypatch):
    """Two notebooks, of which the second has no parameter `quick`, and the profile `default`; their root."""
    root = tmp_path / "project"
    for folder in ("notebooks", "profiles"):
        (root / folder).mkdir(parents=True)
    monkeypatch.setattr(parameters, "ROOT", root)
    monkeypatch.setattr(parameters, "NOTEBOOKS", root / "notebooks")
    monkeypatch.setattr(parameters, "PROFILES", root / "profiles")
    monkeypatch.chdir(root)
    for name, cell in (
        ("01_first", CELL),
        ("02_second", CELL.replace("quick: bool = False  # or not\n", "")),
    ):
        notebook = new_notebook(cells=[new_code_cell(cell, metadata={"tags": ["parameters"]})])
        notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "python", "language": "python"}
        nbformat.write(notebook, root / "notebooks" / f"{name}.ipynb")
    write_profile(root, "default", "all: {}")
    return root


def write_profile(root, name, text):
    (root / "profiles" / f"{name}.yaml").write_text(text, encoding="utf8")


@pytest.fixture
def grid(collection):
    """A function that writes a grid and returns its path."""

    def write(text):
        path = collection / "grid.yaml"
        path.write_text(text, encoding="utf8")
        return path

    return write


# Names and types


def test_notebooks_run_in_the_order_of_their_numbers(collection):
    (collection / "notebooks" / "scratch.ipynb").write_text("{}")
    assert list(plan_run("default")) == ["01_first", "02_second"]


def test_own_values_override_shared_ones_and_the_command_line_both(collection):
    text = "all: {n_samples: 1, level: 1, quick: true}\n01_first: {n_samples: 2, level: 0.25}"
    write_profile(collection, "mine", text)
    assert plan_run("mine", overrides={"n_samples": 3}) == {
        "01_first": {"n_samples": 3, "level": 0.25, "quick": True},
        "02_second": {"n_samples": 3, "level": 1},  # it has no parameter `quick`
    }


def test_profile_may_be_a_file_anywhere(collection, tmp_path):
    path = tmp_path / "elsewhere.yml"
    path.write_text("02_second: {name: cpu}")
    assert plan_run(str(path), ["02_second"]) == {"02_second": {"name": "cpu"}}


def test_only_the_named_notebooks_run(collection):
    write_profile(collection, "mine", "01_first: {n_samples: 2}")
    assert plan_run("mine", only=["02_second"]) == {"02_second": {}}


def test_defaults_are_those_of_the_parameters_cell(collection):
    assert parameters.notebook_parameters("02_second")["sets"] == "list"
    assert parameters.notebook_default("02_second", "sets") == ["movies"]
    assert parameters.notebook_default("02_second", "quick") is None


@pytest.mark.parametrize("wrong", ["n_sample", "nsamples"])
def test_unknown_parameter_suggests_the_nearest(collection, wrong):
    with pytest.raises(ValueError, match=f"parameter '{wrong}' is unknown; did you mean 'n_samples'"):
        plan_run("default", overrides={wrong: 3})
    write_profile(collection, "mine", f"01_first: {{{wrong}: 3}}")
    said = f"parameter of 01_first '{wrong}' is unknown; did you mean 'n_samples'"
    with pytest.raises(ValueError, match=said):
        plan_run("mine")


def test_shared_parameter_that_no_notebook_has_is_refused(collection):
    write_profile(collection, "mine", "all: {n_sample: 3}")
    with pytest.raises(ValueError, match="'n_sample' is unknown; did you mean 'n_samples'"):
        plan_run("mine")


def test_override_that_no_chosen_notebook_has_is_refused(collection):
    with pytest.raises(ValueError, match="parameter 'quick' is unknown"):
        plan_run("default", ["02_second"], {"quick": True})


def test_parameter_of_another_notebook_is_refused_where_it_stands(collection):
    write_profile(collection, "mine", "02_second: {quick: true}")
    with pytest.raises(ValueError, match="parameter of 02_second 'quick' is unknown"):
        plan_run("mine")


@pytest.mark.parametrize("place", ["only", "profile"])
def test_unknown_notebook_suggests_the_nearest(collection, place):
    write_profile(collection, "mine", "01_frist: {n_samples: 1}")
    said = "notebook '01_frist' is unknown; did you mean '01_first'.*known: 01_first, "
    with pytest.raises(ValueError, match=said):
        plan_run(*(("default", ["01_frist"]) if place == "only" else ("mine",)))


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
def test_value_of_another_type_is_refused(collection, parameter, value, kind):
    with pytest.raises(ValueError, match=f"parameter '{parameter}' must be {kind}, not {value!r}"):
        plan_run("default", overrides={parameter: value})


def test_missing_profile_suggests_the_nearest_and_lists_what_there_is(collection):
    write_profile(collection, "smoke", "")
    said = "profile 'smok' does not exist; did you mean 'smoke'. known: default, smoke; or give the path of a"
    with pytest.raises(FileNotFoundError, match=said):
        plan_run("smok")


def test_broken_profile_names_file_and_line(collection):
    write_profile(collection, "mine", "all:\n  n_samples: 3\n  sets: [movies\n")
    said = r"^mine.yaml is not valid YAML: line 4, column 1: expected ',' or '\]'[^\n]*$"
    with pytest.raises(ValueError, match=said):
        plan_run("mine")


def test_profile_in_another_encoding_is_refused(collection, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_bytes("all: {name: Zoë}".encode("latin1"))
    with pytest.raises(ValueError, match="mine.yaml is not valid YAML: it is no UTF-8 text"):
        plan_run(str(path))


@pytest.mark.parametrize("text", ["- n_samples", "n_samples: 3", "just words"])
def test_profile_that_is_no_mapping_of_notebooks_is_refused(collection, text):
    write_profile(collection, "mine", text)
    with pytest.raises(ValueError, match="mine.yaml must map 'all' and notebook names to parameters"):
        plan_run("mine")


def test_value_on_the_command_line_is_read_as_yaml():
    values = [parameters.read_value(text) for text in ("3", "0.5", "true", "[a, 2]", "mps", "''")]
    assert values == [3, 0.5, True, ["a", 2], "mps", ""]
    with pytest.raises(ValueError, match=r"^value '\[a' is not valid YAML; quote it[^\n]*$"):
        parameters.read_value("[a")


# Ranges

WHOLE, NAMES = "a list of whole numbers from 1", "a list of one or more names"
PERCENTS = "a list of percents from 0 to 100, among them 0, 10, 20 and 50"
LINES, DEVICES = "a list of lines such as 'zebra: striped dotted'", "auto, cpu, cuda, cuda:NUMBER or mps"
FAMILIES = "a list of families, each a list of two or more names"


@pytest.mark.parametrize(
    ("notebook", "parameter", "value", "must"),
    [
        ("01_nlp_shapley", "n_random", 0, "1 or more"),
        ("01_nlp_shapley", "n_shap", -1, "0 or more"),
        ("01_nlp_shapley", "seed", -1, "0 or more"),
        ("01_nlp_shapley", "ig_steps", 0, "1 or more"),
        ("01_nlp_shapley", "max_players", 0, "1 or more"),
        ("01_nlp_shapley", "batch_size", 0, "1 or more"),
        ("06_checks", "planted_steps", 0, "1 or more"),
        ("03_concept_training", "n_folds", 1, "2 or more"),
        ("03_concept_training", "n_draws_others", 1, "2 or more"),
        ("03_concept_training", "n_draws", 1, "2 or more"),
        ("03_concept_training", "n_fresh", -1, "0 or more"),
        ("01_nlp_shapley", "budgets", [], WHOLE),
        ("01_nlp_shapley", "budgets", [25, 0], WHOLE),
        ("01_nlp_shapley", "budgets", [25, "a"], WHOLE),
        ("01_nlp_shapley", "budgets", [True], WHOLE),
        ("02_vit_shapley", "patch_counts", [], WHOLE),
        ("04_tcav", "heatmap_layers", [-1], "a list of whole numbers from 0"),
        ("01_nlp_shapley", "sets", [], NAMES),
        ("01_nlp_shapley", "sets", [3], NAMES),
        ("01_nlp_shapley", "sets", ["movies", ""], NAMES),
        ("01_nlp_shapley", "model_ids", [], NAMES),
        ("02_vit_shapley", "model_id", "", "a name"),
        ("04_tcav", "text_set", " ", "a name"),
        ("00_quickstart", "texts", [""], "a list of one or more texts"),
        ("00_quickstart", "texts", [], "a list of one or more texts"),
        ("01_nlp_shapley", "examples", ["good", " "], "a list of texts"),
        ("01_nlp_shapley", "examples", [3], "a list of texts"),
        ("00_quickstart", "images", [3], "a list of files or folders"),
        ("00_quickstart", "concept", "wool", "one of striped, dotted, zigzagged, red, blue, green, yellow"),
        ("01_nlp_shapley", "operator", "mean", "one of mask, delete, pad, attention_mask"),
        ("02_vit_shapley", "operator", "delete", "one of mean, blur, noise"),
        ("05_comparisons", "operator", "erase", "one of mask, delete, pad, attention_mask"),
        ("01_nlp_shapley", "precision", "fp16", "one of float32, bfloat16, float16"),
        ("01_nlp_shapley", "device", "gpu", DEVICES),
        ("01_nlp_shapley", "device", "cuda:", DEVICES),
        ("02_vit_shapley", "ks", [0, 0.1, 0.2, 0.5], PERCENTS),
        ("02_vit_shapley", "ks", [0, 10, 20, 50, 101], PERCENTS),
        ("02_vit_shapley", "ks", [-1, 0, 10, 20, 50], PERCENTS),
        ("02_vit_shapley", "ks", ["0", 10, 20, 50], PERCENTS),
        *(
            ("02_vit_shapley", "ks", [k for k in (0, 10, 20, 50) if k != at], PERCENTS)
            for at in (0, 10, 20, 50)
        ),
        ("04_tcav", "targets", [], LINES),
        ("04_tcav", "targets", ["zebra striped"], LINES),
        ("04_tcav", "targets", ["zebra: "], LINES),
        ("04_tcav", "targets", ["zebra: striped: dotted"], LINES),
        ("03_concept_training", "concepts", ["striped", "dotted"], FAMILIES),
        ("03_concept_training", "concepts", [["striped"]], FAMILIES),
        (
            "03_concept_training",
            "kinds",
            ["logistc"],
            "a list of some of logistic, pattern, fisher, mean_differ",
        ),
    ],
)
def test_value_out_of_range_is_refused(notebook, parameter, value, must):
    with pytest.raises(ValueError) as error:
        plan_run("default", [notebook], {parameter: value})
    assert str(error.value).startswith(f"parameter {parameter!r} of {notebook} must be {must}")
    assert str(error.value).endswith(f", not {value!r}") and "\n" not in str(error.value)


def test_figures_go_where_output_puts_them():
    with pytest.raises(ValueError, match="must be left out: figures_dir is where --output puts it"):
        plan_run("default", ["01_nlp_shapley"], {"figures_dir": "elsewhere"})


@pytest.mark.parametrize(
    "given", [{"n_selection": 80}, {"n_samples": 32}, {"n_samples": 5, "n_selection": 6}]
)
def test_some_sentences_are_left_to_report_on(given):
    with pytest.raises(ValueError, match="parameter 'n_selection' of 06_checks must be below n_samples = "):
        plan_run("default", overrides=given)


def test_models_are_one_for_all_sets_or_one_for_each():
    with pytest.raises(
        ValueError, match="'model_ids' of 01_nlp_shapley must name one for all 4 sets, or one fo"
    ):
        plan_run("default", overrides={"model_ids": ["a/b", "c/d"]})
    plan_run("default", overrides={"model_ids": ["a/b", "c/d"], "sets": ["sst2", "imdb"]})


def test_values_at_the_edge_pass():
    given = {"n_shap": 0, "n_shapley_input": 0, "seed": 0, "n_random": 1, "device": "cuda:1", "budgets": [1]}
    assert plan_run("default", ["01_nlp_shapley"], given)["01_nlp_shapley"] == given
    given = {"ks": [0, 10, 12.5, 20, 50, 100], "images_dir": "", "operator": "noise"}
    assert plan_run("default", ["02_vit_shapley"], given)["02_vit_shapley"] == given
    given = {"n_fresh": 0, "kinds": ["fisher"], "cavs_path": ""}
    assert plan_run("default", ["03_concept_training"], given)["03_concept_training"] == given


def test_model_id_of_the_quick_start_is_not_taken_from_what_all_notebooks_get():
    plan = plan_run("default", overrides={"model_id": "my/vit", "image_model_id": "my/vit"})
    assert (
        plan["00_quickstart"] == {"image_model_id": "my/vit"}
        and plan["02_vit_shapley"]["model_id"] == "my/vit"
    )
    assert plan_run("default", ["00_quickstart"], {"model_id": "my/bert"}) == {
        "00_quickstart": {"model_id": "my/bert"}
    }


def test_pictures_of_the_working_directory_become_absolute(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "own.png").touch()
    monkeypatch.chdir(tmp_path)
    given = {"images": ["own.png", "mine", "nowhere.png"]}
    found = plan_run("default", ["00_quickstart"], given)["00_quickstart"]["images"]
    assert found == [f"{tmp_path}/own.png", f"{tmp_path}/mine", "nowhere.png"]


def test_own_values_of_the_notebooks_are_in_range():
    for name in parameters.notebook_names():
        kinds = parameters.notebook_parameters(name)
        own = {key: parameters.notebook_default(name, key) for key in kinds if key != "figures_dir"}
        assert plan_run("default", [name], own) == {name: own}


def test_choices_are_those_of_the_helpers():
    choices = {name: about.get("enum") for name, about in parameters.RANGES.items()}
    assert choices["operator"] == list(faithfulness.OPERATORS)
    assert choices["02_vit_shapley.operator"] == list(images.PATCH_OPERATORS)
    assert choices["precision"] == list(models.PRECISIONS)
    assert parameters.RANGES["kinds"]["items"]["enum"] == list(tcav.KINDS)


@pytest.mark.parametrize("profile", ["smoke", "default", "paper"])
def test_committed_profiles_fit_the_committed_notebooks(profile):
    assert list(plan_run(profile)) == parameters.notebook_names()


def test_checking_needs_no_heavy_library():
    code = (
        "import sys, json, workflow.parameters as p; p.plan_run('paper'); print(json.dumps([*sys.modules]))"
    )
    said = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=parameters.ROOT
    )
    assert not {"torch", "transformers", "datasets", "pandas", "huggingface_hub"} & set(
        json.loads(said.stdout)
    )


# Folders of the working directory


def test_input_is_found_from_the_working_directory_else_from_the_root(tmp_path, monkeypatch):
    (tmp_path / "figures").mkdir()
    monkeypatch.chdir(tmp_path)
    assert paths.local_path("figures") == paths.local_folder("figures") == tmp_path / "figures"
    assert paths.local_path("notebooks") == parameters.ROOT / "notebooks"
    assert paths.local_path(tmp_path / "nowhere") == tmp_path / "nowhere"
    assert paths.local_folder("nowhere") is None
    assert paths.project_path("figures") == parameters.ROOT / "figures"  # where outputs go, wherever we are


def test_relative_folder_of_the_working_directory_becomes_absolute(tmp_path, monkeypatch):
    for folder in ("work/models/mine", "work/sets/mine", "work/pictures", "work/movies"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work")
    sets = ["sets/mine", "sets/mine_short", "movies", "stanfordnlp/imdb", str(tmp_path)]
    given = {"model_ids": ["models/mine"], "sets": sets}
    here = str(tmp_path / "work")
    assert plan_run("default", ["01_nlp_shapley"], given)["01_nlp_shapley"] == {
        "model_ids": [f"{here}/models/mine"],
        "sets": [f"{here}/sets/mine", f"{here}/sets/mine_short", *sets[2:]],
    }
    given = {"images_dir": "pictures", "model_id": "data/models/concept_vit"}
    found = plan_run("default", ["02_vit_shapley"], given)["02_vit_shapley"]
    assert found == {"images_dir": f"{here}/pictures", "model_id": "data/models/concept_vit"}
    monkeypatch.chdir(parameters.ROOT)
    given = {"images_dir": "figures", "model_id": "data/models/concept_vit"}
    assert plan_run("default", ["02_vit_shapley"], given)["02_vit_shapley"] == given


# Grids


def test_grid_is_the_product_of_its_lists_and_single_runs(collection, grid):
    write_profile(collection, "small", "all: {level: 0.25}")
    path = grid("""
        profile: small
        notebooks: 01_first
        parameters: {n_samples: [4, 6], sets: [[a], [b, c]]}
        runs: [{notebooks: [02_second, 01_first], parameters: {seed: 7}}, {parameters: {seed: 8}}]
    """)
    runs = plan_grid(path)
    assert [about["varied"] for about in runs.values()] == [
        {"n_samples": 4, "sets": ["a"]},
        {"n_samples": 4, "sets": ["b", "c"]},
        {"n_samples": 6, "sets": ["a"]},
        {"n_samples": 6, "sets": ["b", "c"]},
        {"seed": 7},
        {"seed": 8},
    ]
    chosen = [list(about["plan"]) for about in runs.values()]
    assert chosen == [["01_first"]] * 4 + [["01_first", "02_second"], ["01_first"]]
    assert all(about["plan"]["01_first"] == {"level": 0.25, **about["varied"]} for about in runs.values())


def test_runs_have_names_that_can_be_read_and_stay(collection, grid):
    first = list(plan_grid(grid("parameters: {n_samples: [4], name: ['a/b c']}")))
    more = list(plan_grid(grid("parameters: {n_samples: [3, 4], name: ['a/b c', 'a_b_c']}")))
    assert first[0].startswith("n_samples=4,name=a_b_c-") and first[0] in more and len(set(more)) == 4
    write_profile(collection, "small", "all: {level: 0.25}")
    other = grid("profile: small\nparameters: {n_samples: [4], name: ['a/b c']}")
    assert first[0] not in plan_grid(other)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "grid.yaml is empty; name parameters with lists of values, or runs"),
        ("notebooks: [01_first]", "grid.yaml is empty"),
        ("parameters: {}", "grid.yaml is empty"),
        ("parameters: {seed: []}", "grid.yaml: 'seed' must be a list of values to try, not []"),
        ("parameters: {seed: 3}", "grid.yaml: 'seed' must be a list of values to try, not 3"),
        ("parameters: {sed: [1]}", "grid.yaml: parameter 'sed' is unknown; did you mean 'seed'?"),
        ("parameters: {seed: [1, x]}", "grid.yaml: parameter 'seed' must be int, not 'x'"),
        ("parameters: {seed: [0, -1]}", "grid.yaml: parameter 'seed' of 01_first must be 0 or more, not -1"),
        (
            "parameters: {sets: [a, b]}",
            "'sets' must be list, not 'a', such as '[a]'; in a grid, each of its values is a list",
        ),
        (
            "notebooks: [01_frist]\nparameters: {seed: [1]}",
            "notebook '01_frist' is unknown; did you mean '01_f",
        ),
        ("runs: [{parameters: {seed: x}}]", "grid.yaml: parameter 'seed' must be int, not 'x'"),
        (
            "runs: [{parameter: {seed: 1}}]",
            "key of grid.yaml 'parameter' is unknown; did you mean 'parameters'?",
        ),
        (
            "runs: [01_first]",
            "grid.yaml must map some of notebooks, parameters to their values, not be '01_first'",
        ),
        ("parametres: {seed: [1]}", "key of grid.yaml 'parametres' is unknown; did you mean 'parameters'?"),
        ("- seed", "grid.yaml must map some of profile, notebooks, parameters, runs"),
        ("profile: [smoke]\nparameters: {seed: [1]}", "grid.yaml: 'profile' must be a str, not ['smoke']"),
        (
            "parameters:\n  seed: [1, 2\n",
            "grid.yaml is not valid YAML: line 3, column 1: expected ',' or ']'",
        ),
    ],
)
def test_bad_grid_is_told_in_one_line(grid, text, said):
    with pytest.raises(ValueError) as error:
        plan_grid(grid(text))
    assert said in str(error.value) and "\n" not in str(error.value)


def test_missing_grid_or_profile_of_it_is_said(collection, grid):
    with pytest.raises(FileNotFoundError, match="grid 'nowhere.yaml' does not exist"):
        plan_grid("nowhere.yaml")
    with pytest.raises(FileNotFoundError, match="profile 'smok' does not exist"):
        plan_grid(grid("profile: smok\nparameters: {seed: [1]}"))


def test_committed_grids_fit_the_committed_notebooks():
    grids = list((parameters.ROOT / "workflow" / "grids").glob("*.yaml"))
    assert grids and all(len(plan_grid(grid)) > 1 for grid in grids)
