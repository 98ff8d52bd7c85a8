"""Drift of the inspections of a server."""

import json
from copy import copy
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from inspections import inspection, unreadable
from normweave.errors import DataError
from normweave.serve import DATABASE, drift
from normweave.serve.store import Store
from normweave.serve.webhook import Webhook
from receiver import Receiver


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


def test_each_alarm_is_sent_once_to_the_webhook(service, loaded, photos, tmp_path):
    """Also if the server starts again meanwhile, before or after the other one has taken it."""
    good = [photo for photo in photos if "/good/" in photo]
    scored(loaded, good, service, 60)
    stored = scored(loaded, good, service, 90, gain=0.8)

    def watching():
        webhook = Webhook("http://127.0.0.1:9")
        return drift.DriftWatch(service, tmp_path / "drift.json", webhook=webhook), webhook

    watch, webhook = watching()
    while watch.step():
        pass
    waiting = webhook.waiting
    lit = [event for event in waiting if event["cause"] == "lighting or camera"]
    assert len({event["subclass"] for event in lit}) == len(lit) > 0
    assert all(event["type"] == "drift.alarm" and event["bundle_hash"] == loaded.bundle_hash for event in waiting)
    assert stored[0].id - 10 <= lit[0]["since_inspection"] <= stored[-1].id
    assert set(lit[0]["inspections"]) <= {one.id for one in stored}

    again, webhook = watching()
    again.step()
    assert webhook.waiting == waiting

    state = json.loads((tmp_path / "drift.json").read_text())
    (tmp_path / "drift.json").write_text(json.dumps(state | {"undelivered": []}))
    third, webhook = watching()
    third.step()
    assert webhook.waiting == []


def test_the_thread_sends_what_waits(service, loaded, photos, tmp_path):
    scored(loaded, photos, service, 2)
    receiver, path = Receiver(), tmp_path / "drift.json"
    first = drift.DriftWatch(service, path)
    first.step()
    path.write_text(json.dumps(json.loads(path.read_text()) | {"undelivered": [{"cause": "focus or dirt"}]}))
    watch = drift.DriftWatch(service, path, webhook=Webhook(receiver.url))
    watch.start()
    watch.stop()
    receiver.close()
    assert receiver.got == [{"cause": "focus or dirt"}]
    assert json.loads(path.read_text())["undelivered"] == []


def test_a_damaged_state_begins_anew(service, loaded, photos, watching, tmp_path):
    (tmp_path / "drift.json").write_text('{"bundle_hash": 3')
    scored(loaded, photos, service, 3)
    watch = watching()
    watch.step()
    assert watch.state()[1].count == 3


def test_a_bundle_without_statistics_is_refused_in_words(service, loaded, watching):
    service.detector = copy(loaded)
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
