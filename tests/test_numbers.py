"""What README and the notebooks say of the committed run stands in the tables and results beside the figures.

A paragraph that begins with "In the committed run" tells what came out. For each of its numbers findings.csv
names the cell of figures/**/*.csv, or the key of results.json, that it is read from; it has to be there,
rounded as it is written. Other prose is true of every run, so it holds no decimal number that the notebook's
code does not hold.
"""

import csv
import json
import re
from functools import cache
from pathlib import Path

import nbformat
import pytest

from workflow.execute import FINDING, paragraphs
from workflow.parameters import NOTEBOOKS, ROOT, notebook_default, notebook_names, notebook_parameters

LEFT_OUT = [
    *(r"```.*?```", r"`[^`]*`", r"\$\$.*?\$\$", r"\$[^$]*\$", r"\]\([^)]*\)", r"<[^>]+>", r"arXiv[: ]*\S+"),
    *(
        r"\b(?:19|20)\d\d\b",
        r"\b0\d_\w+",
        r"(?:[Ss]ections?|[Ff]igures?|§) *\d\.\d+(?:(?:,| and| to) \d\.\d+)*",
    ),
    *(r"^#+ .*?$", r"\b[A-Za-z]+-?\d+(?:-[A-Za-z]+)?\b", r"\b\d{3,4} ?(?:px|GiB|MiB)"),
]
NUMBER = re.compile(r"(?<![\w.])([−-]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?)(?=( ?%)?)(?![\w])")


def as_number(text):
    try:
        return float(text)
    except ValueError:
        return None


@cache
def facts(file):
    """Return {place: numbers} of a table, or of results, whose places are their keys.

    A table's place is the words of its line, its whole numbers before, and the words above.
    """
    found = {}
    path = ROOT / "figures" / file
    if path.suffix == ".json":
        stack = [(json.loads(path.read_text()), [])]
        while stack:
            part, keys = stack.pop()
            if isinstance(part, dict | list):
                pairs = part.items() if isinstance(part, dict) else enumerate(part)
                stack += [(inner, [*keys, str(key)]) for key, inner in pairs]
            elif isinstance(part, int | float) and not isinstance(part, bool):
                found.setdefault(" / ".join(keys), []).append(float(part))
        return found
    above = {}
    for line, row in enumerate(csv.reader(path.open(encoding="utf8"))):
        values = [as_number(cell) for cell in row]
        if line == 0 or not row[0] or not any(value is not None for value in values):
            above.update({at: [*above.get(at, []), cell] for at, cell in enumerate(row) if cell})
            continue
        words = [cell for cell, value in zip(row, values, strict=True) if value is None and cell]
        counts = {at: f"{above.get(at, [''])[0]} {cell}" for at, cell in enumerate(row) if cell.isdigit()}
        for at, value in enumerate(values):
            if value is not None:
                others = [said for place, said in counts.items() if place < at]
                names = [word for word in words if "[" not in word]  # no intervals, which are numbers too
                place = " / ".join([*names, *others, *above.get(at, [])])
                found.setdefault(place, []).append(value)
    return found


def read_numbers(text):
    """Return (as written, value, decimals, whether a percentage) of the numbers in a text."""
    for pattern in LEFT_OUT:
        text = re.sub(pattern, " ", text, flags=re.DOTALL | re.MULTILINE)
    found = []
    for written, percent in NUMBER.findall(text):
        if re.search(r"\d", written):
            plain = written.replace(",", "").replace("−", "-")
            found.append((written + percent, float(plain), len(plain.partition(".")[2]), bool(percent)))
    return found


def agrees(written, fact):
    """Whether a fact, rounded, is the number as written; signs are told in words as often as not."""
    [(_, value, decimals, percent)] = read_numbers(written)
    half = 0.5 * 10.0**-decimals * (1 + 1e-9)
    return abs(abs(fact) * (100 if percent else 1) - abs(value)) <= half


def findings(text, free=()):
    """Return the numbers of a text that need a source: all but small counts, and parameters (`free`)."""
    return {
        written
        for written, value, decimals, percent in read_numbers(text)
        if percent or (value not in free and (decimals or abs(value) >= 13))
    }


