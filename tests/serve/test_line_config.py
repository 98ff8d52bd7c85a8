"""line.yaml is read by the rules of the settings: strict types, and one error that names all mistakes."""

import types
from pathlib import Path
from typing import Literal

import pytest

from normweave.errors import ConfigError, MissingError
from normweave.outcome.parts import PartRule
from normweave.serve import line_config
from normweave.validation import PositiveInt, checked, fields_of


@checked
class Config(line_config.EntryConfig):
    type: Literal["bell"]
    port: PositiveInt = 502


@pytest.fixture
def bell(monkeypatch):
    """A type of outputs that no library is needed for."""
    monkeypatch.setattr(line_config, "types", lambda section: ["bell"])
    monkeypatch.setattr(line_config, "load", lambda section, type: types.SimpleNamespace(Config=Config))


@pytest.fixture
def read(tmp_path):
    def read(text):
        path = tmp_path / "line.yaml"
        path.write_text(text)
        return line_config.read(path)

    return read


def test_entries_are_read_in_their_order(bell, read):
    line = read("name: Press 5\noutputs:\n- {type: bell, name: b, port: 1}\n- {type: bell, name: a}\nsources:\n")
    assert (line.name, line.sources) == ("Press 5", ())
    assert line.outputs == (Config(type="bell", name="b", port=1), Config(type="bell", name="a"))


def test_one_error_names_all_mistakes(bell, read):
    with pytest.raises(ConfigError) as caught:
        read(
            "output: []\nname: 5\nparts: 0\noutputs:\n"
            "- {type: bell, name: a, port: '502'}\n"
            "- {type: bell, name: 'a b'}\n"
            "- {type: bell, name: c, prot: 1}\n"
            "- {type: bel, name: d}\n"
            "- {name: e}\n"
            "- bell\n"
            "sources: bell\n"
        )
    lines = str(caught.value).splitlines()
    assert len(lines) == 11, caught.value
    for words in (
        "Unknown key 'output'. Did you mean 'outputs'?",
        "name must be text, got 5",
        "parts must hold `key: value` lines, got 0",
        "outputs[0].port must be a valid integer, got '502'",
        "outputs[1].name",
        "Unknown setting 'outputs[2].prot'. Did you mean 'outputs[2].port'?",
        "Unknown outputs[3].type 'bel'. Did you mean 'bell'?",
        "outputs[4] must hold `key: value` lines, also type (bell)",
        "outputs[5] must hold",
        "sources must be a list, got 'bell'",
    ):
        assert any(words in line for line in lines), (words, lines)
    assert "docs/reference/line.md" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "outputs:\n- {type: bell, name: a}\nsources:\n- {type: bell, name: a}",
            "unique among sources and outputs, got a",
        ),
        ("outputs: []\noutputs: []", "duplicate key: outputs"),
        ("outputs:\n- {type: bell, name: a, name: b}", "duplicate key: name"),
        ("- outputs", "with the keys name, parts, view_bundles, sources, outputs"),
        ("outputs: [", "is not YAML"),
        (f"name: {'a' * 61}", "name must have at most 60 printable characters, got 'aaa"),
    ],
)
def test_what_is_no_line_is_refused(bell, read, text, words):
    with pytest.raises(ConfigError) as caught:
        read(text)
    assert words in str(caught.value)


def test_a_missing_library_is_named():
    with pytest.raises(MissingError, match=r'pip install "normweave\[line\]"'):
        line_config.load("outputs", "bell")


def test_a_secret_comes_from_a_variable_or_a_file(monkeypatch, tmp_path):
    monkeypatch.setenv("BROKER", "from the variable")
    (tmp_path / "password").write_text("from the file\n")
    assert line_config.secret("password", env="BROKER", file="") == "from the variable"
    assert line_config.secret("password", env="", file=str(tmp_path / "password")) == "from the file"
    assert line_config.secret("password", env="", file="") is None


