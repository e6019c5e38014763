"""The reading edition: executed notebooks as static pages that open from disk, with no network and no
Jupyter.
"""

import io
import re
import shutil
import tempfile
from collections import namedtuple
from html import escape
from pathlib import Path
from urllib.parse import unquote, urlsplit

import jinja2
import nbformat
from bs4 import BeautifulSoup
from math_core import LatexError, LatexToMathML
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from PIL import Image
from traitlets.config import Config

from helpers.paths import PROJECT_ROOT

TEMPLATES = Path(__file__).with_name("templates")
MARK = '<meta name="generator" content="report.render">'  # a folder whose index has it may be replaced
SHOWN = ["text/html", "text/markdown", "image/svg+xml", "image/png", "image/jpeg", "text/plain"]  # no scripts
FIGURES = {
    "enabled": True,
    "output_filename_template": "figures/{unique_key}_{cell_index}_{index}{extension}",
}
EXPORT = Config(ExtractOutputPreprocessor=FIGURES, NbConvertBase={"display_data_priority": SHOWN})
FRAME = {"class": "wide", "tabindex": "0", "role": "group", "aria-label": "Table"}
SAVED = re.compile(r'figures,\s*"(\w+)",?\s*\)')  # how notebooks end a call that saves a figure or a table

Page = namedtuple("Page", "name title question run_time error body sections figures files")
Figure = namedtuple("Figure", "id cell saved images caption data")


def render(source: Path, target: Path) -> Path:
    """Write the notebooks executed in `source`/notebooks as HTML into the folder `target`; return its index
    page.

    `source` is the project root or the folder of a run; `target` a new or empty folder, or an earlier
    edition, which is replaced as a whole. The same notebooks give the same bytes. A notebook that stopped
    with an error is shown as far as it came, and says so.
    Raises FileNotFoundError where `source` holds no notebooks; ValueError for a notebook that has not been
    executed, a formula that cannot be set, or a `target` that holds anything but an edition.
    """
    source, target = Path(source).resolve(), Path(target).resolve()
    notebooks = _read_executed(source)
    _check_replaceable(target)
    pages = [_page(name, notebook, source, set(notebooks)) for name, notebook in notebooks.items()]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True
    )
    collection, copied = _collection(source, pages)
    environment.globals.update(collection=collection, mark=MARK)
    files = {"style.css": (TEMPLATES / "style.css").read_bytes(), **copied}
    files["index.html"] = environment.get_template("index.html.j2").render(pages=pages).encode()
    for page, before, after in zip(pages, [None, *pages], [*pages[1:], None], strict=False):
        html = environment.get_template("page.html.j2").render(page=page, before=before, after=after)
        files |= {f"{page.name}.html": html.encode(), **page.files}
    _replace(target, files)
    return target / "index.html"


def _read_executed(source: Path) -> dict:
    """Return {name: notebook} in reading order, without the notes that papermill adds to one that failed."""
    paths = sorted((source / "notebooks").glob("[0-9]*.ipynb"))
    if not paths:
        raise FileNotFoundError(
            f"{source / 'notebooks'} holds no notebooks; name the project folder, or the --output of a "
            "`attention run`"
        )
    notebooks = {path.stem: nbformat.read(path, as_version=4) for path in paths}
    for name, notebook in notebooks.items():
        notebook.cells = [
            c for c in notebook.cells if "papermill-error-cell-tag" not in c.metadata.get("tags", [])
        ]
        code = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]
        if not _error(notebook) and any(cell.execution_count is None for cell in code):
            raise ValueError(f"notebook {name} has not been executed; run `make figures`, or `attention run`")
    return notebooks


def _error(notebook) -> str:
    """Return what stopped a notebook, empty where nothing did."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return next(
        (f"{output.ename}: {output.evalue}" for output in outputs if output.output_type == "error"), ""
    )


def _check_replaceable(target: Path) -> None:
    index = target / "index.html"
    ours = index.is_file() and MARK in index.read_text(encoding="utf8", errors="replace")
    if target.exists() and not ours and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(
            f"{target} holds something else than a reading edition; name a new folder, or empty it first"
        )


def _replace(target: Path, files: dict[str, bytes]) -> None:
    """Put a folder with these files in the place of `target`, once it is complete."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".rendering-") as folder:
        for file, content in files.items():
            path = Path(folder, target.name, file)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        if target.exists():
            shutil.rmtree(target)
        Path(folder, target.name).rename(target)


