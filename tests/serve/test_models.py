"""Active bundle and candidate: start, stop, promote, roll back."""

import asyncio
import shutil
import threading
from contextlib import closing
from pathlib import Path

import pytest

from bundles import ADA, damage, wait_for
from inspections import ALL, inspect_files
from normweave.detector import Detector
from normweave.errors import ConfigError
from normweave.serve.detectors import Detectors
from normweave.serve.library import ModelError
from normweave.serve.model_store import ModelStore
from normweave.serve.models import Models, changed_preparation, choose_active
from normweave.serve.service import StoppedError, Upload
from normweave.serve.store import Store

from .conftest import load


def counted(models):
    _, comparison = models.comparison()
    return models.records.pairs(comparison)


def refused(action, *arguments, **given):
    with pytest.raises(ModelError) as raised:
        action(*arguments, **given)
    return raised.value.code


def states(models):
    state = models.state()
    return {one.name: state.state(one) for one in state.bundles}


@pytest.fixture
def kept(database_url):
    with closing(Store.open(database_url, line="Press 4")) as store:
        yield store


def test_the_only_bundle_is_active_and_else_one_is_chosen_by_its_name(library, hashes, kept):
    with pytest.raises(ConfigError, match=r"has 2 usable bundles.*--active NAME. Usable: new, old"):
        choose_active(library, kept, name=None)
    with pytest.raises(ConfigError, match=r"Unknown bundle 'oldd'. Did you mean 'old'"):
        choose_active(library, kept, name="oldd")
    with pytest.raises(ConfigError, match=r"The bundle torn cannot be used: .*not the file that was saved"):
        choose_active(library, kept, name="torn")
    damage(library.folder / "new")
    assert choose_active(library, kept, name=None).name == "old"
    assert ModelStore(kept).active().bundle_hash == hashes["old"]


def test_a_library_without_a_usable_bundle_asks_for_one(library, kept):
    for name in ("old", "new"):
        damage(library.folder / name)
    with pytest.raises(
        ConfigError, match=r"has no usable bundle\. Put one into it, .*torn cannot be used: model\.onnx"
    ):
        choose_active(library, kept, name=None)


def test_each_line_keeps_its_active_bundle(library, kept):
    assert choose_active(library, kept, name="new").name == "new"
    assert choose_active(library, kept, name=None).name == "new"
    other = Store(kept.database, line="Press 5")
    with pytest.raises(ConfigError, match=r"none is active on this line yet"):
        choose_active(library, other, name=None)
    choose_active(library, other, name="old")
    assert choose_active(library, kept, name=None).name == "new"
    damage(library.folder / "new")
    with pytest.raises(ConfigError, match=r"cannot be loaded from .*Put it back, or choose another one with --active"):
        choose_active(library, kept, name=None)
    assert choose_active(library, kept, name="old").name == "old"


def test_what_is_refused_has_a_code(models, hashes):
    assert refused(models.start_shadow, hashes["old"], ADA) == "already_active"
    assert refused(models.start_shadow, hashes["torn"], ADA) == "bundle_damaged"
    assert refused(models.start_shadow, "0" * 64, ADA) == "unknown_model"
    assert refused(models.promote, hashes["new"], ADA) == "not_candidate"
    assert refused(models.stop_shadow, hashes["new"], ADA) == "not_candidate"
    assert refused(models.roll_back, ADA) == "nothing_to_roll_back_to"
    assert refused(models.comparison) == "no_candidate"
    assert states(models) == {"new": "ready", "old": "active", "torn": "damaged"}


def test_an_incomplete_copy_of_the_active_bundle_is_damaged(models, library):
    shutil.copytree(library.folder / "old", library.folder / "copy")
    (library.folder / "copy" / "model.onnx").unlink()
    assert states(models) == {"copy": "damaged", "new": "ready", "old": "active", "torn": "damaged"}


@pytest.mark.parametrize("harm", [damage, shutil.rmtree])
def test_a_candidate_is_stopped_without_its_files(models, hashes, library, harm):
    models.start_shadow(hashes["new"], ADA)
    harm(library.folder / "new")
    models.stop_shadow(hashes["new"], ADA)
    assert models.state().candidate is None


def test_a_candidate_in_the_place_of_another_one_is_in_the_audit_with_it(models, hashes, library_service):
    models.records.start_shadow("f" * 64, active_hash=hashes["old"], actor=ADA)
    models.start_shadow(hashes["new"], ADA)
    events = [(entry.event, entry.detail["bundle_hash"][:4]) for entry in library_service.store.audit(limit=3)]
    assert events[::-1] == [
        ("shadow_started", "ffff"),
        ("shadow_stopped", "ffff"),
        ("shadow_started", hashes["new"][:4]),
    ]


