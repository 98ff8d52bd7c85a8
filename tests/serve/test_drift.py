"""Drift of the inspections of a server."""

import json
import threading
from copy import copy
from dataclasses import replace
from datetime import timedelta

import numpy as np
import pytest
from PIL import Image

from bundles import wait_for
from counterparts import until
from inspections import inspection, unreadable
from normweave.errors import DataError
from normweave.serve import DATABASE, drift
from normweave.serve.delivery import Deliveries
from normweave.serve.delivery_store import DeliveryStore
from normweave.serve.store import Store


def test_an_inspection_is_an_image_of_the_line():
    made = drift.image_of(inspection(id=7), by="camera")
    assert (made.name, made.product, made.window) == ("7", ("cloth", "twill"), "camera 1")
    assert made.numbers[0] == inspection().outcome.brightness
    assert made.unseen
    assert drift.image_of(unreadable(), by="hour") is None


def test_only_inspections_of_the_bundle_are_read_oldest_first(store):
    store.add([inspection(1), inspection(2, bundle_hash="d" * 64), inspection(3)])
    assert [one.name for one in drift.images(store, bundle_hash="c" * 64, by="hour")] == ["1", "3"]


def test_the_folder_of_a_server_has_its_database(tmp_path):
    assert drift.DATABASE == DATABASE
    with pytest.raises(DataError, match="holds no"):
        drift.open_store(str(tmp_path))
    url = f"sqlite:///{tmp_path / DATABASE}"
    with pytest.raises(DataError, match="There is no database"):
        drift.open_store(url)
    assert not list(tmp_path.iterdir())  # nothing is made by reading
    Store.open(tmp_path / DATABASE).close()
    drift.open_store(url).close()
    drift.open_store(str(tmp_path)).close()


def scored(loaded, photos, service, count, *, gain=1.0):
    """Store the outcomes of images as inspections of the service."""
    made = []
    for number in range(count):
        pixels = np.asarray(Image.open(photos[number % len(photos)]).convert("RGB"))
        outcome = loaded.score(np.rint(gain * pixels).astype(np.uint8), maps=False)
        made.append(replace(inspection(number), outcome=replace(outcome, anomaly_map=None)))
    return service.store.add(made)


@pytest.fixture
def watching(service, tmp_path):
    return lambda: drift.DriftWatch(service, tmp_path / "drift.json")


def test_alarms_become_metrics_and_a_restart_continues(service, loaded, photos, watching):
    good = [photo for photo in photos if "/good/" in photo]
    scored(loaded, good, service, 60)
    watch = watching()
    watch.step()
    found, monitor = watch.state()
    assert (found, monitor.count) == ([], 60)
    scored(loaded, good, service, 90, gain=0.8)
    again = watching()
    while again.step():
        pass
    found, monitor = again.state()
    assert monitor.count == 150
    assert "lighting or camera" in {each.cause for each in found}
    assert 'normweave_drift_alarm{cause="lighting or camera",subclass="cloth/' in service.metrics.text().decode()
    assert not again.step()
    third = watching()
    third.step()
    assert third.state()[1].count == 150
    assert {each.cause for each in third.state()[0]} == {each.cause for each in found}


def test_each_alarm_is_stored_once_and_the_webhook_of_the_line_is_sent_it(service, loaded, photos, watching, receiver):
    """Also if the server starts again meanwhile."""
    good = [photo for photo in photos if "/good/" in photo]
    deliveries = Deliveries(service, [receiver.output(deliver=("drift",), refusals=1)])
    deliveries.start()
    scored(loaded, good, service, 60)
    stored = scored(loaded, good, service, 90, gain=0.8)
    receiver.statuses = [503, 410]
    watch = watching()
    watch.listeners.add(deliveries.notify)
    while watch.step():
        pass
    alarms = [one.record for one in deliveries.store.after("drift", 0, limit=99)]
    lit = [one for one in alarms if one.cause == "lighting or camera"]
    assert len({one.subclass for one in lit}) == len(lit) > 0
    assert all(one.bundle_hash == loaded.bundle_hash for one in alarms)
    assert stored[0].id - 10 <= lit[0].since_inspection <= stored[-1].id
    assert set(lit[0].inspections) <= {one.id for one in stored}

    again = watching()
    again.step()
    assert len(deliveries.store.after("drift", 0, limit=99)) == len(alarms)

    until(lambda: deliveries.states()[0].behind == 0)
    (letter,) = deliveries.dead_letters("webhook", limit=9)  # the second attempt of the first alarm
    assert (letter.message["type"], letter.message["data"]["id"]) == ("drift.alarm", alarms[0].id)
    deliveries.send_again("webhook")
    until(lambda: len(receiver.received) == len(alarms))
    deliveries.stop()
    by_id = {body["data"]["id"]: body for _, body in receiver.received}  # the receiver verifies the signature
    assert [by_id[one.id]["data"]["cause"] for one in alarms] == [one.cause for one in alarms]
    assert by_id[alarms[0].id]["data"]["advice"] == alarms[0].advice


