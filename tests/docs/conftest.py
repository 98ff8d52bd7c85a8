import pytest

from serving import Server


@pytest.fixture(scope="session")
def served(bundle, tmp_path_factory):
    """Start the server of the how-tos; yield its address and its first two tokens as environment variables."""
    server = Server(bundle, tmp_path_factory.mktemp("line") / "inspections")
    yield {
        "NORMWEAVE_URL": server.url,
        "NORMWEAVE_TOKEN": server.tokens["operator"],
        "ENGINEER_TOKEN": server.tokens["engineer"],
    }
    server.stop()