def test_another_preparation_is_compared_only_on_demand(models, hashes, library_service, monkeypatch):
    record = library_service.detector.record
    monkeypatch.setitem(record, "preparation", record["preparation"] | {"height": 128})
    assert refused(models.start_shadow, hashes["new"], ADA) == "other_preparation"
    models.start_shadow(hashes["new"], ADA, any_preparation=True)
    assert states(models)["new"] == "candidate"
    assert changed_preparation({"height": 64, "crop": 1}, {"height": 32, "crop": 1}) == "height 64 → 32"


def test_a_candidate_is_compared_promoted_and_rolled_back(models, library_service, hashes, photos, library):
    """The whole way, also over a restart of the service."""
    service, some = library_service, photos[:12]
    models.start_shadow(hashes["new"], ADA)
    first = inspect_files(service, *some)
    wait_for(lambda: sum(one.n for one in counted(models)) == len(some))
    expected = {name: Detector.load(library.folder / name, threads=1).score(list(some)) for name in ("old", "new")}
    _, comparison = models.comparison()
    found = models.records.differences(comparison, limit=100)
    pairs = zip([one.id for one in first], expected["old"], expected["new"], strict=True)
    differing = [
        (old.verdict, new.verdict)
        for _, old, new in sorted(pairs, key=lambda pair: pair[0])
        if old.verdict != new.verdict
    ]
    assert differing
    assert [(one.inspection.outcome.verdict, one.candidate.outcome.verdict) for one in reversed(found)] == differing
    for one in found:
        number = [inspection.id for inspection in first].index(one.inspection.id)
        assert one.candidate.outcome.pred_score == pytest.approx(expected["new"][number].pred_score, rel=1e-5)
        assert one.candidate.grids
    text = service.metrics.text().decode()
    assert f'bundle_hash="{hashes["old"]}"' in text
    assert f'normweave_shadow_images_total{{result="judged"}} {len(some)}.0' in text
    assert f"normweave_shadow_differences_total {len(differing)}.0" in text

    models.promote(hashes["new"], ADA)
    assert states(models) == {"new": "active", "old": "ready", "torn": "damaged"}
    assert f'bundle_hash="{hashes["new"]}"' in service.metrics.text().decode()
    second = inspect_files(service, *some)
    for inspections, name in ((first, "old"), (second, "new")):
        for inspection, outcome in zip(inspections, expected[name], strict=True):
            assert inspection.outcome.bundle_hash == hashes[name]
            assert inspection.outcome.pred_score == pytest.approx(outcome.pred_score, rel=1e-5)
            assert inspection.outcome.threshold == outcome.threshold
    assert service.store.inspection(first[0].id).outcome.bundle_hash == hashes["old"]
    assert models.comparison()[1] == comparison  # the last one, though its candidate is active now

    models.start_shadow(hashes["old"], ADA)
    models.stop()
    again = Models(library, service=service, load=None, device="cpu")  # the next start of the server
    again.resume()
    assert again.state().candidate == hashes["old"]
    again.stop()

    models.roll_back(ADA)
    assert states(models) == {"new": "ready", "old": "active", "torn": "damaged"}
    assert models.state().candidate is None  # it is active
    assert inspect_files(service, some[0])[0].outcome.bundle_hash == hashes["old"]
    assert refused(models.roll_back, ADA) == "nothing_to_roll_back_to"
    events = [(one.event, one.actor, one.token) for one in reversed(service.store.audit(limit=10))][1:]
    started = ("shadow_started", "Ada", 1)
    assert events == [started, ("model_promoted", "Ada", 1), started, ("model_rolled_back", "Ada", 1)]


def test_a_candidate_that_fails_is_switched_off_and_inspection_goes_on(models, library_service, hashes, photos):
    models.start_shadow(hashes["new"], ADA)
    for path in (models.library.folder / "new").iterdir():  # after it was checked, before it is loaded
        path.unlink()
    wait_for(lambda: models.state().candidate is None)
    assert "holds no bundle.json" in models.records.last_shadow().failure
    assert library_service.store.audit(limit=1)[0].event == "shadow_failed"
    assert inspect_files(library_service, photos[0])[0].outcome.bundle_hash == hashes["old"]
    assert refused(models.promote, hashes["new"], ADA) == "unknown_model"


