"""The reading edition: links and figures are there, no network is needed, formulas are MathML, code can be
hidden and found.
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
from nbconvert.filters.markdown_mistune import markdown2html_mistune
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
    figures: document.images.length,
    missing: [...document.images].filter(image => !image.naturalWidth).map(image => image.src),
    squeezed: [...document.querySelectorAll("figure img")]
      .filter(image => image.width < Math.min(image.naturalWidth, 600)).length,
    ids: [...document.querySelectorAll("[id]")]
      .filter(tag => tag.getBoundingClientRect().width).map(tag => tag.id),
    links: [...document.querySelectorAll(".index a")].map(link => link.href),
    formulas: document.querySelectorAll("math").length,
    flat: [...document.querySelectorAll("math")]
      .filter(formula => !formula.getBoundingClientRect().width).length,
    loaded: performance.getEntriesByType("resource").map(entry => entry.name),
  };
  if (document.getElementById("hide-code")?.checked) document.getElementById("hide-code").click();
  seen.code = inputs();
  const first = document.querySelector(".input pre")?.textContent.split("\\n")[0];
  document.getElementById("hide-code")?.click();
  seen.hidden = inputs();
  seen.found = Boolean(first) && find(first);
  if (seen.code && !seen.hidden) document.getElementById("hide-code").click();
  seen.prose = document.querySelectorAll(".text_cell").length;
  parent.postMessage(seen, "*");
});</script>"""
FRAMES = """<!DOCTYPE html><meta charset="utf-8"><script>
addEventListener("message",
  event => document.getElementById("seen").append(JSON.stringify(event.data) + "\\n"));
</script><pre id="seen"></pre>"""


def parse(path):
    return BeautifulSoup(path.read_text(encoding="utf8"), "html.parser")


def parse_markdown(text):
    return BeautifulSoup(markdown2html_mistune(text), "html.parser")


def words(tag):
    return " ".join(tag.get_text().rstrip("¶").split())


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


def test_front_page_begins_with_what_the_readme_says_first(edition, pages):
    index = pages["index.html"]
    about = parse_markdown((PROJECT_ROOT / "README.md").read_text(encoding="utf8"))
    assert words(index.title) == words(index.h1) == words(about.h1)
    assert (
        words(about.p).startswith(words(index.select_one(".lead")))
        and index.select_one(".lead").get_text()[-1] in ".?"
    )
    findings = (
        about.find(string=re.compile("What comes out|In the committed run")).find_next("ul").find_all("li")
    )
    assert len(findings) == 3
    assert [words(said) for said in index.select(".glance li")] == [words(finding) for finding in findings]
    [figure] = index.select(".glance figure")
    source = about.img["src"]
    assert (edition / figure.img["src"]).read_bytes() == (PROJECT_ROOT / source).read_bytes()
    assert figure.a["href"].startswith(f"{source.split('/')[1]}.html#figure-")
    assert about.img["alt"] in figure.img["alt"] and len(words(figure.figcaption)) > 20


def test_front_page_leads_to_each_notebook_with_its_question_and_run_time(pages):
    index = pages["index.html"]
    lines = index.select(".notebooks li")
    assert index.select_one("h2 + p a")["href"] == lines[0].a["href"] == f"{notebook_names()[0]}.html"
    assert [line.a["href"] for line in lines] == [f"{name}.html" for name in notebook_names()]
    for line, name in zip(lines, notebook_names(), strict=True):
        opening = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4).cells[0].source
        assert line.a.get_text() == opening.splitlines()[0].removeprefix("# ")
        question, time = line.span.get_text(), line.small.get_text()
        assert question.endswith("?") and not question.startswith("Question")
        assert time.startswith("Run time: about") and time.endswith(".")


