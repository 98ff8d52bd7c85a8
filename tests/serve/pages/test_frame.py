import subprocess
import sys

from normweave.serve.pages import every_page

NEW_PAGE = """
from normweave.serve.pages.frame import Page

class ExtraPage(Page):
    path, title, purpose, position = "/extra", "Extra", "One more page.", 2.5

    async def content(self):
        self.heading()
"""
LIST = """
import sys
from normweave.serve import pages

pages.__path__.append(sys.argv[1])
print(*(page.title for page in pages.every_page()))
"""


def test_a_module_in_the_package_adds_a_page(tmp_path):
    (tmp_path / "extra.py").write_text(NEW_PAGE)
    command = [sys.executable, "-c", LIST, str(tmp_path)]
    titles = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert titles == [
        "Inspect",
        "Live",
        "Review",
        "Extra",
        "Model",
        "History",
        "Parts",
        "Line",
        "Drift",
        "Audit",
        "Tokens",
        "Compare",
        "Teach",
        "Region",
    ]


def test_the_pages_are_in_the_order_of_the_navigation():
    paths = [
        "/",
        "/live",
        "/review",
        "/model",
        "/history",
        "/parts",
        "/line",
        "/drift",
        "/audit",
        "/tokens",
        "/compare",
        "/teach",
        "/region",
    ]
    assert [page.path for page in every_page()] == paths
