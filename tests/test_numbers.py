"""What README and the notebooks say of the committed run stands in the tables and results beside the figures.

A paragraph that begins with "In the committed run" tells what came out. Each of its numbers must be found,
rounded as it is written, in a line of figures/**/*.csv or under a key of results.json that its cell names.
Other prose is true of every run, so it holds no decimal number that the notebook's code does not hold.
"""

import csv
import json
import re
from functools import cache

import nbformat
import pytest

from workflow.execute import FINDING
from workflow.parameters import NOTEBOOKS, ROOT, notebook_default, notebook_names, notebook_parameters

FIGURES = ROOT / "figures"
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
COMMON = {
    "mean",
    "low",
    "high",
    "method",
    "set",
    "sets",
    "share",
    "value",
    "the",
    "and",
    "all",
    "n",
    "one",
    "per",
}


def simple(text):
    return re.sub(r"[^a-z0-9]", "", text.lower())


def names(texts):
    """Return what a line or key may be called by: each text whole, and its words."""
    words = {simple(part) for text in texts for part in (text, *re.split(r"[^A-Za-z0-9]+", text))}
    return {word for word in words if len(word) > 2 and not word.isdigit()} - COMMON


def as_number(text):
    try:
        return float(text)
    except ValueError:
        return None


@cache
def facts(folder):
    """Return the (number, names) of every cell of a folder's tables and every value of its results."""
    found = []
    for path in sorted((FIGURES / folder).glob("*.csv")):
        headers = {}
        for row in csv.reader(path.open(encoding="utf8")):
            told = [(place, as_number(cell), cell) for place, cell in enumerate(row)]
            texts = [cell for _, number, cell in told if number is None and cell]
            if len(texts) == len([cell for cell in row if cell]):
                headers.update({place: [*headers.get(place, []), cell] for place, _, cell in told if cell})
            lines = texts or [path.stem]
            found += [(v, names([*lines, *headers.get(place, [])])) for place, v, _ in told if v is not None]
    results = FIGURES / folder / "results.json"
    stack = [(json.loads(results.read_text()), [])] if results.exists() else []
    while stack:
        part, keys = stack.pop()
        if isinstance(part, dict | list):
            pairs = part.items() if isinstance(part, dict) else enumerate(part)
            stack += [(inner, [*keys, str(key)] if isinstance(part, dict) else keys) for key, inner in pairs]
        elif isinstance(part, int | float) and not isinstance(part, bool):
            found.append((float(part), names(keys)))
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


def agrees(value, decimals, percent, fact):
    """Whether a fact, rounded, is the number as written; signs are told in words as often as not."""
    scales = (1, 100) if percent else (1,)
    half = 0.5 * 10.0**-decimals * (1 + 1e-9)
    return any(abs(abs(fact) * scale - abs(value)) <= half for scale in scales)


def unfounded(cell, paragraph, folders, free=()):
    """Return the numbers of a paragraph that no line or key named in the cell holds."""
    said, missing = simple(cell), []
    for written, value, decimals, percent in read_numbers(paragraph):
        if not percent and (value in free or (not decimals and abs(value) < 13)):
            continue
        known = (
            agrees(value, decimals, percent, fact) and any(word in said for word in words)
            for folder in folders
            for fact, words in facts(folder)
        )
        if not any(known):
            missing.append(written)
    return missing


def paragraphs(text):
    return re.split(r"\n\s*\n", text)


def prose(name):
    cells = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4).cells
    return [cell.source for cell in cells if cell.cell_type == "markdown"]


def parameter_numbers(name):
    """Return the numbers among a notebook's own values of its parameters."""
    values = [notebook_default(name, parameter) for parameter in notebook_parameters(name)]
    flat = [one for value in values for one in (value if isinstance(value, list) else [value])]
    return {float(one) for one in flat if isinstance(one, int | float)}


@pytest.mark.parametrize("name", notebook_names())
def test_findings_of_the_committed_run_are_in_its_tables(name):
    wrong = {}
    for cell in prose(name):
        others = [f for f in notebook_names() if re.search(rf"\b{f[:2]}\b", cell)]
        folders = dict.fromkeys([name, *others, *(["networks"] if "network" in cell else [])])
        for paragraph in filter(FINDING.match, paragraphs(cell)):
            missing = unfounded(cell, paragraph, folders, parameter_numbers(name))
            wrong |= {paragraph[:80]: missing} if missing else {}
    assert not wrong


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
    sources = "workflow/profiles/paper.yaml", "pyproject.toml"
    free = {float(n) for file in sources for n in re.findall(r"\b\d+(?:\.\d+)?\b", (ROOT / file).read_text())}
    folders, wrong = [*notebook_names(), "networks"], {}
    for section in re.split(r"^## ", text, flags=re.MULTILINE):
        for paragraph in paragraphs(section):
            missing = unfounded(section, paragraph, folders, free)
            wrong |= {paragraph[:80]: missing} if missing else {}
    assert not wrong and any(map(FINDING.match, paragraphs(text)))


@pytest.mark.parametrize(
    "said, wrong",
    [
        ("attention .653 and plain .977", []),
        ("attention .654", [".654"]),
        ("a miss of .653", [".653"]),
        ("attention 65 %", []),
        ("attention 66 %", ["66 %"]),
        ("attention −.65, in section 4.3, Figure 4.1, 2025, and `0.123`", []),
        ("attention on 960 images", ["960"]),
        ("plain attention on 12 layers", []),
    ],
)
def test_a_number_counts_only_where_its_line_is_named(said, wrong, tmp_path, monkeypatch):
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "truth.csv").write_text("average,AUC\nattention,0.652778\nplain,0.976852\n")
    monkeypatch.setattr("test_numbers.FIGURES", tmp_path)
    facts.cache_clear()
    assert unfounded(said, said, ["one"]) == wrong
    facts.cache_clear()