def test_gallery_has_every_figure_with_its_cell_parameters_and_data(edition, pages):
    galleries = pages["index.html"].select(".gallery")
    assert len(galleries) == len(notebook_names())
    for gallery, name in zip(galleries, notebook_names(), strict=True):
        page, figures = pages[f"{name}.html"], gallery.find_all("article")
        assert [f"{name}.html#{figure['id']}" for figure in page.find_all("figure")] == [
            figure.a["href"] for figure in figures
        ]
        for figure in figures:
            cell, parameters, *data = [link["href"] for link in figure.select(".sources a")]
            cell = page.find(id=cell.partition("#")[2])
            assert cell.find("figure", id=figure.a["href"].partition("#")[2])
            assert "figures_dir" in page.find(id=parameters.partition("#")[2]).get_text()
            assert data and all(file.startswith(f"files/figures/{name}/") for file in data)
            assert f"files/figures/{name}/results.json" in data
            for file in data:
                assert (edition / file).read_bytes() == (
                    PROJECT_ROOT / file.removeprefix("files/")
                ).read_bytes()


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
                re.match(r"Figure( \d\.\d+)?: \S.{15,}", image["alt"], re.DOTALL)
                and image["width"]
                and image["height"]
            )
        for table in page.find_all("table"):
            assert "wide" in table.parent["class"] and table.parent["tabindex"] == "0"


def test_code_can_be_hidden_without_prose_and_outputs(pages):
    for name in notebook_names():
        page = pages[f"{name}.html"]
        [control] = page.select("label input[type=checkbox]#hide-code")
        assert control.parent.get_text().strip() == "Hide code"
        assert control.has_attr("checked") == (name == "00_quickstart")  # whose reader asks for the answer
        assert len(page.select(".input pre")) > (5 if name == "00_quickstart" else 10)
        assert not page.select(".input img, .input table, .input .formula, .input .text_cell")


@pytest.mark.skipif(not BROWSER, reason="no Chromium here")
@pytest.mark.parametrize(
    ("place", "is_shown"),
    [
        ("00_quickstart.html", False),
        ("00_quickstart.html#figure-0.1", False),
        ("00_quickstart.html#parameters", True),
        ("01_nlp_shapley.html", True),
    ],
)
def test_quick_start_hides_its_code_at_first_unless_a_link_leads_to_it(edition, tmp_path, place, is_shown):
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}", "--dump-dom"]
    dumped = subprocess.run(
        [BROWSER, *options, f"{edition.as_uri()}/{place}"], capture_output=True, text=True, timeout=120
    ).stdout
    code = BeautifulSoup(dumped, "html.parser").select(".input")
    assert code and {cell.get("hidden") for cell in code} == {None if is_shown else "until-found"}


