from normweave import history


def test_a_step_names_who_did_what_when_and_from_what(monkeypatch):
    monkeypatch.setattr("sys.argv", ["/opt/bin/normweave", "add-subclass", "a b.bundle"])
    monkeypatch.setattr("getpass.getuser", lambda: "ada")
    step = history.step("added", images=7, parent="abc", data_fingerprint="def", subclass="cloth/red")

    assert step | {"date": "", "software": ""} == {
        "action": "added",
        "date": "",
        "user": "ada",
        "command": "normweave add-subclass 'a b.bundle'",
        "software": "",
        "parent": "abc",
        "images": 7,
        "data_fingerprint": "def",
        "subclass": "cloth/red",
    }
    assert step["date"].endswith("+00:00")
    assert history.extended({}, step) == [step]
    assert history.extended({history.KEY: [{"action": "trained"}]}, step) == [{"action": "trained"}, step]


def test_the_command_of_another_program_and_an_unknown_user_are_not_stored(monkeypatch):
    def nobody():
        raise KeyError

    monkeypatch.setattr("sys.argv", ["line.py", "--password=x"])
    monkeypatch.setattr("getpass.getuser", nobody)
    step = history.step("trained", images=1, parent=None, data_fingerprint=None)

    assert step["command"] is None
    assert step["user"] is None
