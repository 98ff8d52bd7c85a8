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
    named = "parts: {views: [front, back]}\n"
    assert read(f"{named}view_bundles: {{back: bundles/back}}").view_bundles == {"back": Path("bundles/back")}
    with pytest.raises(
        ConfigError, match=r"view_bundles must hold `view: folder of a bundle` lines, got 'back.bundle'"
    ):
        read("view_bundles: back.bundle")
    with pytest.raises(ConfigError, match=r"Unknown view of view_bundles 'bakc'. Did you mean 'back'\?.*parts.views"):
        read("parts: {views: [front, back]}\nview_bundles: {bakc: b}")
    with pytest.raises(ConfigError, match=r"view_bundles: the name of a view has no white space.*got ' back'"):
        read(f"{named}view_bundles: {{' back': b}}")
    with pytest.raises(ConfigError, match=r"parts\.views: the name of a view has no white space.*got 'back '"):
        read("parts: {views: ['back ']}")


@pytest.mark.parametrize(("parts", "got"), [("parts: {views: 2}\n", "2"), ("", "none")])
def test_bundles_of_views_need_their_names(read, parts, got):
    with pytest.raises(ConfigError, match=rf"view_bundles needs the names of all views in parts\.views, got {got}: "):
        read(f"{parts}view_bundles: {{bakc: b}}")


LOGIN = "has no effect without username. Give username too, or leave "


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        (
            "outputs: [{type: mqtt, name: a, host: h, username: u, password_env: A, password_file: b}]",
            ["outputs[0].password_env and password_file are both given, got 'A' and 'b'. Keep one of them"],
        ),
        (
            "outputs: [{type: mqtt, name: a, host: h, password_env: A}]",
            [f"outputs[0].password_env {LOGIN}password_env out"],
        ),
        (
            "sources: [{type: mqtt, name: a, broker: {host: h, topic: t, password_file: b}}]",
            [f"sources[0].broker.password_file {LOGIN}password_file out"],
        ),
        (
            "sources: [{type: http, name: a, url: 'http://a', password_env: A}]",
            [f"sources[0].password_env {LOGIN}password_env out"],
        ),
        (
            "sources: [{type: camera, name: a, device: /dev/video0, transport: udp, username: u}]",
            [
                "sources[0].transport has no effect with device, which is a USB camera. Leave transport out",
                "sources[0].username has no effect with device, which is a USB camera. Leave username out",
            ],
        ),
        (
            "sources: [{type: camera, name: a, url: 'http://a', transport: udp, size: 1x1}]",
            [
                "sources[0].size has no effect with url: a stream has its own size. Leave size out",
                "sources[0].transport has no effect with a url that is not rtsp. Leave transport out",
            ],
        ),
        (
            "outputs: [{type: opcua, name: a, host: h, username: u, password_env: A, security: none, certificate: c}]",
            ["outputs[0].certificate has no effect with security none. Leave certificate out"],
        ),
        (
            "outputs: [{type: mqtt, name: a, host: h, first_wait_seconds: 100}]",
            ["outputs[0].first_wait_seconds must be at most longest_wait_seconds, got 100 and 60"],
        ),
        (
            "outputs: [{type: webhook, name: a, url: 'http://a', secret_env: A, secret_file: b}]",
            ["outputs[0].secret_env and secret_file are both given, got 'A' and 'b'. Keep one of them"],
        ),
        (
            "outputs: [{type: webhook, name: a, url: 'http://a'}]",
            ["outputs[0].secret_env or secret_file must be given: messages are signed"],
        ),
    ],
)
def test_settings_that_have_no_effect_or_contradict_each_other_are_refused(read, entry, words):
    with pytest.raises(ConfigError) as caught:
        read(entry)
    lines = str(caught.value).splitlines()
    assert len(lines) == (len(words) if len(words) == 1 else len(words) + 1), caught.value
    assert [word for word in words if not any(word in line for line in lines)] == [], caught.value


def test_a_wrong_or_missing_setting_hides_no_other_mistake_and_is_listed_once(read):
    with pytest.raises(ConfigError) as caught:
        read(
            "outputs:\n"
            "- {type: modbus, name: 'a b', acknowledge_seconds: 20}\n"
            "- {type: webhook, secret_env: A, secret_file: b, refusals: x}\n"
            "- {type: modbus, name: 'a b', host: h, role: x, deliver: [parts]}\n"
        )
    _, *lines = str(caught.value).splitlines()
    words = (
        "outputs[0].name must have 1 to 60 letters (a to z), digits, '.', '_' and '-', and begin with a letter or "
        "digit, got 'a b'",
        "outputs[0].role must be given: it has no default",
        "outputs[0].host must be given: it has no default",
        "outputs[0].acknowledge_seconds must be at most max_age_seconds, got 20 and 10",
        "outputs[2].name must have",
        "outputs[2].role must be 'client' or 'server', got 'x'",
        "outputs[2].deliver has parts, so parts.views must name or number the expected views",
        "name must be unique",
        "outputs[1].name must be given: it has no default",
        "outputs[1].url must be given: it has no default",
        "outputs[1].refusals must be a valid integer, got 'x'",
        "outputs[1].secret_env and secret_file are both given",
    )
    assert [word for word in words if not any(word in line for line in lines)] == [], caught.value
    assert len(lines) == len(words), caught.value


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("parts: {views: [1, 2]}", "parts.views must be an integer or a list of text, got [1, 2]"),
        ("outputs: [{type: mqtt, name: a, host: ''}]", "outputs[0].host must have at least 1 character, got ''"),
        (
            "sources: [{type: http, name: a, url: 'http://a', trigger: {}}]",
            "sources[0].trigger must have type, which is one of frame, seconds, still, message, modbus, got {}",
        ),
        (
            "sources: [{type: camera, name: a, device: video0}]",
            "sources[0].device must be a device like /dev/video0, got 'video0'",
        ),
        (
            "sources: [{type: camera, name: a, device: /dev/video0, size: big}]",
            "sources[0].size must be WIDTHxHEIGHT like 1280x720, got 'big'",
        ),
        (
            "sources: [{type: genicam, name: a, producer: p, features: {Gain: [1]}}]",
            "sources[0].features.Gain must be true or false, an integer, a number or text, got [1]",
        ),
    ],
)
def test_errors_have_no_words_of_pydantic(read, entry, words):
    if "genicam" in entry:
        pytest.importorskip("harvesters")
    with pytest.raises(ConfigError) as caught:
        read(entry)
    assert str(caught.value).partition(": ")[2] == words


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
