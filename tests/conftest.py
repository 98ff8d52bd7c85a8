"""What every test may lean on."""

import os
import shutil
import sys
from pathlib import Path

import hypothesis
import pytest

from builders import bundle, cloth, detector, fusion_bundle, photos  # noqa: F401 - fixtures

hypothesis.settings.register_profile("no deadline", deadline=None)  # a loaded machine is no failure
hypothesis.settings.load_profile("no deadline")

THREADS = os.environ.get("OMP_NUM_THREADS")


@pytest.fixture(autouse=True)
def own_threads():
    """A test may change the number of threads of this process; the tests after it have that of the test run."""
    yield
    os.environ.pop("OMP_NUM_THREADS", None)
    if THREADS is not None:
        os.environ["OMP_NUM_THREADS"] = THREADS
    number = int(THREADS or os.cpu_count() or 1)
    if (torch := sys.modules.get("torch")) and torch.get_num_threads() != number:
        torch.set_num_threads(number)


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The real images: NORMWEAVE_DATA, or ../shared/data beside the checkout."""
    root = Path(os.environ.get("NORMWEAVE_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not (root / "magnetic-tiles").is_dir():
        pytest.skip(f"real images not found at {root}: set NORMWEAVE_DATA to the folder that holds magnetic-tiles")
    return root


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory) -> Path:
    """A store in SQLite without rows. A copy is opened in a seventh of the time that its migrations take."""
    from normweave.serve.store import Store  # its libraries are slow to import

    path = tmp_path_factory.mktemp("empty") / "store.sqlite"
    Store.open(path).close()
    return path


@pytest.fixture
def station(empty_store, tmp_path):
    """What deliveries need of an inspection service, with a store of its own."""
    from counterparts import Station  # its libraries are slow to import

    made = Station(f"sqlite:///{shutil.copy(empty_store, tmp_path)}")
    yield made
    made.store.close()


@pytest.fixture
def begin(station):
    """Function that starts deliveries, which the test or the fixture stops."""
    started = []

    def begin(output):
        started.append(station.begin(output))
        return started[-1]

    yield begin
    for deliveries in started:
        deliveries.stop()
