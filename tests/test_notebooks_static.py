"""Every committed notebook keeps to the template: opening, budgets, clean outputs, numbers as in its results
file.
"""

import ast
import json
import re
from functools import cache
from statistics import median

import nbformat
import papermill
import pytest

from workflow.parameters import NOTEBOOKS, ROOT, notebook_names

COLLECTION = [
    *("00_quickstart", "01_nlp_shapley", "02_vit_shapley", "03_concept_training"),
    *("04_tcav", "05_comparisons", "06_checks"),
]
MACHINE_PATH = re.compile(r"(?<![\w.:/-])/(home|root|tmp|work|Users|opt|mnt|var)/\w|[A-Z]:\\\\")
FIGURES = ROOT / "figures"
pytestmark = pytest.mark.parametrize("name", notebook_names())


@cache
def read(name):
    return nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)


def code_cells(name):
    return [cell for cell in read(name).cells if cell.cell_type == "code"]


def prose(name):
    return [cell.source for cell in read(name).cells if cell.cell_type == "markdown"]


def parameters_cell(name):
    [cell] = [cell for cell in read(name).cells if "parameters" in cell.metadata.get("tags", [])]
    return cell


def written(output):
    """What an output says in words; pictures left out."""
    parts = [
        output.get("text", ""),
        *(v for kind, v in output.get("data", {}).items() if not kind.startswith("image")),
    ]
    return "\n".join(map(str, parts))


def saved(name, kind):
    """Names of the figures or tables that a notebook's code saves."""
    return re.findall(
        rf'save_{kind}\(.*?figures, "(\w+)"\)', "\n".join(cell.source for cell in code_cells(name))
    )


def numbers(part):
    """Every number of nested results."""
    if isinstance(part, dict | list):
        return [
            number
            for inner in (part.values() if isinstance(part, dict) else part)
            for number in numbers(inner)
        ]
    return [part] if isinstance(part, int | float) else []


# Opening


def test_opens_with_title_question_method_and_run_time(name):
    first = next(i for i, cell in enumerate(read(name).cells) if cell.cell_type == "code")
    opening = "\n".join(cell.source for cell in read(name).cells[:first])
    assert opening.startswith("# ") and "run time" in opening.lower() and "you will see" in opening.lower()
    assert re.search(r"\(\d{4}\b|et al\.|arxiv\.org", opening), "the method needs its citation"


def test_code_opens_with_imports_parameters_then_validation_and_versions(name):
    imports, parameters, checks = code_cells(name)[:3]
    assert all(
        isinstance(statement, ast.Import | ast.ImportFrom) for statement in ast.parse(imports.source).body
    )
    assert parameters is parameters_cell(name)
    assert any(check in checks.source for check in ("raise ValueError", "check_", "align_labels("))
    said = "".join(written(output) for output in checks.outputs).splitlines()
    [versions] = [line for line in said if "python 3." in line]
    assert "torch " in versions and versions == said[-1]
    assert all(line.endswith(": results of this run") for line in said[:-1])


def test_parameters_are_literals_that_papermill_can_list_with_type_and_help(name):
    statements = ast.parse(parameters_cell(name).source).body  # one a line, or wrapped by the formatter
    listed = papermill.inspect_notebook(str(NOTEBOOKS / f"{name}.ipynb"))
    assert len(listed) == len(statements) > 3
    for statement, (parameter, about) in zip(statements, listed.items(), strict=True):
        value = ast.literal_eval(statement.value)
        assert statement.target.id == parameter and about["help"], parameter
        assert type(value).__name__ == about["inferred_type_name"].split("[")[0], parameter
        assert ast.literal_eval(about["default"]) == value, parameter
    assert {"device", "seed", "figures_dir"} <= set(listed)


def test_later_imports_are_none(name):
    for cell in code_cells(name)[1:]:
        nodes = ast.walk(ast.parse(cell.source))
        assert not [node for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)], cell.source


def test_neighbours_are_named_and_links_lead_somewhere(name):
    place = COLLECTION.index(name)
    texts = prose(name)
    opening, closing = "\n".join(texts[:2]), "\n".join(texts[-2:])
    if place > 0:
        assert COLLECTION[place - 1] in opening, "the previous notebook is not named at the top"
    if place < len(COLLECTION) - 1:
        assert COLLECTION[place + 1] in opening + closing, "the next notebook is not named"
    for target in re.findall(r"\]\((?!https?:|#|mailto:|attachment:)([^)]+)\)", "\n".join(texts)):
        known = target.removesuffix(".ipynb") in COLLECTION or (NOTEBOOKS / target).exists()
        assert known, f"the link to {target} leads nowhere"
    for named in re.findall(r"\b0\d_[a-z_]+", "\n".join(texts)):
        assert named in COLLECTION or any(named in saved(name, kind) for kind in ("figure", "table")), named


# Budgets


def test_length_and_share_of_prose_are_within_budget(name):
    cells = read(name).cells
    fewest, most = (10, 15) if name == "00_quickstart" else (25, 60)  # the quick start is to stay one
    assert fewest <= len(cells) <= most
    assert 0.45 <= len(prose(name)) / len(cells) <= 0.60


