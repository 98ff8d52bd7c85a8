"""Hooks of mkdocs. The notebook links to Markdown files, as GitHub needs it; on the site these are pages."""

import re
from typing import Any


def on_post_page(output: str, *, page: Any, **_: Any) -> str:
    """Replace links to Markdown files by links to their pages."""
    if not page.file.src_uri.endswith(".ipynb"):
        return output
    return re.sub(r'href="(\.\./[\w/-]+)\.md"', r'href="\1.html"', output)