def sources(name):
    """Return {number as written: [(file, place)]} of README, or of a notebook."""
    lines = csv.DictReader((Path(__file__).parent / "findings.csv").open(encoding="utf8"))
    found = {}
    for line in lines:
        if line["where"] == name:
            found.setdefault(line["number"], []).append((line["file"], line["place"]))
    return found


def wrong_numbers(said, known):
    """Return what is wrong: numbers without a source, sources that say another number, sources of none."""
    wrong = [f"{number} has no source" for number in said - known.keys()]
    wrong += [f"{number} is no longer said" for number in known.keys() - said]
    for number, places in known.items():
        for file, place in places:
            there = facts(file).get(place, [])
            if not any(agrees(number, value) for value in there):
                wrong.append(f"{number} is not {there} in {file}, {place}")
    return wrong


def prose(name):
    cells = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4).cells
    return [cell.source for cell in cells if cell.cell_type == "markdown"]


def parameter_numbers(name):
    """Return the numbers among a notebook's own values of its parameters."""
    values = [notebook_default(name, parameter) for parameter in notebook_parameters(name)]
    flat = [one for value in values for one in (value if isinstance(value, list) else [value])]
    return {float(one) for one in flat if isinstance(one, int | float)}


def told(name):
    """Return the numbers of the findings of a notebook."""
    parts = [part for cell in prose(name) for part in paragraphs(cell) if FINDING.match(part)]
    return set().union(*(findings(part, parameter_numbers(name)) for part in parts))


@pytest.mark.parametrize("name", notebook_names())
def test_findings_of_the_committed_run_are_in_its_tables(name):
    assert not wrong_numbers(told(name), sources(name))


@pytest.mark.parametrize("name", notebook_names())
def test_other_prose_holds_no_number_of_a_run(name):
    cells = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4).cells
    code = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
    held = {abs(float(n)) for n in re.findall(r"(?<![\w.])\d*\.\d+(?:e-?\d+)?|\b\d+\b", code)}
    wrong = {}
    for cell in prose(name):
        for paragraph in (part for part in paragraphs(cell) if not FINDING.match(part)):
            found = [
                w for w, value, decimals, _ in read_numbers(paragraph) if decimals and abs(value) not in held
            ]
            wrong |= {paragraph[:80]: found} if found else {}
    assert not wrong


def test_numbers_of_the_readme_are_in_the_tables():
    """Or in the paper's profile, or, of Python, in pyproject.toml."""
    text = (ROOT / "README.md").read_text(encoding="utf8")
    files = "workflow/profiles/paper.yaml", "pyproject.toml"
    free = {float(n) for file in files for n in re.findall(r"\b\d+(?:\.\d+)?\b", (ROOT / file).read_text())}
    assert not wrong_numbers(findings(text, free), sources("README"))
    assert any(map(FINDING.match, paragraphs(text)))


@pytest.mark.parametrize(
    "said, wrong",
    [
        ("0.65, in section 4.3, Figure 4.1, 2025, and `0.123`, of 12 layers", []),
        ("65 %", []),
        ("0.66", ["0.66 has no source", "0.65 is no longer said"]),
        ("960 and 0.65", ["960 has no source"]),
    ],
)
def test_a_number_needs_its_own_source(said, wrong, tmp_path, monkeypatch):
    (tmp_path / "figures" / "one").mkdir(parents=True)
    (tmp_path / "figures" / "one" / "truth.csv").write_text(
        "average,layer,AUC\nattention,3,0.652778\nplain,3,0.97\n"
    )
    monkeypatch.setattr("test_numbers.ROOT", tmp_path)
    facts.cache_clear()
    place = "one/truth.csv", "attention / layer 3 / AUC"
    known = {"65 %" if "%" in said else "0.65": [place]}
    assert wrong_numbers(findings(said), known) == wrong
    [said_of_plain] = wrong_numbers({"0.65"}, {"0.65": [("one/truth.csv", "plain / layer 3 / AUC")]})
    assert said_of_plain.startswith("0.65 is not [0.97]")
    facts.cache_clear()
