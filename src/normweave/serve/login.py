"""The login form: plain HTML that loads nothing, since everything else needs a login."""

from __future__ import annotations

import asyncio
import re
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qsl, urlsplit

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.types import Receive, Scope, Send

from normweave.serve import problems
from normweave.serve.access import PREFIX, Access
from normweave.serve.templating import render

LOGIN, LOGOUT = "/login", "/logout"
MAX_BYTES = 4096
"""Largest body of the form that is read."""
WRONG_SECONDS = 0.5
"""Delay of the response to a wrong token. Tokens are too long to guess; the delay keeps the log readable."""


def is_page_request(scope: Scope, headers: Headers) -> bool:
    """Return whether a request without a login comes from a browser that can show the form."""
    return (
        scope["type"] == "http"
        and scope["method"] == "GET"
        and not scope["path"].startswith(("/v1/", "/_nicegui"))
        and "text/html" in headers.get("accept", "")
    )


def cookie_name(headers: Headers, line: str) -> str:
    """Return the name of the session cookie, which has the name of the line and the port.

    A browser sends a cookie to all ports of a host, so two lines on one PC need two names.
    """
    try:
        port = urlsplit(f"//{headers.get('host', '')}").port
    except ValueError:
        port = None
    return "_".join(("normweave", *re.findall("[A-Za-z0-9]+", line), *([] if port is None else [str(port)])))


def session_cookie(headers: Headers, *, line: str) -> str | None:
    """Return the value of the session cookie; None if there is none."""
    try:
        cookies: SimpleCookie = SimpleCookie(headers.get("cookie", ""))
    except CookieError:
        return None
    morsel = cookies.get(cookie_name(headers, line))
    return None if morsel is None else morsel.value


def client_address(scope: Scope) -> str:
    """Return the network address of the client; empty if it is unknown."""
    client = scope.get("client")
    return str(client[0]) if client else ""


def page(*, status: int, line: str, wrong: bool = False) -> Response:
    """Return the login form with the name of the line, and with a message if the token was wrong."""
    text = render("login.html", action=LOGIN, line=line, wrong=wrong, prefix=PREFIX)
    return HTMLResponse(text, status_code=status, headers={"Cache-Control": "no-store"})


async def answer(scope: Scope, receive: Receive, send: Send, *, access: Access) -> None:
    """Serve GET /login, POST /login and POST /logout."""
    request = Request(scope, receive)
    await (await _answer(request, access))(scope, receive, send)


async def _answer(request: Request, access: Access) -> Response:
    secure, line = request.url.scheme == "https", access.line
    name = cookie_name(request.headers, line)
    route = (request.method, request.url.path)
    address = client_address(request.scope)
    if route == ("POST", LOGOUT):
        if cookie := session_cookie(request.headers, line=line):
            await asyncio.to_thread(access.log_out, cookie, address=address)
        return _redirect(set_cookie(name, "", seconds=0, secure=secure))
    if route == ("POST", LOGIN):
        token = await asyncio.to_thread(access.authenticate, await _submitted(request))
        if token is None:
            await asyncio.to_thread(access.failed_logins.add, address)
            await asyncio.sleep(WRONG_SECONDS)
            return page(status=401, line=line, wrong=True)
        cookie = await asyncio.to_thread(access.log_in, token, address=address)
        return _redirect(set_cookie(name, cookie, seconds=access.session_max_seconds, secure=secure))
    if route in (("GET", LOGIN), ("HEAD", LOGIN)):
        return page(status=200, line=line)
    allowed = "POST" if request.url.path == LOGOUT else "GET, HEAD, POST"
    detail = f"{request.method} is not allowed for {request.url.path}. Allowed: {allowed}."
    return problems.answer(405, detail, headers={"Allow": allowed})


def _redirect(cookie: str) -> Response:
    return RedirectResponse("/", status_code=303, headers={"Set-Cookie": cookie})


async def _submitted(request: Request) -> str:
    """Return the token from the form; an empty string if the form has none or is too large.

    A hand-held scanner types the whole address of a card into the form: the token is what follows the #.
    """
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > MAX_BYTES:
            return ""
    fields = dict(parse_qsl(body.decode("utf-8", "replace"), max_num_fields=8))
    return fields.get("token", "").rpartition("#")[2].strip()


def set_cookie(name: str, value: str, *, seconds: float, secure: bool) -> str:
    """Return a Set-Cookie header that scripts cannot read and other sites cannot send."""
    return f"{name}={value}; Path=/; Max-Age={int(seconds)}; HttpOnly; SameSite=Strict{'; Secure' if secure else ''}"