def test_a_roll_back_stores_no_alarm_again(service, loaded, photos, tmp_path):
    """The inspections of the bundle are tested from the first one on, without the state of that time."""
    good = [photo for photo in photos if "/good/" in photo]
    scored(loaded, good, service, 60)
    scored(loaded, good, service, 90, gain=0.8)
    store, stored = DeliveryStore(service.store.database, line=""), []
    for place in ("first.json", "after-a-roll-back.json"):
        watch = drift.DriftWatch(service, tmp_path / place)
        while watch.step():
            pass
        assert watch.state()[0]
        stored.append([one.record for one in store.after("drift", 0, limit=99)])
    assert stored[0] == stored[1] != []
    first = stored[0][0]
    assert not store.add_alarm(first, newest=first.time)
    assert store.add_alarm(first, newest=first.time + timedelta(seconds=1))  # of later inspections


@pytest.mark.parametrize(
    "text", ['{"bundle_hash": 3', '"count": Infinity', '"recent": [[1]]', '"windows": [["x", [[[], {}]]]]']
)
def test_a_damaged_state_begins_anew(service, loaded, photos, watching, tmp_path, text):
    watch, path = watching(), tmp_path / "drift.json"
    scored(loaded, photos, service, 3)
    watch.step()
    if text.startswith("{"):
        path.write_text(text)
    else:
        state = json.loads(path.read_text())
        state["monitor"] |= json.loads(f"{{{text}}}")
        path.write_text(json.dumps(state))
    watch = watching()
    watch.step()
    assert watch.state()[1].count == 3


def test_a_bundle_without_statistics_is_refused_in_words(service, loaded, watching):
    service.detectors.active = copy(loaded)
    service.detector.record = {name: value for name, value in loaded.record.items() if name != "drift"}
    watch = watching()
    assert not watch.step()
    assert watch.state()[1] is None
    assert "normweave calibrate" in watch.refusal


def test_the_thread_follows_what_is_stored(service, loaded, photos, watching):
    scored(loaded, photos, service, 2)
    watch = watching()
    watch.start()
    watch.stop()  # the first step comes before the end
    assert watch.state()[1].count == 2
    scored(loaded, photos, service, 1)
    watch.start()  # an application may start again
    watch.stop()
    assert watch.state()[1].count == 3


def test_a_new_leader_stores_the_alarms_that_the_one_before_may_not_have_stored(
    service, loaded, photos, tmp_path, monkeypatch
):
    good = [photo for photo in photos if "/good/" in photo]
    scored(loaded, good, service, 60)
    scored(loaded, good, service, 90, gain=0.8)
    leads, store = threading.Event(), DeliveryStore(service.store.database, line="")

    def alarms():
        return [item.record.cause for item in store.after("drift", 0, limit=99)]

    def follow(name):
        watch = drift.DriftWatch(service, tmp_path / name, leads=leads.is_set)
        watch.start()
        wait_for(lambda: watch.state()[0])
        watch.stop()
        return watch

    watch = follow("drift.json")
    assert alarms() == []
    leads.set()
    watch.start()
    watch.stop()
    assert "lighting or camera" in (found := alarms())

    leads.clear()
    late = follow("other.json")
    monkeypatch.setattr(drift, "HANDOVER_SECONDS", 0.0)
    leads.set()
    late.start()
    late.stop()
    assert alarms() == found  # the leader of that time has stored them


def test_the_thread_goes_on_when_the_state_cannot_be_saved(service, loaded, photos, watching, tmp_path, monkeypatch):
    """As on a full disk: the alarms of the next images would be missed until the server starts again."""
    monkeypatch.setattr(drift, "STEP_SECONDS", 0.01)
    (tmp_path / "drift.json").mkdir()  # nothing can be renamed to it
    scored(loaded, photos, service, 2)
    watch = watching()
    watch.start()
    until(lambda: watch.state()[1] is not None and watch.state()[1].count == 2)
    scored(loaded, photos, service, 2)
    until(lambda: watch.state()[1].count == 4)
    (tmp_path / "drift.json").rmdir()
    until((tmp_path / "drift.json").is_file)
    watch.stop()
    again = watching()
    again.step()
    assert again.state()[1].count == 4
