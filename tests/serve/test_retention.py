"""Retention of a service."""

import asyncio
import time
from pathlib import Path

from inspections import inspect_files
from normweave.serve.retention import Retention


def test_old_inspections_are_removed_with_their_files(start, photos):
    service = start(keep_days=1)
    old, young = inspect_files(service, *photos[:2])
    with service.store.database.writing() as connection:  # as if it were two days old
        connection.exec_driver_sql(
            f"UPDATE inspections SET received_at = received_at - 2 * 86400 * 1000000 WHERE id = {old.id}"
        )
    Retention(service).apply()
    assert service.store.inspection(old.id) is None
    assert service.store.inspection(young.id) is not None
    assert set(service.files.all_hashes()) == {young.image.image_hash, young.image.grids_hash}


def test_beyond_the_size_limit_images_are_removed_and_inspections_remain(start, photos):
    service = start(keep_gib=1e-9)
    kept = inspect_files(service, *photos[:3])
    Retention(service).apply()
    assert list(service.files.all_hashes()) == []
    assert [service.store.inspection(one.id).image for one in kept] == [None] * 3


def test_a_file_with_a_newer_reference_is_not_removed(start, photos):
    service = start(keep_days=1)
    _, again = inspect_files(service, photos[0], photos[0])
    with service.store.database.writing() as connection:
        connection.exec_driver_sql(
            "UPDATE inspections SET received_at = received_at - 2 * 86400 * 1000000 WHERE id = 1"
        )
    Retention(service).apply()
    assert asyncio.run(service.read_image(again.image)) == Path(photos[0]).read_bytes()


def test_the_start_removes_what_a_killed_server_left(service, photos):
    (kept,) = inspect_files(service, photos[0])
    orphan = service.files.put(b"written before the kill, without a record")
    retention = Retention(service)
    retention.start()
    end = time.monotonic() + 10
    while orphan in service.files.all_hashes() and time.monotonic() < end:
        time.sleep(0.01)
    retention.stop()
    assert set(service.files.all_hashes()) == {kept.image.image_hash, kept.image.grids_hash}
