"""HTML of the login form and of the pages: Jinja2 templates in `templates/`, in which every value is escaped."""

from __future__ import annotations

from datetime import datetime

from normweave.report.html import environment


def percent(share: float) -> str:
    """Return a share in percent with three digits."""
    return f"{100 * share:.3g}\u00a0%"


def local(moment: datetime) -> str:
    """Return a moment in the time zone of this machine."""
    return f"{moment.astimezone():%Y-%m-%d %H:%M:%S}"


_ENVIRONMENT = environment("normweave.serve", percent=percent, local=local)


def render(template: str, **values: object) -> str:
    """Return a whole template with its values filled in."""
    return _ENVIRONMENT.get_template(template).render(values)


def render_macro(template: str, macro: str, /, **values: object) -> str:
    """Return one macro of a template with its values filled in."""
    return str(getattr(_ENVIRONMENT.get_template(template).module, macro)(**values))
