"""The page Compare: the table of bundles."""

from dataclasses import replace
from pathlib import Path

from inspections import NOON
from normweave.serve.library import LibraryBundle
from normweave.serve.model_store import Activation, ShadowRun
from normweave.serve.models import ModelsState
from normweave.serve.pages.compare import question, rows
from normweave.serve.templating import render_macro

ACTIVE, CANDIDATE, EARLIER = "a" * 64, "b" * 64, "c" * 64


def bundle(name, bundle_hash, **given):
    return LibraryBundle(
        name=name, path=Path(name), bundle_hash=bundle_hash, categories={"cloth": ["a"]}, preparation={}, **given
    )


def state(*bundles, **given):
    run = ShadowRun(
        id=1,
        bundle_hash=CANDIDATE,
        active_hash=ACTIVE,
        started_at=NOON,
        ended_at=None,
        actor="Ada",
        failure=None,
        skipped=0,
    )
    active = Activation(id=2, at=NOON, bundle_hash=ACTIVE, before=1, actor="Ada")
    back_to = Activation(id=1, at=NOON, bundle_hash=EARLIER, before=None, actor="Ada")
    return ModelsState(
        bundles=list(bundles), active=active, back_to=back_to, shadow=given.get("shadow", run), waiting=0
    )


def shown(found):
    return [
        (row["bundle"].name, row["state"], [action for action, _ in row["actions"]], row["reason"]) for row in found
    ]


def test_bundles_whose_files_are_missing_have_a_row_with_their_actions():
    found = state(bundle("earlier", EARLIER))
    missing = "Its files are missing: put the bundle back, "
    assert shown(rows(found)) == [
        ("a" * 12, "active", ["rollback"], f"{missing}or the server cannot start again."),
        ("b" * 12, "candidate", ["stop"], f"{missing}or stop it."),
        ("earlier", "ready", ["shadow"], None),
    ]
    html = render_macro("compare.html", "bundles", rows=rows(found))
    assert f'data-action="rollback" data-hash="{ACTIVE}"' in html
    assert f'<th scope="row">{"a" * 12}</th>' in html  # the short hash is the name, and is not repeated
    assert "Roll back to earlier?" in question("rollback", rows(found)[0]["bundle"], found, {})
    ended = state(bundle("old", ACTIVE), shadow=replace(found.shadow, ended_at=NOON))
    assert shown(rows(ended)) == [("old", "active", ["rollback"], None)]


def test_a_damaged_candidate_can_be_stopped_but_not_promoted():
    found = state(
        bundle("old", ACTIVE), bundle("new", CANDIDATE, damage="It is torn."), bundle("bad", None, damage="x")
    )
    assert shown(rows(found)) == [
        ("old", "active", ["rollback"], None),
        ("new", "candidate", ["stop"], "It is torn."),
        ("bad", "damaged", [], "x"),
    ]
    sound = state(bundle("old", ACTIVE), bundle("new", CANDIDATE))
    assert shown(rows(sound))[1] == ("new", "candidate", ["promote", "stop"], None)
