"""The exception tree and the message for an unknown name."""

from urllib.error import URLError

from normweave import errors


def test_the_docstring_draws_every_exception() -> None:
    drawn = {line.strip("│├└─ ") for line in (errors.__doc__ or "").splitlines()}
    classes = {name for name, each in vars(errors).items() if isinstance(each, type)}
    assert {name for name in classes if name.endswith("Error")} <= drawn


def test_only_a_failed_check_has_exit_code_3() -> None:
    assert errors.CheckError.exit_code == 3
    assert errors.ConfigError.exit_code == errors.ImageError.exit_code == errors.BundleError.exit_code == 2


def test_an_unknown_name_is_reported_with_the_most_similar_and_all_known_names() -> None:
    error = errors.unknown("layout", "visaa", ["visa", "btad"], "Use --layout.")
    assert str(error) == "Unknown layout 'visaa'. Did you mean 'visa'? Known: btad, visa. Use --layout."
    assert str(errors.unknown("subclass", "x", [], "Omit it.")) == "Unknown subclass 'x'. Known: none. Omit it."
    assert str(errors.unknown("layout", "x", ["visa"], "Use --layout.")).startswith("Unknown layout 'x'. Known:")


def test_reasons_of_libraries_have_no_numbers_of_the_system() -> None:
    for error, text in (
        (ConnectionRefusedError(111, "Connection refused"), "Connection refused"),
        (URLError(ConnectionRefusedError(111, "Connection refused")), "Connection refused"),
        (RuntimeError("[Errno 111] Connection refused"), "Connection refused"),
        (ValueError("garbage."), "garbage"),
        (TimeoutError(), "TimeoutError"),
    ):
        assert errors.reason(error) == text
