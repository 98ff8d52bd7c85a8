"""Every source module has a test module of its name, or a contract that names it in its docstring."""

import ast
from pathlib import Path

TESTS = Path(__file__).parent
SOURCE = TESTS.parent / "src" / "normweave"
SKIPPED = {"__init__", "__main__"}


def modules():
    """Yield the path of every module below the package."""
    for path in sorted(SOURCE.rglob("*.py")):
        module = path.relative_to(SOURCE)
        if path.stem not in SKIPPED and not {"migrations", "templates"} & set(module.parts):
            yield module


def contracts():
    """Return the docstrings of the contract tests."""
    found = [ast.get_docstring(ast.parse(path.read_text())) for path in TESTS.glob("contracts/test_*.py")]
    return "\n".join(text for text in found if text)


def test_every_module_has_a_test_of_its_name_or_a_contract():
    named = contracts()
    missing = []
    for module in modules():
        test = f"test_{module.stem}.py"
        places = [TESTS / module.parent / test]
        if module.parts[:2] == ("serve", "pages"):
            places.append(TESTS / "browser" / test)
        names = [
            ".".join(("normweave", *parts)) for parts in (module.with_suffix("").parts, module.parent.parts)
        ]
        if not any(place.exists() for place in places) and not any(f"`{name}`" in named for name in names):
            missing.append(str(module))
    assert not missing, f"No test module and no contract of {missing}"