def test_code_cells_are_short_and_never_more_than_three_in_a_row(name):
    sizes = [len("".join(cell.source.split())) for cell in code_cells(name)]  # the formatter decides on lines
    assert median(sizes) <= 740 and max(sizes) <= 2250
    kinds = "".join(cell.cell_type[0] for cell in read(name).cells)
    assert "cccc" not in kinds


def test_every_saved_figure_has_a_numbered_caption_right_after(name):
    cells, numbers = read(name).cells, []
    for place, cell in enumerate(cells):
        if cell.cell_type == "code" and "save_figure(" in cell.source:
            after = next(later for later in cells[place + 1 : place + 3] if later.cell_type == "markdown")
            assert (caption := re.match(r"\*\*Figure (\d)\.(\d+)\.\*\* \w", after.source)), after.source
            numbers.append(tuple(map(int, caption.groups())))
    assert numbers == [(int(name[:2]), place + 1) for place in range(len(numbers))]


def test_prose_cells_are_short(name):
    lengths = {}
    for text in prose(name):
        words = re.sub(
            r"```.*?```|\$\$.*?\$\$|^\|.*?$|\]\([^)]*\)", " ", text, flags=re.DOTALL | re.MULTILINE
        )
        lengths[text] = len(re.findall(r"\w[\w'’.-]*", words))
    opening, *others = lengths.values()
    assert opening <= 220 and max(others) <= 100, max(list(lengths)[1:], key=lengths.get)
    assert median(others) <= 65


def test_code_lines_fit_a_page(name):
    lines = [line for cell in code_cells(name) for line in cell.source.splitlines()]
    assert max(map(len, lines)) <= 100, max(lines, key=len)


def test_one_word_for_one_thing(name):
    """A model sees images and has layers; what is drawn of it is a figure."""
    said = [*prose(name), *(cell.source for cell in code_cells(name))]
    others = r"\]\([^)]*\)|https?:\S+|\\b\(.*"  # links, and patterns of words in sentences
    found = [re.findall(r"(?i).*\b(?:picture|block)s?\b.*", re.sub(others, "", text)) for text in said]
    assert not any(found), found


def test_prose_holds_no_placeholder(name):
    text = "\n".join(prose(name))
    assert not re.search(r"TODO|FIXME|XXX|TBD|\?\?", text)
    assert not re.search(r"^\W*[A-Z]{4,}\W*$", text, re.MULTILINE)


# Outputs


def test_cells_ran_once_from_top_to_bottom(name):
    counts = [cell.execution_count for cell in code_cells(name)]
    assert counts == list(range(1, len(counts) + 1))


def test_no_error_no_stderr_and_no_progress_bar_in_the_outputs(name):
    for cell in code_cells(name):
        for output in cell.outputs:
            assert output.output_type != "error" and output.get("name") != "stderr", written(output)
            assert "it/s]" not in written(output) and "widget-view" not in str(output.get("data", {}).keys())


def test_no_path_of_a_machine_in_source_or_outputs(name):
    notebook = read(name)
    texts = [cell.source for cell in notebook.cells] + [str(notebook.metadata)]
    texts += [written(output) for cell in code_cells(name) for output in cell.outputs]
    found = [match.group() for text in texts for match in MACHINE_PATH.finditer(text)]
    assert not found


def test_no_bookkeeping_of_papermill_is_left(name):
    notebook = read(name)
    assert "papermill" not in notebook.metadata and "widgets" not in notebook.metadata
    for cell in notebook.cells:
        assert not {"papermill", "execution"} & set(cell.metadata)
        assert "injected-parameters" not in cell.metadata.get("tags", [])
    nbformat.validate(notebook)


def test_file_is_small_and_has_outputs_to_read(name):
    assert (NOTEBOOKS / f"{name}.ipynb").stat().st_size <= 500_000
    outputs = [output for cell in code_cells(name) for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert all("error" not in output.output_type for output in outputs)


# Figures and results


def test_every_figure_and_table_that_the_code_saves_is_committed(name):
    figures, tables = saved(name, "figure"), saved(name, "table")
    assert figures and tables
    for figure in figures:
        for kind in ("png", "pdf"):
            assert (FIGURES / name / f"{figure}.{kind}").stat().st_size > 5_000
    for table in tables:
        assert (FIGURES / name / f"{table}.csv").read_text().count("\n") > 2


def test_last_cell_saves_the_results_and_quotes_them(name):
    last = code_cells(name)[-1]
    results = json.loads((FIGURES / name / "results.json").read_text())
    assert "save_results(" in last.source
    printed = "".join(written(output) for output in last.outputs)
    assert f"{name}/results.json" in printed
    for quoted in re.findall(r"\{[^{}]*\}", printed):
        assert ast.literal_eval(quoted) in [results, *results.values()], quoted
    decimals = re.findall(r"-?\d+\.\d+", printed)
    assert decimals
    for quoted in decimals:
        places = len(quoted.split(".")[1])
        assert float(quoted) in {round(number, places) for number in numbers(results)}, quoted
