"""Compare: the bundles of the library, and where the one in the shadow differs from the one that inspects."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

from nicegui import ui
from nicegui.events import GenericEventArguments

from normweave.errors import NormweaveError
from normweave.serve.library import LibraryBundle
from normweave.serve.model_schemas import overlay_url, reviewed, summed
from normweave.serve.model_store import Actor, Comparison, Difference, Pair, ShadowRun
from normweave.serve.models import Models, ModelsState, changed_preparation
from normweave.serve.pages import verdict
from normweave.serve.pages.frame import Page, Pager, Serving, notify_error, plain_button
from normweave.serve.pages.verdict import Result
from normweave.serve.templating import render_macro
from normweave.types import Outcome

TEMPLATE = "compare.html"
ROWS = 8
"""Images of one page of the list."""
REFRESH_SECONDS = 3.0
"""Interval between two reads of the state and the counts."""
MAX_SIDE = 640
"""Longer side of the images in pixels."""
ANY = ""
SPANS = {"1": "last 24 hours", "7": "last 7 days", "30": "last 30 days", ANY: "everything"}
EMIT_ACTION = """(event) => {
  const button = event.target.closest('[data-action]');
  if (button) emit([button.dataset.action, button.dataset.hash]);
}"""
"""Click handler of the table of bundles: it sends the action and the hash of a button."""
ACTIONS = {"shadow": "Start shadow", "stop": "Stop", "promote": "Promote", "rollback": "Roll back"}


class Shown(NamedTuple):
    """One side of an image that both bundles judged."""

    bundle: str
    outcome: Outcome
    result: Result
    overlay: str | None


class ComparePage(Page):
    """Bundles with their actions, counts of differences, and the images side by side."""

    path = "/compare"
    title = "Compare"
    purpose = "Try another bundle on the same images before it inspects. Its results delay nothing and reject nothing."
    position = 8
    engineers_only = True

    def __init__(self, serving: Serving) -> None:
        super().__init__(serving)
        self._asked: tuple[str, str] | None = None  # action and hash, until it is confirmed
        self._span, self._product = "7", ANY
        self._busy = asyncio.Lock()

    async def content(self) -> None:
        """Build the table of bundles, the counts and the list of images."""
        self.heading()
        if self._service.models is None:
            ui.html(render_macro(TEMPLATE, "no_library")).classes("sheet")
            return
        self._models: Models = self._service.models
        with ui.element("section").classes("sheet"):
            ui.html("<h2>Bundles</h2>")
            self._table = ui.html()
            self._table.on("click", self._ask, js_handler=EMIT_ACTION)
            self._running = ui.html().props('aria-live="polite"')
        with ui.element("section").classes("sheet"):
            ui.html("<h2>Differences</h2>")
            with ui.element("div").classes("choices"):
                span = ui.select(SPANS, value=self._span, label="Time")
                span.on_value_change(lambda change: self._choose(span=str(change.value or ANY)))
                self._products = ui.select({ANY: "all products"}, value=ANY, label="Product")
                self._products.on_value_change(lambda change: self._choose(product=str(change.value or ANY)))
                for choice in (span, self._products):
                    choice.props("outlined dense options-dense").classes("choice")
            self._counts = ui.html()
            self._images = ui.html()
            self._pager = Pager(ROWS, self._list)
        with (
            ui.dialog().props('aria-label="Confirm"') as self._dialog,
            ui.element("div").classes("sheet revoke"),
        ):
            self._question = ui.html()
            with ui.element("div").classes("pager"):
                self._confirm = ui.button("", color=None, on_click=self._act)
                self._confirm.props("unelevated no-caps").classes("main-button")
                plain_button("Cancel", self._dialog.close)
        await self._refresh()
        ui.timer(REFRESH_SECONDS, self._refresh, immediate=False)

    # ── actions ──────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _ask(self, event: GenericEventArguments) -> None:
        action, bundle_hash = (str(each) for each in event.args)
        state = await asyncio.to_thread(self._models.state)
        found = next((one for one in [*missing(state), *state.bundles] if one.bundle_hash == bundle_hash), None)
        if action not in ACTIONS or found is None:
            return
        self._asked = action, bundle_hash
        self._question.set_content(question(action, found, state, self._service.detector.record["preparation"]))
        self._confirm.set_text(ACTIONS[action])
        self._dialog.open()

    async def _act(self) -> None:
        """Do what was confirmed."""
        self._dialog.close()
        asked, self._asked = self._asked, None
        if asked is None or self._token.role != "engineer":
            return
        (action, bundle_hash), actor = asked, Actor(self._token.name, self._token.id)
        try:
            if action == "shadow":
                await asyncio.to_thread(self._models.start_shadow, bundle_hash, actor, any_preparation=True)
            elif action == "stop":
                await asyncio.to_thread(self._models.stop_shadow, bundle_hash, actor)
            elif action == "promote":
                await asyncio.to_thread(self._models.promote, bundle_hash, actor)
            else:
                await asyncio.to_thread(self._models.roll_back, actor)
        except NormweaveError as error:
            notify_error(error)
        await self._refresh()

    # ── what is shown ────────────────────────────────────────────────────────────────────────────────────────────────

    async def _choose(self, *, span: str | None = None, product: str | None = None) -> None:
        self._span = self._span if span is None else span
        self._product = self._product if product is None else product
        self._pager.restart()
        await self._refresh()

    async def _refresh(self) -> None:
        async with self._busy:
            state = await asyncio.to_thread(self._models.state)
            self._table.set_content(render_macro(TEMPLATE, "bundles", rows=rows(state)))
            self._running.set_content(render_macro(TEMPLATE, "running", state=state))
            if state.shadow is None:
                self._counts.set_content(render_macro(TEMPLATE, "nothing"))
                return
            run, comparison = await asyncio.to_thread(self._comparison)
            pairs = await asyncio.to_thread(self._models.records.pairs, comparison)
            self._counts.set_content(counts(pairs, run, state, comparison))
            options = {ANY: "all products"} | products(pairs)
            if self._product == ANY and options != self._products.options:
                self._products.set_options(options, value=ANY)
        if self._pager.before is None:
            await self._list()

    def _comparison(self) -> tuple[ShadowRun, Comparison]:
        since = datetime.now(UTC) - timedelta(days=int(self._span)) if self._span else None
        category, _, subclass = self._product.partition("\n")
        return self._models.comparison(since=since, category=category or None, subclass=subclass or None)

    async def _list(self) -> None:
        _, comparison = await asyncio.to_thread(self._comparison)
        before, limit = self._pager.before, self._pager.limit
        differences = self._models.records.differences
        found = await asyncio.to_thread(differences, comparison, before=before, limit=limit)
        state = await asyncio.to_thread(self._models.state)
        shown = {one.id for one in self._pager.shown([one.inspection for one in found])}
        self._images.set_content(images([one for one in found if one.inspection.id in shown], state, comparison))


def rows(state: ModelsState) -> list[dict[str, Any]]:
    """Return what the table shows of each bundle, with the actions that it allows."""
    found = []
    for one in [*missing(state), *state.bundles]:
        is_candidate = one.bundle_hash not in (None, state.active.bundle_hash) and one.bundle_hash == state.candidate
        status = "candidate" if is_candidate else state.state(one)
        actions = {"ready": ["shadow"], "failed": ["shadow"], "candidate": ["promote", "stop"]}.get(status, [])
        if is_candidate and one.damage is not None:
            actions = ["stop"]
        if status == "active" and state.back_to is not None:
            actions = ["rollback"]
        names = [verdict.product(category, each) for category, known in one.categories.items() for each in known]
        found.append(
            {
                "bundle": one,
                "state": status,
                "reason": state.reason(one),
                "products": names or list(one.categories),
                "actions": [(action, ACTIONS[action]) for action in actions],
            }
        )
    return found


def missing(state: ModelsState) -> list[LibraryBundle]:
    """Return the active bundle and the candidate if the folder has them no longer."""
    cures = {state.active.bundle_hash: "or the server cannot start again"}
    if state.candidate is not None:
        cures.setdefault(state.candidate, "or stop it")
    known = {one.bundle_hash for one in state.bundles}
    return [
        LibraryBundle(
            name=state.name(bundle_hash),
            path=Path(),
            bundle_hash=bundle_hash,
            categories={},
            preparation={},
            damage=f"Its files are missing: put the bundle back, {cure}.",
        )
        for bundle_hash, cure in cures.items()
        if bundle_hash not in known
    ]


def question(action: str, bundle: LibraryBundle, state: ModelsState, preparation: Mapping[str, Any]) -> str:
    """Return what a person confirms.

    Args:
        preparation: of the active bundle.
    """
    changed = changed_preparation(preparation, bundle.preparation) if action == "shadow" else ""
    back_to = None if state.back_to is None else state.name(state.back_to.bundle_hash)
    given = {"bundle": bundle, "active": state.name(state.active.bundle_hash), "back_to": back_to, "changed": changed}
    candidate = None if state.candidate is None else state.name(state.candidate)
    return render_macro(TEMPLATE, "question", action=action, candidate=candidate, **given)


def products(pairs: Sequence[Pair]) -> dict[str, str]:
    """Return the products of the images, by the value of the choice."""
    found = {(one.category or "", one.subclass or "") for one in pairs if one.category}
    return {f"{category}\n{subclass}": verdict.product(category, subclass or None) for category, subclass in found}


def counts(pairs: Sequence[Pair], run: ShadowRun, state: ModelsState, comparison: Comparison) -> str:
    """Return the numbers of images and differences, the table of verdicts, and what reviewers decided."""
    table = [
        (verdict.product(one.category, one.subclass), _result(one.active), _result(one.candidate), one.n)
        for one in sorted(summed(pairs), key=lambda each: -each.n)
        if one.active != one.candidate
    ]
    return render_macro(
        TEMPLATE,
        "counts",
        judged=sum(one.n for one in pairs),
        skipped=run.skipped,
        table=table,
        differences=sum(n for *_, n in table),
        reviewed=reviewed(pairs),
        active=state.name(comparison.active),
        candidate=state.name(comparison.candidate),
    )


def _result(value: str | None) -> Result:
    return Result(value or "unreadable")  # type: ignore[call-arg]  # a look-up, which takes the value alone


def images(found: Sequence[Difference], state: ModelsState, comparison: Comparison) -> str:
    """Return the images with the results of both bundles side by side."""
    both = []
    for inspection, candidate in found:
        shown = inspection.image is not None
        own = f"/v1/inspections/{inspection.id}/overlay"
        other = overlay_url(inspection.id, candidate.outcome) if candidate.grids is not None else None
        sides = [
            Shown(state.name(bundle_hash), outcome, verdict.result_of(outcome), address if shown else None)
            for bundle_hash, outcome, address in (
                (comparison.active, inspection.outcome, own),
                (comparison.candidate, candidate.outcome, other),
            )
        ]
        both.append((inspection, sides, verdict.decision_word(inspection)))
    return render_macro(TEMPLATE, "images", both=both, max_side=MAX_SIDE)
