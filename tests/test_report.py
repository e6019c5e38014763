"""The reading edition: links and pictures are there, no network is needed, formulas are MathML, code can be
hidden.
"""

import base64
import io
import json
import re
import shutil
import subprocess
from urllib.parse import unquote, urlsplit

import nbformat
import pytest
from bs4 import BeautifulSoup
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image

from helpers.paths import PROJECT_ROOT
from report.render import render
from workflow.parameters import NOTEBOOKS, notebook_names

BROWSER = next(
    filter(None, map(shutil.which, ["chromium", "chromium-browser", "google-chrome", "chrome"])), None
)
PROBE = """<script>addEventListener("load", () => {
  const inputs = () => [...document.querySelectorAll(".input")].filter(input => input.offsetHeight).length;
  const seen = {
    page: location.pathname.split("/").pop(),
    overflow: document.documentElement.scrollWidth - innerWidth,
    width: innerWidth,
    pictures: document.images.length,
    missing: [...document.images].filter(image => !image.naturalWidth).map(image => image.src),
    squeezed: [...document.querySelectorAll("figure img")]
      .filter(image => image.width < Math.min(image.naturalWidth, 600)).length,
    formulas: document.querySelectorAll("math").length,
    flat: [...document.querySelectorAll("math")]
      .filter(formula => !formula.getBoundingClientRect().width).length,
    loaded: performance.getEntriesByType("resource").map(entry => entry.name),
    code: inputs(),
  };
  document.getElementById("hide-code")?.click();
  seen.hidden = inputs();
  seen.prose = document.querySelectorAll(".text_cell").length;
  parent.postMessage(seen, "*");
});</script>"""
FRAMES = """<!DOCTYPE html><meta charset="utf-8"><script>
addEventListener("message",
  event => document.getElementById("seen").append(JSON.stringify(event.data) + "\\n"));
</script><pre id="seen"></pre>"""


def parse(path):
    return BeautifulSoup(path.read_text(encoding="utf8"), "html.parser")


def picture(width=40, height=20):
    drawn = io.BytesIO()
    Image.effect_noise((width, height), 50).save(drawn, "PNG")
    return new_output("display_data", {"image/png": base64.b64encode(drawn.getvalue()).decode()})


def executed(source, outputs=(), count=1):
    return new_code_cell(source, execution_count=count, outputs=list(outputs))


def write(folder, **notebooks):
    (folder / "notebooks").mkdir(parents=True, exist_ok=True)
    for name, cells in notebooks.items():
        opening = (
            f"# Title of {name}\n\n**Question.** Why *this*?\n\nRun time: about 1.5 minutes. Next: more."
        )
        notebook = new_notebook(cells=[new_markdown_cell(opening), *cells])
        nbformat.write(notebook, folder / "notebooks" / f"{name.lstrip('_')}.ipynb")
    return folder


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


@pytest.fixture(scope="module")
def edition(tmp_path_factory):
    """The committed collection, rendered once."""
    return render(PROJECT_ROOT, tmp_path_factory.mktemp("report") / "edition").parent


@pytest.fixture(scope="module")
def pages(edition):
    return {path.name: parse(path) for path in sorted(edition.glob("*.html"))}


# The committed collection


def test_every_link_and_picture_is_there(edition, pages):
    ids = {name: [tag["id"] for tag in page.select("[id]")] for name, page in pages.items()}
    for name, page in pages.items():
        assert len(ids[name]) == len(set(ids[name])), name
        for tag in page.select("[href], [src]"):
            link = urlsplit(tag.get("href", tag.get("src")))
            if link.scheme:
                assert tag.name == "a" and link.scheme == "https", tag
                continue
            assert not link.path or (edition / unquote(link.path)).is_file(), tag
            assert not link.fragment or {link.fragment, unquote(link.fragment)} & set(
                ids[link.path or name]
            ), tag


def test_nothing_is_loaded_from_a_network(edition, pages):
    style = (edition / "style.css").read_text()
    assert "http" not in style and "@import" not in style and "url(" not in style
    for name, page in pages.items():
        assert not page.select(
            "script[src], iframe, object, embed, img[srcset], link:not([href='style.css'])"
        ), name
        for text in [tag.get_text() for tag in page.select("script, style")]:
            assert "http" not in text and "import" not in text and "url(" not in text


