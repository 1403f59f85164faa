"""What measures measures: failures are counted, and a missed goal is shown as missed."""

from __future__ import annotations

import re
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread

import pytest

from benchmarks import beside, measure
from benchmarks.measure import BEGIN, END, Figure, UnmeasurableError
from benchmarks.programs import ask_often, compile_parts, output, seconds, seconds_at_once
from benchmarks.stage import ask, floor, furnish, has_key, listens, resident, unshared, wake_ups
from keybroker.config import load
from keybroker.connect.line import helper_command

KEY = "sk-right"
ENVIRONMENT = {"PATH": "/usr/bin:/bin"}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The C parts, compiled without a warning."""
    folder = tmp_path_factory.mktemp("parts")
    compile_parts(folder)
    return folder


@contextmanager
def answering(path: Path, answers: list[bytes]) -> Iterator[None]:
    """A server that gives each client the next of some answers, and then stops listening."""

    def serve() -> None:
        with listener:
            for answer in answers:
                client, _ = listener.accept()
                with client:
                    client.recv(1024)
                    client.sendall(answer)

    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen(64)
    thread = Thread(target=serve)
    thread.start()
    try:
        yield
    finally:
        thread.join()


def test_the_load_counts_what_a_server_gets_wrong(parts: Path, tmp_path: Path) -> None:
    """Another key, half a key, more than a key, an error, nothing; and then nobody."""
    wrong = [b"ok sk-wrong\n", b"ok sk-right", b"ok sk-right\nok", b"error 69 keybroker: x\n", b""]
    with answering(tmp_path / "s", [b"ok sk-right\n", *wrong] * 10):
        found = ask_often(parts, tmp_path / "s", KEY, clients=4, requests=60)
    assert (found.answered, found.failed) == (10, 50)
    assert 0 < found.p50 <= found.p99 <= found.longest < 60
    nobody = ask_often(parts, tmp_path / "s", KEY, clients=4, requests=60)
    assert (nobody.answered, nobody.failed) == (0, 60)


def test_the_server_in_c_answers_all(parts: Path, tmp_path: Path) -> None:
    """A hundred clients at a time, with and without a rest between two requests."""
    home = furnish(tmp_path / "h")
    with floor(parts, home) as server:
        for pause in (0, 1):
            found = ask_often(
                parts, server.socket, home.key, clients=100, requests=1000, pause_ms=pause
            )
            assert (found.answered, found.failed) == (1000, 0)
            assert 0 < found.p50 <= found.p99 <= found.longest
        assert ask(server.socket, "work") == f"ok {home.key}\n"
        assert has_key(server.socket, "work")
        assert listens(server.socket)
        assert 0 < unshared(server.pid) < resident(server.pid) < 100
        assert wake_ups(server.pid) > 0
    assert not listens(server.socket)
    assert ask(server.socket, "work") == ""


def test_one_of_many_that_fails_is_no_figure(parts: Path, tmp_path: Path) -> None:
    """Nor is one that prints something else than the others."""
    printed = tmp_path / "printed"
    taken = seconds_at_once(parts, 20, ("echo", "x"), ENVIRONMENT, printed)
    assert 0 < taken < 60
    assert printed.read_text() == "x\n" * 20
    for command in (("false",), ("sh", "-c", "echo $$"), ("true",)):
        with pytest.raises(UnmeasurableError):
            seconds_at_once(parts, 20, command, ENVIRONMENT, printed)


def test_a_program_that_fails_is_no_figure() -> None:
    """Neither is one that is not there."""
    assert 0 < seconds(("true",), ENVIRONMENT) < 60
    for command in (("false",), ("/nonexistent",)):
        with pytest.raises(UnmeasurableError):
            seconds(command, ENVIRONMENT)
        with pytest.raises(UnmeasurableError):
            output(command, ENVIRONMENT)


def test_without_a_compiler_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The name of the packages is in the message."""
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UnmeasurableError, match="apt-get install gcc libc6-dev"):
        compile_parts(tmp_path)


def test_each_call_is_made_once_a_round() -> None:
    """In both orders, and once before that is not counted."""
    made: list[str] = []
    rounds = measure.interleaved(
        {name: lambda name=name: made.append(name) or float(len(made)) for name in "ab"}, 50
    )
    assert len(rounds) == 50
    assert len(made) == 102
    assert {"".join(made[i : i + 2]) for i in range(2, 102, 2)} == {"ab", "ba"}
    assert all(abs(one["a"] - one["b"]) == 1 for one in rounds)


def test_a_ratio_is_of_one_round() -> None:
    """A machine that is ten times slower in one round changes nothing."""
    rounds = [{"a": 3.0, "b": 2.0}, {"a": 30.0, "b": 20.0}, {"a": 9.0, "b": 2.0}]
    assert measure.ratio(rounds, "a", "b") == 1.5
    assert measure.ratio(rounds, "b", "a", lambda x: x * x) == pytest.approx(4 / 9)


