from datetime import UTC, datetime
from importlib import resources

import jinja2
import pytest

from normweave.serve.templating import local, percent, render, render_macro


def test_values_are_escaped():
    assert "&lt;b&gt;" in render_macro("model.html", "refused", reason="<b>")


def test_a_missing_value_is_an_error():
    with pytest.raises(jinja2.UndefinedError, match="wrong"):
        render("login.html", action="/login", line="Line A")
    with pytest.raises(jinja2.UndefinedError, match="reason"):
        render_macro("model.html", "refused")


def test_every_template_compiles():
    names = [file.name for file in resources.files("normweave.serve").joinpath("templates").iterdir()]
    whole = {"login.html", "unavailable.html"}  # the others hold macros
    assert whole < set(names)
    for name in names:
        if name not in whole:
            with pytest.raises(AttributeError):
                render_macro(name, "absent")


def test_shares_and_moments():
    assert percent(0.01234) == "1.23\u00a0%"
    moment = datetime(2026, 3, 1, 12, tzinfo=UTC)
    assert local(moment) == f"{moment.astimezone():%Y-%m-%d %H:%M:%S}"