def test_index_shows_each_notebook_with_picture_question_and_run_time(edition, pages):
    cards = pages["index.html"].find_all("article")
    assert [card.h2.a["href"] for card in cards] == [f"{name}.html" for name in notebook_names()]
    for card, name in zip(cards, notebook_names(), strict=True):
        opening = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4).cells[0].source
        assert card.h2.get_text() == opening.splitlines()[0].removeprefix("# ")
        question, time = card.find_all("p")
        assert question.get_text().endswith("?") and not question.get_text().startswith("Question")
        assert time.get_text().startswith("Run time: about") and time.get_text().endswith(".")
        with Image.open(edition / card.img["src"]) as thumbnail:
            assert card.img["src"].startswith(f"pictures/{name}") and thumbnail.width > 300
    readme = (PROJECT_ROOT / "README.md").read_text().splitlines()[0]
    assert (
        pages["index.html"].title.get_text() == pages["index.html"].h1.get_text() == readme.removeprefix("# ")
    )
    assert pages["index.html"].select_one(".lead").get_text().endswith(".")


def test_pages_lead_to_their_neighbours_and_sections(pages):
    names = [f"{name}.html" for name in notebook_names()]
    for before, name, after in zip([None, *names], names, [*names[1:], None], strict=False):
        bar = pages[name].select_one(".bar")
        for direction, neighbour in (("prev", before), ("next", after)):
            found = bar.select_one(f"a[rel={direction}]")
            assert (found and found["href"]) == neighbour
        assert bar.select_one("a[href='index.html']")
        headings = [heading.get_text() for heading in pages[name].select("main h2")]
        assert [f"{link.get_text()}¶" for link in bar.select("details a")] == headings and len(headings) > 3


def test_every_formula_became_mathml(pages):
    for name in notebook_names():
        cells = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4).cells
        prose = "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
        formulas = re.findall(r"\$\$.+?\$\$|\$[^$]+\$", re.sub(r"`[^`\n]+`", "", prose), re.DOTALL)
        page = pages[f"{name}.html"]
        found = page.find_all("math")
        assert len(found) == len(formulas)
        assert formulas or name[:2] in ("00", "05", "06")  # those that introduce no method
        assert len(page.select("math[display=block]")) == sum(
            formula.startswith("$$") for formula in formulas
        )
        assert not page.select("merror")
        prose = [text for text in page.main.find_all(string=True) if not text.find_parent(["pre", "code"])]
        assert not re.search(r"\$|\\[a-zA-Z]+", "".join(prose))


def test_pages_are_accessible(pages):
    for name, page in pages.items():
        assert page.html["lang"] == "en" and page.select_one("meta[name=viewport]"), name
        levels = [int(heading.name[1]) for heading in page.select("h1, h2, h3, h4")]
        assert levels[0] == 1 and levels.count(1) == 1
        assert all(deeper - level <= 1 for level, deeper in zip(levels, levels[1:], strict=False))
        for image in page.find_all("img"):
            assert (
                re.match(r"Figure( \w+)?: \S.{15,}", image["alt"], re.DOTALL)
                and image["width"]
                and image["height"]
            )
        for table in page.find_all("table"):
            assert "wide" in table.parent["class"] and table.parent["tabindex"] == "0"


def test_code_can_be_hidden_without_prose_and_outputs(edition, pages):
    style = (edition / "style.css").read_text()
    [rule] = re.findall(r"body:has\(#(\S+):checked\) (\S+) \{ display: none; \}", style)
    assert rule == ("hide-code", ".input")
    for name in notebook_names():
        page = pages[f"{name}.html"]
        [control] = page.select("label input[type=checkbox]#hide-code")
        assert control.parent.get_text().strip() == "Hide code"
        assert len(page.select(".input pre")) > (5 if name == "00_quickstart" else 10)
        assert not page.select(".input img, .input table, .input .formula, .input .text_cell")


