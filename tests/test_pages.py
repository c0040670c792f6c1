"""Pages of notebooks load nothing and run nothing, whatever a model wrote; formulas of the authors are MathML."""

import ast
import http.server
import re
import shutil
import subprocess
import threading
from html.parser import HTMLParser
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import pandas as pd
import pytest
from nbconvert.filters.markdown_mistune import MarkdownWithMath
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from small_notebooks import run, write_notebook

from smlib.notebooks import pages
from smlib.reports import plots

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
HOST = "evil.example"
LOADING = {"src", "srcset", "srcdoc", "poster", "background", "data", "action", "formaction", "xlink:href", "ping"}
VOID = {"meta", "img", "br", "hr", "col", "mspace"}
MATH = {
    "math", "mrow", "mi", "mn", "mo", "mtext", "mspace", "mfrac", "msqrt", "mroot", "msub", "msup", "msubsup", "munder",
    "mover", "munderover", "mtable", "mtr", "mtd", "mpadded", "mphantom", "mstyle",
}  # fmt: skip
HOSTILE = [
    r"$\href{javascript:alert(1)}{x}$ \(\unicode{x41}\) $$\class{evil}{y}$$",
    f"<script src=//{HOST}/a.js>alert(1)</script></script><script>document.title = 'evil'</script>",
    f"<img src=x onerror=alert(1)><img src=http://{HOST}/a.png srcset='//{HOST}/b.png 2x'>",
    f"<link rel=stylesheet href=http://{HOST}/a.css><style>@import url(//{HOST}/b.css); p {{ color: red }}</style>",
    f"<style>@font-face {{ font-family: x; src: url(http://{HOST}/f.woff) }}</style><p style='font-family: x'>font</p>",
    f"<table><tr><td style='background: url(http://{HOST}/c.png); text-align: right' onclick=alert(1)>cell</table>",
    "<a href=javascript:alert(1)>link</a> [link](javascript:alert(1)) [two](JaVa\nScript:alert(1))",
    f"![picture](http://{HOST}/d.png) ![picture](data:text/html,<script>alert(1)</script>)",
    f"<iframe src=http://{HOST}/></iframe><iframe srcdoc='<script>alert(1)</script>'></iframe>",
    f"<meta http-equiv=refresh content='0; url=http://{HOST}/'><base href=http://{HOST}/>",
    f"<form action=http://{HOST}/><input autofocus onfocus=alert(1)><button formaction=javascript:alert(1)>b</button>",
    f"<object data=http://{HOST}/></object><embed src=http://{HOST}/><video poster=http://{HOST}/e.png></video>",
    f"<svg onload=alert(1)><script>alert(1)</script><image href=http://{HOST}/g.png></svg>",
    "<math><mtext><table><mglyph><style><!--</style><img title='--&gt;&lt;img src=1 onerror=alert(1)&gt;'></math>",
    "<noscript><p title='</noscript><img src=x onerror=alert(1)>'></noscript>",
]
SVG = f"<svg xmlns='http://www.w3.org/2000/svg' onload='alert(1)'><script>alert(1)</script>{HOSTILE[12]}</svg>"


class Parsed(HTMLParser):
    """elements: (tag, attributes, whether inside an output); text of the page, of its outputs, of prose but code."""

    def __init__(self, page: str):
        super().__init__()
        self.elements, self.open, self.text, self.outputs, self.prose, self.styles = [], [], "", "", "", ""
        self.feed(page)
        self.close()

    def _inside(self, tag: str, css: str | None = None) -> bool:
        return any(name == tag and css in (None, given) for name, given in self.open)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs), self._inside("div", "output")))
        if tag not in VOID:
            self.open.append((tag, dict(attrs).get("class")))

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs), self._inside("div", "output")))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag, f"</{tag}> closes what is not open: a cell's HTML leaks out of its place"

    def handle_data(self, data):
        self.text += data
        if self._inside("style"):
            self.styles += data
        if self._inside("div", "output"):
            self.outputs += data
        elif self._inside("section", "prose") and not self._inside("code") and not self._inside("pre"):
            self.prose += data


