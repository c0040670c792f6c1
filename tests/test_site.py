"""The site: every page is built, every link on it leads somewhere, and nothing comes from a network."""

import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from bs4 import BeautifulSoup

pytest.importorskip("mkdocs", reason="mkdocs is not installed: pip install -r requirements-site.lock")
pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
SITE = ROOT / "build" / "site"


@pytest.fixture(scope="module")
def pages():
    """Page -> its HTML, parsed."""
    build = [sys.executable, ROOT / "docs" / "site" / "build.py"]
    finished = subprocess.run(build, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return {path: BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser") for path in SITE.rglob("*.html")}


def test_every_notebook_and_page_of_the_docs_is_there(pages):
    wanted = {path.stem for folder in ("notebooks", "docs") for path in (ROOT / folder).glob("*.[mi]*")}
    assert wanted <= {path.stem for path in pages}


def test_every_link_leads_to_a_page_or_a_heading(pages):
    dead = []
    for page, html in pages.items():
        if page.name == "404.html":
            continue
        for link in html.select("article a[href], nav a[href]"):
            target = urlsplit(link["href"])
            if target.scheme:
                continue
            path = (page.parent / unquote(target.path)).resolve() if target.path else page
            path = path / "index.html" if path.is_dir() else path
            if not path.exists() or (target.fragment and path in pages and not pages[path].find(id=target.fragment)):
                dead.append(f"{page.relative_to(SITE)}: {link['href']}")
    assert not dead


def test_no_page_loads_anything_from_a_network(pages):
    for page, html in pages.items():
        loaded = [tag["src"] for tag in html.select("[src]")] + [
            tag["href"] for tag in html.select("link[rel=stylesheet]")
        ]
        assert not [place for place in loaded if place.startswith(("http", "//"))], page


def test_formulas_are_drawn_by_the_browser_itself(pages):
    notebook = pages[SITE / "notebooks" / "03_reward_model.html"]
    assert notebook.find_all("math") and "$" not in "".join(part.text for part in notebook.select("article p"))
