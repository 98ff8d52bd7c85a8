"""The page on which a person gives a token; plain HTML that needs nothing from behind the gate."""

from __future__ import annotations

import asyncio
import html
from urllib.parse import parse_qsl

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.types import Receive, Scope, Send

from normweave.serve.access import Access

LOGIN, LOGOUT = "/login", "/logout"
COOKIE = "normweave"
MAX_BYTES = 4096
"""Of the form."""
WRONG_SECONDS = 0.5
"""A wrong token is answered this late; there is nothing to guess, but a log stays readable."""

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>normweave: log in</title>
<link rel="icon" href="data:,">
<style>
:root {{ color-scheme: light dark; --ground: #f4f6f8; --sheet: #fff; --ink: #16202c; --soft: #566273; --line: #b8c2cf;
  --main: #1f6fd6; --on: #fff; --wrong: #a34700; }}
@media (prefers-color-scheme: dark) {{ :root {{ --ground: #10151c; --sheet: #18202a; --ink: #e8edf3; --soft: #9dabbc;
  --line: #44546a; --main: #6aaeff; --on: #10151c; --wrong: #ffa454; }} }}
* {{ box-sizing: border-box; }}
body {{ margin: 0; min-height: 100vh; display: grid; place-items: center; padding: 16px; background: var(--ground);
  color: var(--ink); font: 17px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }}
form {{ width: 100%; max-width: 400px; background: var(--sheet); border-radius: 12px; padding: 28px; }}
h1 {{ font-size: 1.5rem; margin: 0 0 4px; }}
p {{ margin: 0 0 20px; color: var(--soft); }}
p.wrong {{ color: var(--wrong); font-weight: 600; }}
label {{ display: block; font-weight: 600; margin-bottom: 6px; }}
input, button {{ width: 100%; min-height: 48px; font: inherit; border-radius: 8px; padding: 0 14px; }}
input {{ border: 1px solid var(--line); background: var(--ground); color: var(--ink); }}
button {{ margin-top: 16px; border: 0; background: var(--main); color: var(--on); font-weight: 600; cursor: pointer; }}
:focus-visible {{ outline: 3px solid var(--main); outline-offset: 2px; }}
</style></head><body>
<form method="post" action="{action}">
<h1>normweave</h1>
<p>Visual inspection. Log in with the token that you were given.</p>
{wrong}<label for="token">Token</label>
<input id="token" name="token" type="password" autocomplete="current-password" autofocus required>
<button type="submit">Log in</button>
</form></body></html>
"""
_WRONG = '<p class="wrong" role="alert">This token is unknown, expired or revoked.</p>\n'


def wanted(scope: Scope, headers: Headers) -> bool:
    """Whether a request without a login is one of a person, who can give a token."""
    return (
        scope["type"] == "http"
        and scope["method"] == "GET"
        and not scope["path"].startswith(("/v1/", "/_nicegui"))
        and "text/html" in headers.get("accept", "")
    )


def page(*, status: int, wrong: bool = False) -> Response:
    """The form."""
    text = _PAGE.format(action=html.escape(LOGIN), wrong=_WRONG if wrong else "")
    return HTMLResponse(text, status_code=status, headers={"Cache-Control": "no-store"})


async def answer(scope: Scope, receive: Receive, send: Send, *, access: Access) -> None:
    """GET /login, POST /login, POST /logout."""
    request = Request(scope, receive)
    await (await _answer(request, access))(scope, receive, send)


async def _answer(request: Request, access: Access) -> Response:
    secure = request.url.scheme == "https"
    if request.url.path == LOGOUT and request.method == "POST":
        response = RedirectResponse("/", status_code=303)
        response.headers["set-cookie"] = set_cookie("", seconds=0, secure=secure)
        return response
    if request.url.path == LOGIN and request.method == "POST":
        secret = await _token(request)
        token = await asyncio.to_thread(access.authenticate, secret)
        if token is None:
            await asyncio.sleep(WRONG_SECONDS)
            return page(status=401, wrong=True)
        response = RedirectResponse("/", status_code=303)
        response.headers["set-cookie"] = set_cookie(
            access.create_session(token), seconds=access.session_seconds, secure=secure
        )
        return response
    if request.url.path == LOGIN and request.method in ("GET", "HEAD"):
        return page(status=200)
    return Response("Not allowed here.", status_code=405, headers={"Allow": "GET, POST"})


async def _token(request: Request) -> str:
    """From the form; empty where there is none."""
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > MAX_BYTES:
            return ""
    fields = dict(parse_qsl(body.decode("utf-8", "replace"), max_num_fields=8))
    return fields.get("token", "").strip()


def set_cookie(value: str, *, seconds: float, secure: bool) -> str:
    """Not for scripts, and sent from no other site."""
    return f"{COOKIE}={value}; Path=/; Max-Age={int(seconds)}; HttpOnly; SameSite=Strict{'; Secure' if secure else ''}"