def assert_harmless(page: str) -> Parsed:
    parsed = Parsed(page)
    assert parsed.open == []
    tags = {tag for tag, _, _ in parsed.elements}
    assert not tags & {"script", "link", "iframe", "object", "embed", "svg", "form", "base", "input", "video", "image"}
    metas = [attrs for tag, attrs, _ in parsed.elements if tag == "meta"]
    assert [meta["content"] for meta in metas if meta.get("http-equiv")] == [pages.POLICY]
    for tag, attrs, in_output in parsed.elements:
        assert not [name for name in attrs if name.startswith("on")]
        assert not set(attrs) & (LOADING - {"src"})
        if "src" in attrs:
            assert tag == "img" and re.match(r"data:image/(svg\+xml|png|jpeg|gif|webp);base64,", attrs["src"])
        if "href" in attrs:
            assert tag == "a" and not in_output
            assert not re.match(r"\s*(java|vb)?script:|data:", attrs["href"], re.IGNORECASE)
        assert "url(" not in attrs.get("style", "")
        assert not (in_output and tag in MATH)
    assert not re.search(r"url\(|@import|@font-face", parsed.styles)
    return parsed


def hostile_notebook():
    cells = []
    for text in HOSTILE:
        kinds = ({"text/plain": text}, {"text/html": text}, {"text/markdown": text})
        outputs = [new_output("display_data", data) for data in kinds]
        outputs += [new_output("stream", name="stdout", text=text), new_output("stream", name='"><script>', text=text)]
        outputs += [new_output("error", ename=text, evalue=text, traceback=[f"\x1b[31m{text}\x1b[0m"])]
        outputs += [new_output("error", ename=text, evalue=text)]
        outputs += [new_output("display_data", {kind: text, "text/plain": text}) for kind in pages.PICTURES]
        cells += [new_code_cell(f"print({text!r})", outputs=outputs, execution_count=1)]
    cells.append(new_code_cell("svg", outputs=[new_output("display_data", {"image/svg+xml": SVG})]))
    cells += [new_markdown_cell(text) for text in HOSTILE[1:]]  # as the authors' own text, too
    return new_notebook(cells=cells)


def shown(cell, title="t"):
    return Parsed(pages.page(new_notebook(cells=[cell]), title))


def output(data):
    return shown(new_code_cell("x", outputs=[new_output("display_data", data)]))


def test_what_a_hostile_model_wrote_does_nothing():
    parsed = assert_harmless(pages.page(hostile_notebook(), "</title><script>alert(1)</script>"))
    assert parsed.outputs.count(HOSTILE[0]) == 7, "as it was written: plain, HTML, two streams, a traceback, 'x: x'"
    assert not output({"text/html": HOSTILE[3]}).outputs.strip(), "the text of a style is nothing to read"
    assert output({"text/html": HOSTILE[5]}).outputs.strip() == "cell"


def test_a_table_stays_a_table_and_only_its_alignment_is_kept():
    cell = '<td colspan="2" style="text-align: right; color: red" id="x">1 &lt; 2</td>'
    parsed = output({"text/html": f"<style scoped>td {{ }}</style><table><tr>{cell}</tr></table>"})
    (cell,) = [attrs for tag, attrs, _ in parsed.elements if tag == "td"]
    assert cell == {"colspan": "2", "style": "text-align: right;"}
    assert parsed.outputs.strip() == "1 < 2"
    parsed = output({"text/markdown": "| a | b |\n|---|---|\n| $x$ | <b> |"})
    assert [tag for tag, _, inside in parsed.elements if inside and tag == "td"] == ["td", "td"]
    assert "$x$" in parsed.outputs and "<b>" in parsed.outputs


def test_the_richest_form_of_an_output_is_shown():
    parsed = output({"image/png": "iVBORw0KGgo=\n", "text/plain": "<Figure size 10x10>"})
    (picture,) = [attrs for tag, attrs, _ in parsed.elements if tag == "img"]
    assert picture == {"alt": "<Figure size 10x10>", "src": "data:image/png;base64,iVBORw0KGgo="}
    parsed = output({"text/latex": "$x$", "text/plain": "plain"})
    assert "plain" in parsed.outputs and "$x$" not in parsed.outputs


