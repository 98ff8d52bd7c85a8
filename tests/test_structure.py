"""Every source module has a test module of its name or a contract that names it; tests use public names only."""

import ast
import importlib
from importlib.util import find_spec
from pathlib import Path

TESTS = Path(__file__).parent
SOURCE = TESTS.parent / "src" / "normweave"
SKIPPED = {"__init__", "__main__"}
OTHERS = ("open_clip.", "factory")
"""Libraries whose private names a test must replace."""


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
        names = [".".join(("normweave", *parts)) for parts in (module.with_suffix("").parts, module.parent.parts)]
        if not any(place.exists() for place in places) and not any(f"`{name}`" in named for name in names):
            missing.append(str(module))
    assert not missing, f"No test module and no contract of {missing}"


def private(name):
    return name.startswith("_") and not name.startswith("__") and name not in {"_asdict", "_replace", "_fields"}


def private_names(tree):
    """Yield the private names of the package that a test imports, reads or replaces."""
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("normweave"):
            imported |= {name.asname or name.name for name in node.names}
            yield from (name.name for name in node.names if private(name.name))
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=ast.Name(id=owner), attr=name) if owner in imported and private(name):
                yield f"{owner}.{name}"
            case ast.Call(func=ast.Attribute(attr="setattr"), args=[owner, ast.Constant(value=str(name)), *_]):
                if private(name) and not ast.unparse(owner).startswith(OTHERS):
                    yield name


def fixtures(path):
    """Yield each fixture of a test module and the names that it takes."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.FunctionDef) and any("fixture" in ast.unparse(each) for each in node.decorator_list):
            yield node.name, {argument.arg for argument in node.args.args}


def test_no_fixture_replaces_one_that_a_shared_fixture_takes():
    """Otherwise what the shared fixtures hold depends on which test asks first."""
    taken = set().union(*(names for _, names in fixtures(TESTS / "builders.py")))
    assert "cloth" in taken
    found = {
        str(path.relative_to(TESTS)): replaced
        for path in sorted(TESTS.rglob("*.py"))
        if path.name != "builders.py" and (replaced := taken & {name for name, _ in fixtures(path)})
    }
    assert not found


def test_benches_import_what_there_is():
    missing = []
    for path in sorted((TESTS.parent / "perf").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("normweave"):
                module = importlib.import_module(node.module)
                for name in (each.name for each in node.names):
                    submodule = find_spec(f"{node.module}.{name}") if hasattr(module, "__path__") else None
                    if not hasattr(module, name) and submodule is None:
                        missing.append(f"{path.name}: {node.module}.{name}")
    assert not missing


def test_tests_use_public_names_only():
    found = {
        str(path.relative_to(TESTS)): names
        for path in sorted(TESTS.rglob("*.py"))
        if (names := list(private_names(ast.parse(path.read_text("utf-8")))))
    }
    assert not found


def test_private_names_are_found():
    text = "from normweave import a, _b\na._c\nmonkeypatch.setattr(a, '_d', 1)\na.e._replace\nself._f\na.__doc__"
    assert sorted(private_names(ast.parse(text))) == ["_b", "_d", "a._c"]