@pytest.mark.skipif(not BROWSER, reason="no Chromium here")
def test_pages_work_in_a_browser_on_a_narrow_screen_with_the_network_closed(edition, pages, tmp_path):
    folder = shutil.copytree(edition, tmp_path / "edition")
    names = sorted(path.name for path in folder.glob("*.html"))
    for name in names:
        page = folder / name
        page.write_text(
            page.read_text(encoding="utf8").replace("</body>", f"{PROBE}</body>"), encoding="utf8"
        )
    frames = [
        f'<iframe src="{name}" style="width: 390px; height: 800px; border: 0"></iframe>' for name in names
    ]
    (folder / "frames.html").write_text(FRAMES + "".join(frames), encoding="utf8")
    command = [
        BROWSER,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--host-resolver-rules=MAP * ~NOTFOUND",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--virtual-time-budget=20000",
        "--dump-dom",
        (folder / "frames.html").as_uri(),
    ]
    dumped = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    seen = [json.loads(line) for line in BeautifulSoup(dumped, "html.parser").pre.get_text().splitlines()]
    assert sorted(page["page"] for page in seen) == names
    for page in seen:
        assert page["width"] == 390 and page["overflow"] <= 0, page
        assert page["pictures"] and not page["missing"], page
        assert all(loaded.startswith("file:") for loaded in page["loaded"]), page
        if page["page"] != "index.html":
            assert page["formulas"] == len(pages[page["page"]].find_all("math")) and page["flat"] == 0, page
            assert page["code"] > 10 and page["hidden"] == 0 and page["prose"] > 10, page
            assert page["squeezed"] == 0, page  # figures scroll


# Small notebooks


def test_links_lead_into_the_edition_or_become_text(tmp_path):
    (tmp_path / "secret.txt").write_text("private")
    source = tmp_path / "project"
    (source / "figures").mkdir(parents=True)
    (source / "figures" / "a b.csv").write_text("1,2")
    Image.new("RGB", (2, 2)).save(source / "figures" / "near.png")
    text = (
        "[other](02_other.ipynb#Its-heading), `02_other`, `01_first`, [table](../figures/a%20b.csv), "
        "[gone](gone.ipynb), [web](https://example.org/x.ipynb), [here](#My-part), "
        "[secret](../../secret.txt), "
        "![lost](lost.png), ![far](https://example.org/far.png), ![near](../figures/near.png)\n\n## My part"
    )
    write(source, _01_first=[new_markdown_cell(text)], _02_other=[new_markdown_cell("## Its heading")])
    target = render(source, tmp_path / "edition").parent
    page = parse(target / "01_first.html")
    links = [(link.get_text(), link["href"]) for link in page.select(".text_cell p a")]
    assert links == [
        ("other", "02_other.html#Its-heading"),
        ("02_other", "02_other.html"),
        ("table", "files/figures/a b.csv"),
        ("web", "https://example.org/x.ipynb"),
        ("here", "#My-part"),
    ]
    assert page.select_one("#My-part") and parse(target / "02_other.html").select_one("#Its-heading")
    assert "gone, web, here, secret, lost, far, " in page.main.get_text()
    assert [(image["src"], image["alt"]) for image in page.find_all("img")] == [
        ("files/figures/near.png", "near")
    ]
    assert (target / "files" / "figures" / "near.png").is_file()
    assert (target / "files" / "figures" / "a b.csv").read_text() == "1,2"
    assert not list(target.rglob("*secret*"))


def test_pictures_are_files_at_full_size_and_the_richest_is_the_thumbnail(tmp_path):
    cells = [
        executed('save_figure(f, figures, "small")', [picture(40, 20)]),
        new_markdown_cell("Read as falling. And more."),
        executed('save_figure(f, figures, "large")', [picture(300, 200)], count=2),
        new_markdown_cell("## Next part\n\nAbout something else."),
    ]
    target = render(write(tmp_path, _01_first=cells), tmp_path / "edition").parent
    small, large = parse(target / "01_first.html").select("figure > a > img")
    assert (
        small["alt"] == "Figure small: Read as falling." and large["alt"] == "Figure large: Read as falling."
    )
    assert (small["width"], small["height"], large["width"]) == ("40", "20", "300")
    assert small.parent["href"] == small["src"] != large["src"]
    with Image.open(target / large["src"]) as shown:
        assert shown.size == (300, 200)
    index = parse(target / "index.html")
    assert index.article.img["src"] == large["src"]
    assert [p.get_text() for p in index.article.find_all("p")] == [
        "Why this?",
        "Run time: about 1.5 minutes.",
    ]