def test_an_error_is_announced_and_its_traceback_is_coloured():
    error = new_output("error", ename="ValueError", evalue="bad", traceback=["\x1b[31mValueError\x1b[0m: bad"])
    parsed = shown(new_code_cell("f()", outputs=[error], execution_count=3))
    assert parsed.outputs == "ValueError: bad"
    assert ("span", {"class": "ansi-red-fg"}, True) in parsed.elements
    assert "Stopped by an error in In [3]." in parsed.text
    assert ("a", {"href": "#error"}, False) in parsed.elements
    assert [attrs["id"] for tag, attrs, _ in parsed.elements if tag == "pre" and "id" in attrs] == ["error"]


def test_streams_are_shown_as_a_terminal_shows_them():
    parts = [new_output("stream", name="stdout", text=text) for text in ("1 %\r", "99 %\r", "done\n", "next\n")]
    assert shown(new_code_cell("x", outputs=parts)).outputs == "done\nnext\n"


def test_formulas_of_the_authors_are_mathml():
    text = (
        "By $x_1 \\le 2$:\n\n$$p = \\frac{1}{n}$$\n\n\\begin{align} a &= b \\end{align}\n\nnot `$y$`, and $\\nonsense$."
    )
    parsed = assert_harmless(pages.page(new_notebook(cells=[new_markdown_cell(text)]), "t"))
    maths = [attrs.get("display", "inline") for tag, attrs, _ in parsed.elements if tag == "math"]
    assert maths == ["inline", "block", "block"]
    assert "$y$" in parsed.text and "\\nonsense" in parsed.text, "code is no formula; what cannot be one stays readable"


def test_prose_keeps_its_bare_tags_and_its_links():
    text = (
        "<details><summary>More</summary>\n\nHidden **bold**.\n\n</details>\n\nA [link](https://example.org/) <b>b</b>"
    )
    parsed = shown(new_markdown_cell(text))
    tags = [tag for tag, _, _ in parsed.elements]
    assert {"details", "summary", "strong"} <= set(tags) and "b" not in tags
    assert "<b>b</b>" in parsed.prose
    assert ("a", {"href": "https://example.org/"}, False) in parsed.elements


def test_a_picture_that_a_notebook_holds_is_in_the_page():
    cell = new_markdown_cell("![one](attachment:a.png) ![two](https://example.org/b.png)")
    cell.attachments = {"a.png": {"image/png": "iVBORw0KGgo="}}
    parsed = shown(cell)
    assert [attrs["src"] for tag, attrs, _ in parsed.elements if tag == "img"] == ["data:image/png;base64,iVBORw0KGgo="]
    assert "two" in parsed.prose


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request):
    return nbformat.read(request.param, 4)


def formulas(notebook) -> int:
    """Number of formulas in the prose, as the parser of the Markdown finds them."""

    def count(tokens):
        mine = sum("math" in token["type"] or token["type"] == "latex_environment" for token in tokens)
        return mine + sum(count(token.get("children", [])) for token in tokens)

    parse = MarkdownWithMath(renderer=None)
    return sum(count(parse(cell.source)) for cell in notebook.cells if cell.cell_type == "markdown")


def test_a_committed_notebook_is_a_page_with_all_its_formulas(notebook):
    parsed = assert_harmless(pages.page(notebook, "t"))
    assert sum(tag == "math" for tag, _, _ in parsed.elements) == formulas(notebook)
    assert "$" not in parsed.prose and "\\" not in parsed.prose
    drawn = [
        output for cell in notebook.cells for output in cell.get("outputs", []) if "image/png" in output.get("data", {})
    ]
    assert sum(tag == "img" for tag, _, _ in parsed.elements) == len(drawn)
    inside = [tag for tag, _, _ in parsed.elements if re.match("m[a-z]", tag) and tag not in ("main", "meta")]
    assert set(inside) <= MATH, "only MathML Core, which all browsers draw"


def test_tables_that_a_notebook_holds_are_data_for_jupyterlab_too(notebook):
    html = "\n".join(
        output.data["text/html"]
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if "text/html" in output.get("data", {})
    )
    assert html.count("<table") == html.count('class="dataframe tex2jax_ignore mathjax_ignore"')


