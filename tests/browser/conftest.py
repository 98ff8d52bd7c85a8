"""Fixtures of the tests in a browser."""

from browsing import chromium, login_form, parts, sent, server, visit  # noqa: F401