def test_formulas_and_scripts(tmp_path):
    widget = {"application/vnd.jupyter.widget-view+json": {"model_id": "x"}, "text/plain": "plain words"}
    script = {"application/javascript": "alert(1)", "text/plain": "more words"}
    table = {
        "text/html": "<script src='https://example.org/x.js'></script><table><tr><td>last "
        "words</td></tr></table>"
    }
    formula = r"\begin{aligned} a &= \texttt{b} \\ c &= \lVert d \rVert \end{aligned}"
    cells = [
        new_markdown_cell(f"Inline $x_i^2$.\n\n$${formula}$$"),
        executed("show()", [new_output("display_data", data) for data in (widget, script, table)]),
    ]
    page = parse(render(write(tmp_path, _01_first=cells), tmp_path / "edition").with_name("01_first.html"))
    inline, block = page.find_all("math")
    assert inline.msubsup and len(block.find_all("mtr")) == 2 and block.parent["class"] == ["formula"]
    outputs = [output.get_text().strip() for output in page.select(".output_area")]
    assert outputs == ["plain words", "more words", "last words"]
    assert not page.main.script and page.select_one("div.wide > table")


def test_two_renders_give_the_same_bytes(tmp_path):
    cells = [new_markdown_cell("$x$"), executed("draw()", [picture(), picture()])]
    source = write(tmp_path, _01_first=cells, _02_other=cells[:1])
    first = contents(render(source, tmp_path / "one").parent)
    assert first == contents(render(source, tmp_path / "two").parent)
    pictures = {"pictures/01_first_2_0.png", "pictures/01_first_2_1.png"}
    assert set(first) == {"index.html", "style.css", "01_first.html", "02_other.html"} | pictures


def test_an_earlier_edition_is_replaced_with_its_stale_pages_and_nothing_else_is_left(tmp_path):
    source = write(tmp_path / "project", _01_first=[], _02_other=[])
    assert render(source, tmp_path / "edition") == tmp_path / "edition" / "index.html"
    (source / "notebooks" / "02_other.ipynb").unlink()
    render(source, tmp_path / "edition")
    assert set(contents(tmp_path / "edition")) == {"index.html", "style.css", "01_first.html"}
    assert {path.name for path in tmp_path.iterdir()} == {"project", "edition"}
    assert "02_other" not in (tmp_path / "edition" / "index.html").read_text()


@pytest.mark.parametrize("file", ["thesis.txt", "index.html"])
def test_a_folder_of_something_else_is_refused_and_kept(tmp_path, file):
    source, target = write(tmp_path / "project", _01_first=[]), tmp_path / "mine"
    target.mkdir()
    (target / file).write_text("years of work")
    with pytest.raises(ValueError, match=r"mine.*name a new folder"):
        render(source, target)
    assert contents(target) == {file: b"years of work"}
    with pytest.raises(ValueError, match="name a new folder"):
        render(source, target / file)


def test_no_notebooks(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no notebooks.*attention run"):
        render(tmp_path, tmp_path / "edition")
    assert not (tmp_path / "edition").exists()


def test_a_notebook_that_has_not_been_executed_is_named(tmp_path):
    source = write(tmp_path, _01_first=[executed("x")], _02_other=[executed("x"), new_code_cell("y")])
    with pytest.raises(ValueError, match="02_other has not been executed.*make figures.*attention run"):
        render(source, tmp_path / "edition")
    assert not (tmp_path / "edition").exists()


def test_a_formula_that_cannot_be_set_is_shown_with_its_notebook(tmp_path):
    source = write(tmp_path, _01_first=[new_markdown_cell(r"$\nosuchcommand$")])
    with pytest.raises(ValueError, match=r"01_first holds a formula(?s:.*)nosuchcommand"):
        render(source, tmp_path / "edition")


def test_a_notebook_that_stopped_is_shown_as_far_as_it_came(tmp_path):
    note = new_markdown_cell("An Exception was encountered", metadata={"tags": ["papermill-error-cell-tag"]})
    error = new_output(
        "error", ename="ValueError", evalue="no <such> model", traceback=["ValueError: no <such> model"]
    )
    source = write(
        tmp_path, _01_first=[note, executed("x", [error]), new_code_cell("never ran")], _02_other=[]
    )
    target = render(source, tmp_path / "edition").parent
    for page in (parse(target / "01_first.html"), parse(target / "index.html").article):
        assert "ValueError: no <such> model" in page.select_one("p.error").get_text()
    assert "An Exception" not in (target / "01_first.html").read_text()
    assert not parse(target / "02_other.html").select(".error")
