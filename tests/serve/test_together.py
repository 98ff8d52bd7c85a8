"""Images of one request are given to the store all at once, when the last one is there."""

from normweave.serve.together import Together


def test_all_come_with_the_last_one():
    images = Together(3)
    assert [images.add(name) for name in "abc"] == [[], [], ["a", "b", "c"]]
    assert Together(1).add("a") == ["a"]
