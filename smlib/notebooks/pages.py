"""HTML pages of executed notebooks: one file each, which loads nothing, runs no script and needs no network.

Prose (Markdown cells) is the authors': its formulas become MathML here, which browsers draw themselves. Outputs are
data, and may hold what a model wrote: no formula is looked for in them, and of their HTML only tables and marked-up
text are kept. A Content-Security-Policy in the page says the same to the browser.
"""

import base64
import re
from functools import cache
from html import escape
from pathlib import Path

import bleach
import mistune
import nbformat
from bleach.css_sanitizer import CSSSanitizer
from bs4 import BeautifulSoup
from math_core import LatexError, LatexToMathML
from nbconvert.filters.ansi import ansi2html
from nbconvert.filters.highlight import Highlight2HTML
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from nbconvert.preprocessors import CoalesceStreamsPreprocessor
from papermill.execute import ERROR_MARKER_TAG
from pygments.formatters import HtmlFormatter

from smlib.files.atomic import write_text
from smlib.notebooks.exercises import FOLDED

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
TABLES = {"table", "caption", "colgroup", "col", "thead", "tbody", "tfoot", "tr", "th", "td"}
TEXT = {"p", "div", "span", "pre", "code", "b", "i", "strong", "em", "del", "br", "hr", "ul", "ol", "li", "blockquote"}
TEXT |= {f"h{level}" for level in range(1, 7)}
ATTRIBUTES = {"*": ["class"], "th": ["rowspan", "colspan", "style"], "td": ["rowspan", "colspan", "style"]}
HIDDEN = ["script", "style", "noscript", "template", "title"]  # their text is nothing to read
BARE = r"/?(?:details|summary|br|sub|sup|kbd)"  # the HTML that prose may use, without attributes
PICTURES = ("image/svg+xml", "image/png", "image/jpeg", "image/gif", "image/webp")


def write_page(path: Path) -> None:
    """Write the page of the executed notebook `path` beside it, under the same name with .html."""
    write_text(path.with_suffix(".html"), page(nbformat.read(path, 4), path.stem))


def page(notebook, title: str) -> str:
    """The notebook, executed to its end or up to an error, as one HTML file."""
    notebook, _ = CoalesceStreamsPreprocessor().preprocess(notebook, {})
    cells, stopped = [], ""
    for cell in notebook.cells:
        if cell.cell_type == "markdown" and ERROR_MARKER_TAG not in cell.metadata.get("tags", []):
            cells.append(f'<section class="prose">{prose(cell)}</section>')
        elif cell.cell_type == "code" and (cell.source or cell.outputs):
            cells.append(code_cell(cell))
            if any(output.output_type == "error" for output in cell.outputs):
                stopped = (
                    f'<p class="stopped">Stopped by an error in <a href="#error">In [{cell.execution_count}]</a>.</p>'
                )
    return document(title, "\n".join([stopped, *cells]))


def document(title: str, body: str, style: str = "", policy: str = "") -> str:
    """A whole HTML file around `body`, which is HTML; `title` is text. style, policy: what it has besides POLICY's."""
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<title>{escape(title)}</title>
<style>
{_style()}{style}</style></head>
<body><main>
{body}
</main></body></html>
"""


@cache
def _style() -> str:
    light, dark = (HtmlFormatter(style=name).get_style_defs(".highlight") for name in ("default", "github-dark"))
    own = Path(__file__).with_name("pages.css").read_text(encoding="utf-8")
    return f"{light}\n@media screen and (prefers-color-scheme: dark) {{\n{dark}\n}}\n{own}"


class _Prose(IPythonRenderer):
    """Markdown of the authors as HTML with MathML. HTML in it, but for a few bare tags, shows as text."""

    _math = LatexToMathML()

    def _formula(self, latex: str, display: bool) -> str:
        try:
            return self._math.convert_with_local_state(latex, displaystyle=display)
        except LatexError:  # its source is still something to read
            return f"<code>{escape(latex)}</code>"

    def inline_math(self, body: str) -> str:
        return self._formula(body, display=False)

    def block_math(self, body: str) -> str:
        return self._formula(body, display=True)

    def latex_environment(self, name: str, body: str) -> str:
        return self._formula(rf"\begin{{{name}}}{body}\end{{{name}}}", display=True)

    def inline_html(self, html: str) -> str:
        return re.sub(rf"<(?!{BARE}>)", "&lt;", html)

    block_html = inline_html

    def image(self, text: str, url: str, title: str | None = None) -> str:
        """A picture that the notebook holds; of another, which the browser would fetch, its description."""
        held = url.startswith(("attachment:", "data:image/"))
        return super().image(text, url, title) if held else escape(text)


def prose(cell) -> str:
    """HTML of a Markdown cell."""
    renderer = _Prose(attachments=cell.get("attachments", {}), allow_harmful_protocols=False)
    return MarkdownWithMath(renderer).render(cell.source)


def code_cell(cell) -> str:
    """HTML of a code cell and its outputs."""
    source, tags = Highlight2HTML()(cell.source), cell.metadata.get("tags", [])
    if FOLDED in tags:
        source = f"<details><summary>{'Solution' if 'solution' in tags else 'Code'}</summary>{source}</details>"
    outputs = "\n".join(f'<div class="output">{_output(output)}</div>' for output in cell.outputs)
    count = f'<div class="count">[{cell.execution_count or " "}]</div>'
    return f'<section class="code">{count}{source}{outputs}</section>'


def _output(output) -> str:
    if output.output_type == "stream":
        return f'<pre class="{"stderr" if output.name == "stderr" else "stdout"}">{ansi2html(output.text)}</pre>'
    if output.output_type == "error":
        text = "\n".join(output.traceback) or f"{output.ename}: {output.evalue}"
        return f'<pre class="error" id="error">{ansi2html(text)}</pre>'
    data = output.data
    text = data.get("text/plain", "")
    if "text/html" in data:
        return _cleaned(data["text/html"])
    if "text/markdown" in data:
        return _cleaned(mistune.create_markdown(plugins=["table"])(data["text/markdown"]))
    for kind in PICTURES:  # an SVG, too, is only looked at: as a picture it runs no script and loads nothing
        if kind in data:
            held = base64.b64encode(data[kind].encode()).decode() if kind == "image/svg+xml" else data[kind]
            return f'<img alt="{escape(text)}" src="data:{kind};base64,{escape("".join(held.split()))}">'
    return f"<pre>{ansi2html(text)}</pre>"


def _cleaned(html: str) -> str:
    """Of an output's HTML tables and marked-up text: no link, no picture, no style but the side cells align to."""
    soup = BeautifulSoup(f"<div>{html}</div>", "html.parser")
    for element in soup(HIDDEN):
        element.decompose()
    aligned = CSSSanitizer(allowed_css_properties=["text-align"])
    return bleach.clean(str(soup), TABLES | TEXT, ATTRIBUTES, strip=True, css_sanitizer=aligned)