def test_a_promotion_to_a_bundle_that_was_damaged_changes_nothing(models, library_service, hashes, photos):
    models.start_shadow(hashes["new"], ADA)
    damage(models.library.folder / "new")
    assert refused(models.promote, hashes["new"], ADA) == "bundle_damaged"
    assert states(models)["old"] == "active"
    assert inspect_files(library_service, photos[0])[0].outcome.bundle_hash == hashes["old"]


def test_no_image_is_lost_or_attributed_to_the_wrong_bundle_while_they_are_exchanged(
    models, library_service, hashes, photos, library
):
    service, some, answers, stop = library_service, photos[:16], [], threading.Event()
    contents = [Path(path).read_bytes() for path in some]
    expected = {
        hashes[name]: Detector.load(library.folder / name, threads=1).score(list(some)) for name in ("old", "new")
    }

    def send(client):
        number = client
        while not stop.is_set():
            number += 1
            which = number % len(some)
            upload = Upload(f"{client}-{number}", contents[which])
            (one,) = asyncio.run(service.inspect([upload], source="api", actor="test"))
            answers.append((which, upload.name, one))

    clients = [threading.Thread(target=send, args=(client,)) for client in range(8)]
    for client in clients:
        client.start()
    for number in range(10):
        before = len(answers)
        wait_for(lambda before=before: len(answers) > before + 4)
        if number % 2:
            models.roll_back(ADA)
        else:
            models.records.start_shadow(hashes["new"], active_hash=hashes["old"], actor=ADA)  # without its process
            models.promote(hashes["new"], ADA)
    stop.set()
    for client in clients:
        client.join()
    names = [name for _, name, _ in answers]
    assert len(set(names)) == len(names) == len({one.id for _, _, one in answers}) > 50
    seen = {one.outcome.bundle_hash for _, _, one in answers}
    assert seen == {hashes["old"], hashes["new"]}
    for which, name, one in answers:
        outcome = expected[one.outcome.bundle_hash][which]
        assert one.name == name
        assert one.outcome.pred_score == pytest.approx(outcome.pred_score, rel=1e-4)
        assert (one.outcome.verdict, one.outcome.threshold) == (outcome.verdict, outcome.threshold)
    assert len(service.store.inspections(ALL, limit=10**6)) == len(answers)


# ── another server of the line ───────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def other(library_service, loaded, library, start):
    """The models of a second server with the same store and library."""
    service = start()
    service.store = library_service.store
    service.detectors = Detectors(loaded, views={}, store=service.store, metrics=service.metrics)
    service.models = Models(library, service=service, load=load, device="cpu")
    return service.models, service


def test_what_another_server_decides_is_taken_over(models, other, hashes, library):
    follower, service = other
    follower.follow()
    assert service.detector.bundle_hash == hashes["old"]
    models.start_shadow(hashes["new"], ADA)
    follower.follow()
    follower.follow()
    assert follower.state().candidate == hashes["new"]
    assert refused(follower.promote, hashes["torn"], ADA) == "bundle_damaged"
    models.promote(hashes["new"], ADA)
    assert refused(follower.records.promote, hashes["new"], ADA) == "already_active"
    follower.follow()
    assert service.detector.bundle_hash == hashes["new"]
    before = models.records.before(models.records.active())
    models.roll_back(ADA)
    assert refused(follower.records.roll_back, before, ADA) == "nothing_to_roll_back_to"
    follower.follow()
    assert (service.detector.bundle_hash, service.refusal) == (hashes["old"], None)


def test_a_server_without_the_active_bundle_refuses_images_until_it_has_it(models, other, hashes, library, photos):
    follower, service = other
    follower.follow()
    models.start_shadow(hashes["new"], ADA)
    models.promote(hashes["new"], ADA)
    away = (library.folder / "new").rename(library.folder.parent / "away")
    with pytest.raises(ModelError, match="The library has no bundle"):
        follower.follow()
    with pytest.raises(StoppedError, match=r"The active bundle of the line cannot be loaded on this server: The libra"):
        inspect_files(service, photos[0])
    with pytest.raises(StoppedError, match=r"The active bundle of the line cannot be loaded"):
        service.check_ready()
    away.rename(library.folder / "new")
    follower.follow()
    (one,) = inspect_files(service, photos[0])
    assert one.outcome.bundle_hash == hashes["new"]


def test_a_rate_that_another_server_has_set_is_taken_over(models, other, library_service):
    _, service = other
    before = service.detector
    service.detectors.follow_rates()
    assert service.detector is before
    asyncio.run(library_service.change_rate(0.4, actor="Ada"))
    service.detectors.follow_rates()
    assert service.detector.calibration.false_alarm_rate == 0.4
