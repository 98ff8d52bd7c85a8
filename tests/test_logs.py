"""Loggers and warnings are silent inside `quiet` and as before after it."""

import logging
import warnings

import pytest

from normweave.logs import quiet


def test_messages_below_an_error_and_warnings_are_suppressed(caplog):
    with quiet("normweave.test.a"):
        logging.getLogger("normweave.test.a").warning("hidden")
        logging.getLogger("normweave.test.a.child").warning("hidden too")
        logging.getLogger("normweave.test.a").error("an error")
        logging.getLogger("normweave.test.b").warning("of another logger")
        warnings.warn("hidden", UserWarning, stacklevel=1)  # pytest makes an error of a warning
    assert caplog.messages == ["an error", "of another logger"]


def test_levels_and_filters_come_back_after_an_exception():
    logger = logging.getLogger("normweave.test.c")
    logger.setLevel(logging.DEBUG)
    filters = list(warnings.filters)
    with pytest.raises(KeyError), quiet("normweave.test.c"):
        raise KeyError
    assert logger.level == logging.DEBUG
    assert warnings.filters == filters
