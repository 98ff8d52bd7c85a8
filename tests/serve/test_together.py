"""Images of one request are given to the store all at once, when the last one is there."""

import gc
import weakref

from normweave.serve.together import Together


def test_all_come_with_the_last_one():
    images = Together(3)
    assert [images.add(name) for name in "abc"] == [[], [], ["a", "b", "c"]]
    assert Together(1).add("a") == ["a"]


class Image:
    def __init__(self):
        self.together = Together(1)


def test_nothing_is_kept_in_memory():
    """An image refers to what collects it, so that only the garbage collection would free both."""
    image = Image()
    ref = weakref.ref(image)
    gc.disable()
    image.together.add(image)
    del image
    freed = ref() is None
    gc.enable()
    assert freed