def _collection(source: Path, pages: list[Page]) -> tuple[dict[str, str], dict[str, bytes]]:
    """Return what the README says first, and the files that this needs: title, a sentence, a figure with its
    caption, and, in a folder with a README of its own, the findings, which are not those of another run.
    """
    own = (source / "README.md").exists()
    about = _markdown(((source if own else PROJECT_ROOT) / "README.md").read_text(encoding="utf8"))
    files = _lead_links(about, source, source, {page.name for page in pages})
    said = {"title": _plain(about.h1), "sentence": _first_sentence(_plain(about.p))}
    if own and (told := about.find(string=re.compile("What comes out|In the committed run"))):
        said["findings"] = told.find_next("ul").decode_contents()
    if image := about.img:
        *_, name, file = image["src"].split("/")
        said["place"] = image["src"]
        for page in pages:
            for figure in page.figures:
                if page.name == name and Path(file).stem in figure.saved:
                    said["place"] = f"{name}.html#{figure.id}"
        said["image"] = {**image.attrs, **_size(files[image["src"]]), "alt": f"Figure: {image['alt']}"}
        said["caption"] = image.find_next("em").decode_contents()
    return said, {file: content for file, content in files.items() if file in str(said)}


def _page(name: str, notebook, source: Path, known: set[str]) -> Page:
    exporter = _Exporter(
        config=EXPORT, template_name="basic", exclude_input_prompt=True, exclude_output_prompt=True
    )
    try:
        html, resources = exporter.from_notebook_node(notebook, {"unique_key": name})
    except LatexError as error:
        raise ValueError(f"notebook {name} holds a formula that cannot be set:\n{error}") from error
    soup = _soup(html)
    _name_notebooks(soup, known - {name})
    files = _lead_links(soup, source, source / "notebooks", known, ".text_cell ")
    _frame_tables(soup)
    figures, of_figures = _frame_figures(soup, source, name, resources["outputs"])
    opening = _markdown(next((cell.source for cell in notebook.cells if cell.cell_type == "markdown"), ""))
    texts = [_plain(paragraph) for paragraph in opening.find_all("p")] or [""]
    return Page(
        name=name,
        title=_plain(opening.h1) if opening.h1 else name,
        question=texts[0].removeprefix("Question.").strip(),
        run_time=next((_first_sentence(text) for text in texts if text.lower().startswith("run time")), ""),
        error=_error(notebook),
        body=str(soup),
        sections=[(heading["id"], _plain(heading)) for heading in soup.find_all("h2")],
        figures=figures,
        files=files | of_figures,
    )


class _Exporter(HTMLExporter):
    """nbconvert's own, with formulas as MathML."""

    @jinja2.pass_context
    def markdown2html(self, context, source):
        return _html(source, context.get("cell", {}).get("attachments", {}))


class _Renderer(IPythonRenderer):
    mathml = LatexToMathML()

    def inline_math(self, body: str) -> str:
        return self.mathml.convert_with_local_state(body, displaystyle=False)

    def block_math(self, body: str) -> str:
        formula = self.mathml.convert_with_local_state(body, displaystyle=True)
        return f'<span class="formula" tabindex="0">{formula}</span>'

    def latex_environment(self, name: str, body: str) -> str:
        return self.block_math(rf"\begin{{{name}}}{body}\end{{{name}}}")


def _html(source: str, attachments: dict | None = None) -> str:
    return MarkdownWithMath(renderer=_Renderer(escape=False, attachments=attachments)).render(source)


def _soup(html: str) -> BeautifulSoup:
    return BeautifulSoup(html, "html.parser")


def _markdown(source: str) -> BeautifulSoup:
    return _soup(_html(source))


def _plain(tag) -> str:
    return " ".join(tag.get_text().rstrip("¶").split())


def _first_sentence(text: str) -> str:
    return re.split(r"(?<=[.!?:])\s+(?=[A-Z])", text, maxsplit=1)[0]


def _name_notebooks(soup: BeautifulSoup, others: set[str]) -> None:
    """Make a link of another notebook's name, set as code."""
    for code in soup.select("p code, li code, td code"):
        if code.get_text() in others and not code.find_parent("a"):
            code.wrap(soup.new_tag("a", href=f"{code.get_text()}.ipynb"))


