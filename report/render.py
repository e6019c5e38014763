"""The reading edition: executed notebooks as static pages that open from disk, with no network and no
Jupyter.
"""

import base64
import io
import re
import shutil
import tempfile
from collections import namedtuple
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
PICTURES = {
    "enabled": True,
    "output_filename_template": "pictures/{unique_key}_{cell_index}_{index}{extension}",
}
EXPORT = Config(ExtractOutputPreprocessor=PICTURES, NbConvertBase={"display_data_priority": SHOWN})
FRAME = {"class": "wide", "tabindex": "0", "role": "group", "aria-label": "Table"}

Page = namedtuple("Page", "name title question run_time error body sections thumbnail files")


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
    environment.globals.update(collection=_collection(source), mark=MARK)
    files = {"style.css": (TEMPLATES / "style.css").read_bytes()}
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


def _collection(source: Path) -> dict[str, str]:
    """Return the title of the collection and a sentence about it, from the README."""
    readme = next(path for folder in (source, PROJECT_ROOT) if (path := folder / "README.md").exists())
    about = _markdown(readme.read_text(encoding="utf8"))
    return {"title": _plain(about.h1), "sentence": _first_sentence(_plain(about.p))}


def _page(name: str, notebook, source: Path, known: set[str]) -> Page:
    _describe_pictures(notebook)
    exporter = _Exporter(
        config=EXPORT, template_name="basic", exclude_input_prompt=True, exclude_output_prompt=True
    )
    try:
        html, resources = exporter.from_notebook_node(notebook, {"unique_key": name})
    except LatexError as error:
        raise ValueError(f"notebook {name} holds a formula that cannot be set:\n{error}") from error
    soup = _soup(html)
    files = _lead_links(soup, name, source, known)
    pictures = _frame(soup)
    files |= {file: content for file, content in resources["outputs"].items() if file in pictures}
    richest = max(pictures, key=lambda file: len(files[file]), default=None)  # the picture with most to see
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
        thumbnail=pictures.get(richest),
        files=files,
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


def _describe_pictures(notebook) -> None:
    """Give each picture of the outputs its size, and a text: the figure's name and the first sentence that
    reads it.
    """
    for place, cell in enumerate(notebook.cells):
        names = re.findall(r'save_figure\(.*?"([^"]+)"\)', cell.source)
        pictures = [output for output in cell.get("outputs", []) if "image/png" in output.get("data", {})]
        for number, output in enumerate(pictures):
            width, height = Image.open(io.BytesIO(base64.b64decode(output.data["image/png"]))).size
            name = f"Figure {names[number]}" if number < len(names) else "Figure"
            alt = f"{name}: {_sentence_beside(notebook.cells, place)}"
            output.metadata["image/png"] = {"alt": alt, "width": width, "height": height}


def _sentence_beside(cells: list, place: int) -> str:
    """Return the first sentence of the prose right after a cell or, where a new section begins there, before
    it.
    """
    after = (cell.source for cell in cells[place:] if cell.cell_type == "markdown")
    before = (cell.source for cell in reversed(cells[:place]) if cell.cell_type == "markdown")
    sources = [source for source in (next(after, "#"), next(before, "")) if not source.startswith("#")]
    paragraph = _markdown(sources[0]).p if sources else None
    return _first_sentence(_plain(paragraph)) if paragraph else ""


def _lead_links(soup: BeautifulSoup, name: str, source: Path, known: set[str]) -> dict[str, bytes]:
    """Make every link of the prose lead somewhere within the edition or to the web; return the files that
    this needs.

    Links to notebooks lead to their pages, links to other files below `source` to a copy. Links and pictures
    that are not there become plain text. The name of another notebook, set as code, becomes a link.
    """
    files = {}
    for code in soup.select("p code, li code, td code"):
        if code.get_text() in known - {name} and not code.find_parent("a"):
            code.wrap(soup.new_tag("a", href=f"{code.get_text()}.ipynb"))
    for tag in soup.select(".text_cell :is(a[href], img[src])"):
        attribute = "href" if tag.name == "a" else "src"
        link = urlsplit(tag[attribute])
        path = (source / "notebooks" / unquote(link.path)).resolve()
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


def _frame(soup: BeautifulSoup) -> dict[str, dict]:
    """Let wide things scroll in frames of their own, pictures lead to their full size; return the pictures by
    file.
    """
    for tag in soup.select("script, style[scoped]"):
        tag.extract()  # `scoped` is what pandas says of every table; the style sheet says it once
    for table in soup.find_all("table"):
        table.attrs.pop("border", None)
        table.wrap(soup.new_tag("div", attrs=FRAME))
    for anchor in soup.select("a.anchor-link"):
        anchor["aria-label"] = "Link to this section"
    images = soup.select(".output_area img")
    for image in images:
        image.wrap(soup.new_tag("a", href=image["src"])).wrap(soup.new_tag("figure"))
    return {image["src"]: image.attrs for image in images if image["src"].startswith("pictures/")}
