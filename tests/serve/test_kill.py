"""Repeated kill -9 of a working server: every answered inspection is stored, with all its files."""

import dataclasses
import hashlib
import itertools
import json
import random
import sqlite3
import threading
import time
from pathlib import Path

import httpx2
import pytest

from counterparts import Receiver, until
from serving import Server

KILLS = 20
CLIENTS = 4


def send(server, photos, numbers, answered, stop):
    """Send images with unique bytes until the server is gone."""
    with server.client() as client:
        while not stop.is_set():
            number = next(numbers)
            content = photos[number % len(photos)] + number.to_bytes(8, "big")
            try:
                answer = client.post("/v1/inspect", files={"images": (f"{number}.png", content)})
            except httpx2.HTTPError:
                return
            if answer.status_code == 200:
                (one,) = answer.json()["inspections"]
                answered[one["id"]] = (
                    f"{number}.png",
                    hashlib.sha256(content).hexdigest(),
                    one["pred_score"],
                )


def stored(data):
    database = sqlite3.connect(f"file:{data}/store.sqlite?mode=ro", uri=True)
    try:
        rows = database.execute("SELECT id, name, image_hash, grids_hash, pred_score FROM inspections")
        return {row[0]: row[1:] for row in rows}
    finally:
        database.close()


@pytest.mark.slow
def test_no_answered_inspection_is_lost_in_twenty_kills(bundle, photos, tmp_path):
    contents = [Path(path).read_bytes() for path in photos]
    numbers, answered, draw = itertools.count(), {}, random.Random(0)
    data = tmp_path / "data"
    server = Server(bundle, data)
    for kill in range(KILLS):
        before = len(answered)
        stop = threading.Event()
        clients = [
            threading.Thread(target=send, args=(server, contents, numbers, answered, stop)) for _ in range(CLIENTS)
        ]
        for client in clients:
            client.start()
        end = time.monotonic() + 30
        while len(answered) == before and time.monotonic() < end:
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.5))
        server.kill()
        stop.set()
        for client in clients:
            client.join()
        assert len(answered) > before, f"kill {kill}: nothing was answered. {server.log()}"

        kept = stored(data)
        for id, (name, image, score) in answered.items():
            assert kept[id][0] == name
            assert kept[id][1] == image
            assert kept[id][3] == score
        for _, image, grids, _ in kept.values():
            for digest in (image, grids):
                content = (data / "files" / digest[:2] / digest).read_bytes()
                assert hashlib.sha256(content).hexdigest() == digest
        server.start()
    with server, server.client() as client:  # the server still works
        newest = client.get("/v1/inspections", params={"limit": 1}).json()["inspections"][0]
        assert newest["id"] == max(kept)
        assert client.get(newest["image_url"]).status_code == 200
        assert len(list((data / "files").glob("*/.partial*"))) == 0


@pytest.mark.slow
def test_every_answered_inspection_is_delivered_in_order_over_kills(bundle, photos, tmp_path):
    """And every verdict on a part, after its image. By a webhook whose counterpart is dead at the first kill."""
    receiver = Receiver(tmp_path)
    receiver.listen()
    receiver.proxy.stop()
    line = tmp_path / "line.yaml"
    config = dataclasses.asdict(receiver.output(deliver=("inspections", "parts")).config)
    line.write_text(json.dumps({"outputs": [config], "parts": {"views": 1}}))
    contents, answered = [Path(path).read_bytes() for path in photos], []
    server = Server(bundle, tmp_path / "data", "-c", line)
    for kill in range(3):
        with server.client() as client:
            for number in range(10):
                content = contents[number] + bytes([kill])
                part = {"part": f"{kill}-{number}"}
                answer = client.post("/v1/inspect", files={"images": ("part.png", content)}, data=part)
                answered += [one["id"] for one in answer.json()["inspections"]]
        server.kill()
        if kill == 0:
            receiver.proxy.start()
        server.start()
    until(lambda: answered[-1] in receiver.ids(), "the delivery of the last one")
    assert list(dict.fromkeys(receiver.ids())) == answered
    until(lambda: len(set(receiver.parts())) == len(answered), "the delivery of the last part")
    firsts = list(dict.fromkeys(receiver.parts()))
    assert [id for id, *_ in firsts] == sorted(id for id, *_ in firsts)
    assert {revision for *_, revision in firsts} == {1}
    order = [(message["type"], message["data"]["part_id"]) for _, message in receiver.received]
    for kill, number in ((0, 0), (2, 9)):
        part = f"{kill}-{number}"
        assert order.index(("inspection.stored", part)) < order.index(("part.closed", part))
    server.stop()
    receiver.close()