@pytest.mark.parametrize(
    ("value", "goal", "met"),
    [
        (1.05, {"at_most": 1.05}, True),
        (1.06, {"at_most": 1.05}, False),
        (9.0, {"at_least": 9.0}, True),
        (8.99, {"at_least": 9.0}, False),
        (1.0, {}, None),
    ],
)
def test_a_goal_is_met_or_missed(value: float, goal: dict[str, float], met: bool | None) -> None:
    """And the table says so."""
    figure = Figure("a", "something", value, 10, **goal)
    assert figure.met is met
    line = measure.table([figure]).splitlines()[-1]
    assert ("**missed**" in line) is (met is False)
    assert ("| met |" in line) is (met is True)


def test_figures_that_were_not_taken_again_stay(tmp_path: Path) -> None:
    """In the file, which is read as it was written."""
    path = tmp_path / "results.json"
    first, second = Figure("a", "one", 1.5, 10, at_most=2), Figure("b", "two", 7, 1, unit="MiB")
    again = Figure("a", "one", 2.5, 10, at_most=2)
    assert measure.save([first, second], {"cores": "2"}, path) == [first, second]
    assert measure.save([again], {"cores": "2"}, path) == [again, second]
    assert measure.load(path) == [again, second]
    assert measure.save([first], {"cores": "2"}, path, all_of_them=True) == [first]
    assert measure.load(path) == [first]
    assert measure.load(tmp_path / "none") == []


def test_the_page_has_a_place_for_the_table() -> None:
    """What is around it stays; a page without the marks is refused."""
    page = (Path(__file__).parent.parent / "README.md").read_text("utf-8")
    new = measure.insert(page, "| table |")
    assert f"{BEGIN}\n\n| table |\n\n{END}" in new
    outside = re.compile(f"{re.escape(BEGIN)}.*{re.escape(END)}", re.DOTALL)
    assert outside.sub("", new) == outside.sub("", page)
    assert measure.insert(new, "| table |") == new
    for broken in ("", BEGIN, END, f"{END}{BEGIN}"):
        with pytest.raises(UnmeasurableError):
            measure.insert(broken, "| table |")


@pytest.mark.parametrize("often", [False, True])
def test_the_configuration_is_one(tmp_path: Path, often: bool) -> None:
    """Of every kind of source, and its files are private."""
    url = "http://127.0.0.1:9"
    home = furnish(tmp_path / "h", url, "sk-x", minted=2, commands=1, static=1, often=often)
    found = load([home.path / "config.toml"])
    assert sorted(found.profiles) == sorted(home.profiles)
    assert len(home.key) == 100
    assert {(home.path / name).stat().st_mode & 0o777 for name in ("key", "admin")} == {0o600}
    assert home.helper[0] == sys.executable
    assert home.native in (None, (*helper_command(str(home.socket), "work"),))
    assert home.native != home.helper


@pytest.mark.servers
def test_a_daemon_and_an_agent_follow_the_same_secret(tmp_path: Path) -> None:
    """Both notice that it was rotated, and the server's log tells their requests apart."""
    names = ["work", "other"]
    with (
        beside.desk(names) as desk,
        beside.follower(tmp_path / "f", desk, names, "1s") as ours,
        beside.renderer(desk, names, "1s") as theirs,
    ):
        readers: dict[str, beside.Follower | beside.Renderer] = {"ours": ours, "theirs": theirs}
        before = {who: desk.requests(one.role) for who, one in readers.items()}
        first = dict(desk.kept)
        taken = beside.until_noticed(desk, {"work": 0.5, "other": 0.0}, readers)
        assert {who: len(found) for who, found in taken.items()} == {"ours": 2, "theirs": 2}
        assert all(0 <= one < beside.PATIENCE_SECONDS for found in taken.values() for one in found)
        for who, one in readers.items():
            assert [one.key(name) for name in names] == [desk.kept[name] for name in names]
            assert desk.requests(one.role) >= before[who] + 2
        assert set(first.values()).isdisjoint(desk.kept.values())
        assert desk.accepts(first["work"])
        desk.end(first["work"])
        assert not desk.accepts(first["work"])
        assert wake_ups(theirs.agent.pid) > 0
        assert output(ours.home.helper, ours.home.environment) == desk.kept["work"]


@pytest.mark.servers
def test_what_is_never_noticed_is_no_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader that reads too seldom ends the wait."""
    monkeypatch.setattr(beside, "PATIENCE_SECONDS", 2.0)
    with (
        beside.desk(["work"]) as desk,
        beside.follower(tmp_path / "f", desk, ["work"], "5m") as ours,
        pytest.raises(UnmeasurableError, match="never noticed"),
    ):
        beside.until_noticed(desk, {"work": 0.0}, {"ours": ours})
