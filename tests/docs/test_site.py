"""The documentation builds as a site, and the links of its pages lead to files of the site."""

import re
import subprocess
import sys
from html import unescape
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    call = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def test_links_lead_to_files_of_the_site(site):
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 20
    missing = [
        f"{page.relative_to(site)}: {link}"
        for page in pages
        if page.name != "404.html"
        for link in re.findall(r'(?:href|src)="([^"#?:]+)[#?"]', page.read_text("utf-8"))
        if not (page.parent / unquote(unescape(link))).exists()
    ]
    assert missing == []


def test_the_tutorial_is_a_page_with_its_figures(site):
    page = (site / "tutorial" / "tutorial.html").read_text("utf-8")
    assert page.count("data:image/jpeg;base64") == 3
    assert "with_rate" in page
