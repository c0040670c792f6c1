"""Write the pages of the site as Markdown, and build it: python docs/site/build.py (make site).

README.md, docs/ and the executed notebooks become build/pages, and mkdocs makes build/site of them: static files that
load nothing from a network. The formulas of notebooks are MathML, as in the pages of a run (smlib.notebooks.pages).
"""

import csv
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
from nbconvert.preprocessors import CoalesceStreamsPreprocessor

from smlib.notebooks import pages

ROOT = Path(__file__).parents[2]
HERE, TARGET = Path(__file__).parent, ROOT / "build" / "pages"
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?:|#|mailto:)([^)#\s]+)(#[^)\s]*)?\)")


def main() -> None:
    shutil.rmtree(ROOT / "build" / "pages", ignore_errors=True)
    (TARGET / "docs").mkdir(parents=True)
    (TARGET / "notebooks").mkdir()
    shutil.copytree(ROOT / "figures", TARGET / "figures")
    shutil.copy(HERE / "notebooks.css", TARGET)
    (TARGET / "index.md").write_text(_linked((ROOT / "README.md").read_text(encoding="utf-8"), ROOT), encoding="utf-8")
    for path in sorted((ROOT / "docs").glob("*.md")):
        text = _linked(path.read_text(encoding="utf-8"), path.parent)
        (TARGET / "docs" / path.name).write_text(text, encoding="utf-8")
    times = _run_times()
    for path in NOTEBOOKS:
        (TARGET / "notebooks" / f"{path.stem}.md").write_text(_notebook(path, times.get(path.stem)), encoding="utf-8")
    names = ", ".join(f"notebooks/{path.stem}.md" for path in NOTEBOOKS)
    config = (HERE / "mkdocs.yml").read_text(encoding="utf-8").replace("{{notebooks}}", f"[{names}]")
    made = HERE / ".mkdocs.yml"
    made.write_text(config, encoding="utf-8")
    try:
        quiet = os.environ | {"NO_MKDOCS_2_WARNING": "1"}  # a notice of the theme's successor
        subprocess.run([sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-f", made], check=True, env=quiet)
    finally:
        made.unlink()
    print("Look at it with: python -m http.server -d build/site")


def _linked(text: str, folder: Path) -> str:
    """The text of a page in `folder` with links to what the site has; of other files their name stays."""

    def link(match: re.Match) -> str:
        picture, name, target, place = match.groups()
        path = (folder / target).resolve()
        if path.suffix == ".ipynb" and path in NOTEBOOKS:
            return f"[{name}]({target.removesuffix('.ipynb')}.md)"
        if path == ROOT / "README.md":
            return f"[{name}]({target.replace('README.md', 'index.md')})"
        on_site = (path.parent, path.suffix) in ((ROOT / "docs", ".md"), (ROOT / "figures", ".png"))
        return f"{picture}[{name}]({target}{place or ''})" if on_site else name

    return LINK.sub(link, text)


def _notebook(path: Path, seconds: float | None) -> str:
    """The executed notebook as Markdown: headings as such, for the contents and the search; the rest as HTML."""
    notebook, _ = CoalesceStreamsPreprocessor().preprocess(nbformat.read(path, 4), {})
    parts = []
    for cell in notebook.cells:
        if cell.cell_type == "code":
            parts.append(f'<div class="cell">{pages.code_cell(cell)}</div>')
            continue
        for piece in re.split(r"^(#{1,4} .*)$", _linked(cell.source, path.parent), flags=re.MULTILINE):
            heading = re.match(r"#{1,4} ", piece)
            parts += [piece] if heading else [f"<div>{_html(piece)}</div>"] if piece.strip() else []
            if heading and len(heading[0]) == 2 and seconds:
                parts.append(f"*Runs in {seconds:.0f} seconds on two cores.*")
    return "\n\n".join(parts) + "\n"


def _html(markdown: str) -> str:
    """HTML of prose, with links to the site's pages."""
    html = pages.prose(nbformat.v4.new_markdown_cell(markdown))
    return re.sub(r'href="((?!https?:)[^"#]+)\.md', r'href="\1.html', html)


def _run_times() -> dict[str, float]:
    """Notebook -> seconds, of the run that wrote the results."""
    table = ROOT / "results" / "run_times.csv"
    if not table.exists():
        return {}
    with table.open(encoding="utf-8", newline="") as file:
        return {row["notebook"]: float(row["seconds"]) for row in csv.DictReader(file)}


if __name__ == "__main__":
    main()