def _lead_links(
    soup: BeautifulSoup, source: Path, base: Path, known: set[str], within: str = ""
) -> dict[str, bytes]:
    """Make every link of the prose lead somewhere within the edition or to the web; return the files that
    this needs.

    Links to notebooks lead to their pages, links from the folder `base` to other files below `source` to a
    copy. Links and images that are not there become plain text.
    """
    files = {}
    for tag in soup.select(f"{within}:is(a[href], img[src])"):
        attribute = "href" if tag.name == "a" else "src"
        link = urlsplit(tag[attribute])
        path = (base / unquote(link.path)).resolve()
        if link.scheme == "data" or tag.name == "a" and (link.scheme or not link.path):
            continue
        if path.parent == source / "notebooks" and path.suffix == ".ipynb" and path.stem in known:
            tag[attribute] = link._replace(path=f"{path.stem}.html").geturl()
        elif path.is_file() and path.is_relative_to(source) and not link.scheme:
            tag[attribute] = f"files/{path.relative_to(source).as_posix()}"
            files[tag[attribute]] = path.read_bytes()
        elif tag.name == "a":
            tag.unwrap()
        else:
            tag.replace_with(tag.get("alt", ""))
    return files


def _frame_tables(soup: BeautifulSoup) -> None:
    """Let tables scroll in frames of their own."""
    for tag in soup.select("script, style[scoped]"):
        tag.extract()  # `scoped` is what pandas says of every table; the style sheet says it once
    for table in soup.find_all("table"):
        table.attrs.pop("border", None)
        table.wrap(soup.new_tag("div", attrs=FRAME))
    for anchor in soup.select("a.anchor-link"):
        anchor["aria-label"] = "Link to this section"


def _frame_figures(
    soup: BeautifulSoup, source: Path, name: str, outputs: dict[str, bytes]
) -> tuple[list[Figure], dict[str, bytes]]:
    """Give each figure an anchor, its caption and a text; return the figures, and the files of them and their
    data.

    The caption is the paragraph that begins with the figure's number, in the cell after it. Its data are the
    tables that are saved in its section of the notebook, and the headline numbers.
    """
    for cell in soup.select(".celltag_parameters"):
        cell["id"] = "parameters"
    cells = [cell for cell in soup.select(".code_cell") if cell.select(".input")]
    saved = [SAVED.findall(cell.select_one(".input").get_text()) for cell in cells]
    sections = [cell.find_previous("h2") for cell in cells]
    figures, files = [], {}
    for cell, names, section in zip(cells, saved, sections, strict=True):
        if not (images := cell.select(".output_area img")):
            continue
        near = [one for there, more in zip(sections, saved, strict=True) if there is section for one in more]
        data = {
            f"files/figures/{name}/{file}": file for file in (*(f"{one}.csv" for one in near), "results.json")
        }
        data = {
            link: path for link, file in data.items() if (path := source / "figures" / name / file).is_file()
        }
        frame = images[0].wrap(soup.new_tag("figure"))
        frame.extend(image.extract() for image in images[1:])  # several that one cell draws are one figure
        prose = cell.find_next_sibling(class_="text_cell")
        caption = prose.p if prose and prose.p else soup.new_tag("p")
        numbered = re.match(r"Figure (\d+\.\d+)\. (.*)", _plain(caption))
        number, text = numbered.groups() if numbered else ("", _plain(caption))
        frame["id"] = f"figure-{number or len(figures) + 1}"
        for image in images:
            image.wrap(soup.new_tag("a", href=image["src"]))
            image["alt"] = f"Figure {number}".strip() + f": {_first_sentence(text)}"
            if content := outputs.get(image["src"]):
                files[image["src"]] = content
                image.attrs |= _size(content)
        said = re.sub(r"</?a\b[^>]*>", "", caption.decode_contents()) if numbered else escape(text)
        shown = [dict(image.attrs) for image in images]
        figures.append(Figure(frame["id"], cell["id"], names, shown, said, list(data)))
        files |= {file: path.read_bytes() for file, path in data.items()}
        if numbered:
            caption.name = "figcaption"
            frame.append(caption.extract())
    return figures, files


def _size(image: bytes) -> dict[str, str]:
    width, height = Image.open(io.BytesIO(image)).size
    return {"width": str(width), "height": str(height)}
