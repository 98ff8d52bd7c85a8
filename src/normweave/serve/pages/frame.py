"""What stands around every page: header, ways to the other pages, light or dark, who is logged in."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from html import escape
from importlib import resources

from nicegui import ui

from normweave.errors import NormweaveError
from normweave.serve.records import Token
from normweave.serve.service import InspectionService

PAGES = (("/", "Inspect"), ("/review", "Review"), ("/model", "Model"), ("/history", "History"))
LOGIN_SECONDS = 30.0
"""Between two looks whether the token is still good: the gate stands before new connections only."""

_HALF = (
    '<svg class="icon" viewBox="0 0 24 24" aria-hidden="true"><circle cx="12" cy="12" r="9"/>'
    '<path class="half" d="M12 3a9 9 0 0 1 0 18z"/></svg><span class="theme-name"></span>'
)


def _text(name: str) -> str:
    return resources.files("normweave.serve.pages").joinpath(name).read_text(encoding="utf-8")


STYLE = _text("page.css")
SCRIPT = _text("page.js")


@contextmanager
def frame(path: str, service: InspectionService, token: Token) -> Iterator[None]:
    """The page at `path`, to be filled inside."""
    ui.add_head_html(f"<style>{STYLE}</style><script>{SCRIPT}</script>")
    ui.context.client.on_exception(_tell)
    with ui.element("header").classes("top"):
        ui.html('<a href="/">normweave</a>', tag="div").classes("brand")
        links = "".join(f'<a href="{address}"{_current(address, path)}>{name}</a>' for address, name in PAGES)
        ui.html(links, tag="nav").props('aria-label="Pages"')
        with ui.element("div").classes("person"):
            theme = ui.html(_HALF, tag="button").classes("theme").props("type=button")
            theme.props('title="Light or dark" aria-label="Light or dark"')
            theme.on("click", js_handler="() => window.normweave.nextTheme()")
            ui.html(f"{escape(token.name)}<small>{escape(token.role)}</small>").classes("who")
            with ui.element("form").props("method=post action=/logout"):
                ui.html("Log out", tag="button").classes("plain-button").props("type=submit")
    with ui.element("main").classes("page"):
        yield
    if token.digest:  # else nobody needs one here
        _watch_login(service, token)


def _tell(error: Exception) -> None:
    """What went wrong behind the page; the server's log has it whole."""
    told = (
        str(error)
        if isinstance(error, NormweaveError)
        else "Something went wrong. The server's log says what."
    )
    ui.notify(told, type="negative", multi_line=True, close_button="Close")


def _watch_login(service: InspectionService, token: Token) -> None:
    """Close the page once its token is revoked or has expired."""
    client = ui.context.client

    async def look() -> None:
        now = await asyncio.to_thread(service.store.token, token.digest)
        if now is None or not now.is_valid(datetime.now(UTC)):
            ui.navigate.to("/")
            await asyncio.sleep(1)  # for the browser to obey; then NiceGUI clears up after it
            if client.has_socket_connection:
                client.delete()

    ui.timer(LOGIN_SECONDS, look, immediate=False)


def _current(address: str, path: str) -> str:
    return ' aria-current="page"' if address == path else ""


def heading(title: str, told: str) -> None:
    """The title of a page, and what it is for."""
    ui.html(f'<h1>{escape(title)}</h1><p class="soft">{escape(told)}</p>').classes("heading")
