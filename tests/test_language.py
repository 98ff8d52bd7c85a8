"""The source uses the terms of the field, and no file is too long to read."""

import re
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src" / "normweave"
OWN_WORDS = re.compile(r"\b(kinds?|strangers?|kin|lessons?|likeness|says|said)\b", re.IGNORECASE)
MAX_OWN_WORDS = 20
"""Lines; `kind` is the discriminator of settings and a parameter of `inspect.Parameter.replace`."""
MAX_LINES = 600


def texts():
    found = {path.relative_to(SOURCE): path.read_text("utf-8") for path in sorted(SOURCE.rglob("*.py"))}
    assert len(found) > 100
    return found


def test_words_of_our_own_are_rare():
    lines = [
        f"{path}:{number}: {line.strip()}"
        for path, text in texts().items()
        for number, line in enumerate(text.splitlines(), start=1)
        if OWN_WORDS.search(line)
    ]
    assert len(lines) <= MAX_OWN_WORDS, "Use the terms of the field:\n" + "\n".join(lines)


def test_no_file_is_too_long():
    counts = {str(path): text.count("\n") for path, text in texts().items()}
    assert not {path: count for path, count in counts.items() if count > MAX_LINES}