@pytest.mark.parametrize(
    ("env", "file", "words"),
    [
        ("BROKER", "", "variable BROKER, named by password_env, is not set"),
        ("", "missing", "missing, named by password_file, cannot be read"),
        ("", "empty", "empty, named by password_file, is not set or empty"),
        ("BROKER", "empty", "Keep one of them"),
    ],
)
def test_a_secret_that_is_not_there_is_named(monkeypatch, tmp_path, env, file, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("BROKER", raising=False)
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(ConfigError) as caught:
        line_config.secret("password", env=env, file=file)
    assert words in str(caught.value)


def test_the_rule_of_parts_is_read_and_its_mistakes_are_named(read):
    assert read("parts: {part: '^(.+)_', views: [front, back], seconds: 2}").parts == PartRule(
        part="^(.+)_", views=("front", "back"), seconds=2.0
    )
    assert read("parts: {views: 4}").parts.views == 4
    assert read("name: a").parts == PartRule()
    for wrong, words in (
        ("views: 0", r"parts\.views must be at least 1"),
        ("part: a", "no group"),
        ("part: (", "no regular expression"),
    ):
        with pytest.raises(ConfigError, match=words):
            read(f"parts: {{{wrong}}}")
    with pytest.raises(ConfigError, match=r"parts\.view"):
        read("parts: {view: 4}")
    with pytest.raises(ConfigError, match="different names, got"):
        read("parts: {views: [a, a]}")


def test_mistakes_of_several_settings_are_named_beside_those_of_one(read):
    """As far as the settings that do not fit are right themselves: the others may be meant in a way that fits."""
    with pytest.raises(ConfigError) as caught:
        read(
            "parts: {views: 0, part: '('}\n"
            "view_bundles: {back: 5}\n"
            "sources:\n"
            "- {type: http, name: a, url: 'http://a', poll_seconds: x,"
            " trigger: {type: modbus, host: h, bit: 3, port: 0}}\n"
            "- {type: http, name: b, url: 'http://a', trigger: {type: modbus, host: h, bit: x}}\n"
            "outputs:\n"
            "- {type: modbus, name: a, role: server, host: h, port: 0, acknowledge_seconds: 20}\n"
            "- {type: modbus, name: c, role: server, host: h, acknowledge_seconds: x, max_age_seconds: 1}\n"
        )
    _, *lines = str(caught.value).splitlines()
    words = (
        "parts.views must be at least 1",
        "parts.part: The pattern '(' is no regular expression",
        "view_bundles must hold `view: folder of a bundle` lines, got 'back': 5",
        "sources[0].poll_seconds must be a valid number",
        "sources[0].trigger.port must be greater than or equal to 1",
        "sources[0].trigger.bit has no effect with signal coil",
        "sources[1].trigger.bit must be a valid integer",
        "outputs[0].port must be greater than or equal to 1",
        "outputs[0].acknowledge_seconds must be at most max_age_seconds",
        "outputs[1].acknowledge_seconds must be a valid number",
        "name must be unique among sources and outputs, got a more than once",
    )
    assert [word for word in words if not any(word in line for line in lines)] == [], caught.value
    assert len(lines) == len(words), caught.value


def test_views_that_a_machine_needs_are_missing_only_if_they_are_not_wrong(read):
    output = "outputs:\n- {type: modbus, name: a, role: server, host: h, deliver: [parts], port: 0}\n"
    with pytest.raises(ConfigError, match=r"parts\.views must name or number the expected views") as caught:
        read(output)
    assert "port must be" in str(caught.value)
    with pytest.raises(ConfigError) as caught:
        read(f"parts: {{views: x}}\n{output}")
    assert "must name or number" not in str(caught.value)


def test_bundles_of_views_are_read_and_are_of_expected_views(read):
    assert read("view_bundles: {back: bundles/back}").view_bundles == {"back": Path("bundles/back")}
    with pytest.raises(
        ConfigError, match=r"view_bundles must hold `view: folder of a bundle` lines, got 'back.bundle'"
    ):
        read("view_bundles: back.bundle")
    with pytest.raises(ConfigError, match=r"Unknown view of view_bundles 'bakc'. Did you mean 'back'\?.*parts.views"):
        read("parts: {views: [front, back]}\nview_bundles: {bakc: b}")
    with pytest.raises(ConfigError, match=r"names of views without white space around them, got ' back '"):
        read("parts: {views: 2}\nview_bundles: {' back ': b}")


@pytest.mark.parametrize("section", line_config.SECTIONS)
def test_every_setting_is_documented(section):
    text = (Path(__file__).parents[2] / "docs" / "reference" / "line.md").read_text("utf-8")
    for type in line_config.types(section):
        names = fields_of(line_config.load(section, type).Config)
        assert [name for name in names if f"`{name}`" not in text] == []


def test_a_type_of_a_plugin_is_known_and_replaces_none_of_normweave(monkeypatch):
    from normweave import plugins

    module = types.SimpleNamespace(Config=object, Output=object)
    offered = [plugins.Plugin("outputs", name, "other", "1.0", module, None) for name in ("gong", "mqtt")]
    offered.append(plugins.Plugin("outputs", "torn", "other", "1.0", types.SimpleNamespace(Config=object), None))
    monkeypatch.setattr(plugins, "found", lambda group: offered)
    assert "gong" in line_config.types("outputs")
    assert "torn" not in line_config.types("outputs")
    assert "gong" not in line_config.types("sources")  # it has no frames
    assert line_config.load("outputs", "gong") is module
    assert line_config.load("outputs", "mqtt") is not module