def test_a_notebook_shows_as_markdown_only_tables_of_numbers(notebook):
    """Text of a model goes through print or a DataFrame, which escape it; these functions put together numbers."""
    safe = {"fate", "pit_table", "accuracies", "results.explore_markdown"}
    active = {"Markdown", "HTML", "Latex", "Math", "Javascript", "SVG", "IFrame", "to_html", "to_markdown", "style"}
    for cell in notebook.cells:
        if cell.cell_type == "code":
            for call in [node for node in ast.walk(ast.parse(cell.source)) if isinstance(node, ast.Call)]:
                name = ast.unparse(call.func)
                if name.split(".")[-1] in active and name != "plots.style":
                    assert ast.unparse(call.args[0].func) in safe


def test_a_table_is_data_once_the_notebooks_style_is_set():
    with pd.option_context("display.html.use_mathjax", True), plt.rc_context():
        plots.style()
        html = pd.DataFrame({"model": [HOSTILE[0], "<b>bold</b>"]})._repr_html_()
    assert '<table border="1" class="dataframe tex2jax_ignore mathjax_ignore">' in html
    assert "<b>" not in html


def test_a_models_dollars_are_no_formula_in_a_figure():
    figure, axes = plt.subplots()
    plots.token_strip(axes, ["$\\frac", "{1}$", "$x$\n"], [0.1, -0.2, 0.3], limit=1.0)
    figure.canvas.draw()
    assert "".join(text.get_text() for text in axes.texts) == "$\\frac{1}$$x$↵"
    plt.close(figure)


@pytest.mark.usefixtures("in_process")
@pytest.mark.filterwarnings("ignore:the file is not specified with any extension")
def test_the_index_escapes_names_and_values(tmp_path):
    out, name = tmp_path / "<img src=x onerror=alert(1)>", '00_a" onclick="alert(1)#?'
    write_notebook(tmp_path / "notebooks", name, parameters='TASK = ""\nMODEL = ""')
    run(tmp_path / "notebooks", out, {"TASK": "</p><script>alert(1)</script>", "MODEL": "javascript:alert(1)"})
    parsed = assert_harmless((out / "index.html").read_text("utf-8"))
    (link,) = [attrs["href"] for tag, attrs, _ in parsed.elements if tag == "a"]
    assert link == "notebooks/00_a%22%20onclick%3D%22alert%281%29%23%3F.html"
    assert "<script>alert(1)</script>" in parsed.text and out.name in parsed.text


@pytest.fixture
def asked():
    """A server for all hosts that a browser asks for: (its port, the URLs asked for)."""
    urls = []

    class Proxy(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            urls.append(self.path)
            self.send_error(404)

        do_CONNECT = do_POST = do_GET

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Proxy) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port, urls
        server.shutdown()


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs Chromium on the PATH")
def test_a_browser_loads_nothing_and_runs_nothing(tmp_path, asked):
    port, urls = asked

    def opened(name, text):
        (tmp_path / name).write_text(text, "utf-8")
        command = [
            BROWSER,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--dump-dom",
            f"--user-data-dir={tmp_path}/b",
        ]
        command += [f"--proxy-server=127.0.0.1:{port}", "--disable-background-networking", "--virtual-time-budget=3000"]
        return subprocess.run(
            [*command, f"file://{tmp_path}/{name}"], capture_output=True, text=True, timeout=120
        ).stdout

    opened("careless.html", f"<img src=http://{HOST}/a.png><script>document.title = 'evil'</script>")
    assert any(HOST in url for url in urls), "the server sees what a page loads"
    del urls[:]
    dom = opened("hostile.html", pages.page(hostile_notebook(), "harmless"))
    assert "<title>harmless</title>" in dom and "evil" in dom
    for path in NOTEBOOKS:
        notebook = nbformat.read(path, 4)
        dom = opened(f"{path.stem}.html", pages.page(notebook, path.stem))
        assert ("</math>" in dom) == (formulas(notebook) > 0)
    assert not [url for url in urls if HOST in url or "cdn" in url or "unpkg" in url]