@pytest.mark.skipif(not BROWSER, reason="no Chromium here")
def test_pages_work_in_a_browser_on_narrow_and_wide_screens_with_the_network_closed(edition, pages, tmp_path):
    folder = shutil.copytree(edition, tmp_path / "edition")
    names = sorted(path.name for path in folder.glob("*.html"))
    for name in names:
        page = folder / name
        page.write_text(
            page.read_text(encoding="utf8").replace("</body>", f"{PROBE}</body>"), encoding="utf8"
        )
    frames = [
        f'<iframe src="{name}" style="width: {width}px; height: 800px; border: 0"></iframe>'
        for name in names
        for width in (390, 1200)
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
    assert sorted((page["page"], page["width"]) for page in seen) == [
        (name, width) for name in names for width in (390, 1200)
    ]
    visible = {page["page"]: set(page["ids"]) for page in seen}
    for page in seen:
        assert page["overflow"] <= 0, page
        assert page["figures"] and not page["missing"], page
        assert all(loaded.startswith("file:") for loaded in page["loaded"]), page
        if page["page"] == "index.html":
            links = [urlsplit(link) for link in page["links"]]
            places = [(link.path.split("/")[-1], link.fragment) for link in links if link.fragment]
            assert len(places) > 2 * len(names) and all(place in visible[name] for name, place in places), (
                page
            )
        else:
            assert page["formulas"] == len(pages[page["page"]].find_all("math")) and page["flat"] == 0, page
            assert page["code"] > (5 if page["page"].startswith("00") else 10) and page["prose"] > 5, page
            assert page["hidden"] == 0 and page["found"], page  # what is hidden, too
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


def test_figures_have_anchors_captions_and_the_tables_of_their_section(tmp_path):
    caption = "**Figure 1.1.** What *it* is: bars, [see](#Next-part). And more."
    cells = [
        new_code_cell("n = 1", execution_count=1, metadata={"tags": ["parameters"]}),
        executed('save_table(t.groupby("set").sum(), figures, "early")', count=2),
        new_markdown_cell("## First part"),
        executed('save_figure(f, figures, "small")', [picture(40, 20)], count=3),
        new_markdown_cell(f"{caption}\n\nRead as falling."),
        executed('save_table(t, figures, "late")\nsave_table(t, figures, "lost")', count=4),
        new_markdown_cell("## Next part\n\nAbout something else."),
        executed("show()", [picture(300, 200), picture(30, 20)], count=5),
        new_markdown_cell("Told <here>. Not there."),
    ]
    source = write(tmp_path, _01_first=cells)
    for name in ("early.csv", "late.csv", "results.json"):
        (source / "figures/01_first").mkdir(parents=True, exist_ok=True)
        (source / "figures/01_first" / name).write_text(name)
    target = render(source, tmp_path / "edition").parent
    page, index = parse(target / "01_first.html"), parse(target / "index.html")
    small, large = page.find_all("figure")
    assert (small["id"], large["id"]) == ("figure-1.1", "figure-2")
    assert small.img["alt"] == "Figure 1.1: What it is: bars, see." and large.img["alt"] == "Figure: Told ."
    assert (small.img["width"], small.img["height"], large.img["width"]) == ("40", "20", "300")
    assert small.a["href"] == small.img["src"] != large.img["src"]
    assert Image.open(target / large.img["src"]).size == (300, 200)
    assert [image["width"] for image in large.find_all("img")] == ["300", "30"]
    assert words(small.figcaption) == "Figure 1.1. What it is: bars, see. And more."
    assert not large.figcaption and page.main.get_text().count("What it is") == 1
    assert page.find(id="parameters").pre.get_text().strip() == "n = 1"
    first, second = index.find_all("article")
    assert words(first.p) == words(small.figcaption) and not first.p.a and first.p.em
    assert [len(card.find_all("img")) for card in (first, second)] == [1, 2]
    hrefs = [[link["href"].split("/")[-1] for link in card.find_all("a")] for card in (first, second)]
    cells = [f"01_first.html#{figure.find_parent(class_='cell')['id']}" for figure in (small, large)]
    parameters = "01_first.html#parameters"
    assert hrefs[0] == ["01_first.html#figure-1.1", cells[0], parameters, "late.csv", "results.json"]
    assert hrefs[1] == ["01_first.html#figure-2", cells[1], parameters, "results.json"]
    assert (target / "files/figures/01_first/late.csv").read_text() == "late.csv"


def test_findings_are_those_of_the_project_and_not_of_another_run(tmp_path):
    source = write(tmp_path, _01_first=[], _02_other=[])
    index = render(source, tmp_path / "edition")
    assert parse(index).h1.get_text() and not parse(index).select(".glance :is(li, figure)")
    (source / "figures/01_first").mkdir(parents=True)
    Image.new("RGB", (9, 5)).save(source / "figures/01_first/words.png")
    (source / "README.md").write_text(
        "# Title\n\nOne sentence. Another.\n\n![It](figures/01_first/words.png)\n\n*Red.*\n\n- not this\n\n"
        "## What comes out\n\nIn short:\n\n- *One*\n- [two](notebooks/02_other.ipynb)\n\n"
        "- three, [see](README.md)\n"
    )
    glance = parse(render(source, tmp_path / "edition")).select_one(".glance")
    assert [words(item) for item in glance.find_all("li")] == ["One", "two", "three, see"]
    assert glance.li.em and glance.select_one("li a")["href"] == "02_other.html"
    assert (tmp_path / "edition" / glance.select("li a")[1]["href"]).read_text().startswith("# Title")
    assert glance.img["src"] == glance.a["href"] == "files/figures/01_first/words.png"
    assert glance.img["width"] == "9" and words(glance.figcaption) == "Red."


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
    figures = {"figures/01_first_2_0.png", "figures/01_first_2_1.png"}
    assert set(first) == {"index.html", "style.css", "01_first.html", "02_other.html"} | figures


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
    for page in (parse(target / "01_first.html"), parse(target / "index.html").select_one(".notebooks li")):
        assert "ValueError: no <such> model" in page.select_one("p.error").get_text()
    assert "An Exception" not in (target / "01_first.html").read_text()
    assert not parse(target / "02_other.html").select(".error")
