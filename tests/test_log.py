"""What the daemon says: each thing once, for people or for programs, and no secret."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable, Iterator
from hashlib import sha256

import pytest

from keybroker.devgateway import DevGateway
from keybroker.log import LEVELS, Log
from keybroker.paths import JOURNAL
from tests.patched import daemon_with
from tests.resident import Resident, until

LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d (info|warning|error): .+")

Said = Callable[[], list[str]]


@pytest.fixture
def pipe() -> Iterator[tuple[int, Said]]:
    """Where a log writes to, and what reads the lines that came."""
    read, write = os.pipe()
    os.set_blocking(read, False)

    def said() -> list[str]:
        try:
            return os.read(read, 1 << 16).decode().splitlines()
        except BlockingIOError:
            return []

    yield write, said
    os.close(read)
    os.close(write)


# forms


@pytest.mark.parametrize("level", LEVELS)
def test_a_line_for_people_has_the_time_and_the_level(pipe: tuple[int, Said], level: str) -> None:
    """The local time, the level, the profile if it is about one."""
    log = Log(pipe[0], "text")
    log.say(level, "it is noon")
    log.say(level, "it is noon", "work")

    first, second = pipe[1]()

    assert LINE.fullmatch(first)
    assert first.endswith(f" {level}: it is noon")
    assert second.endswith(f" {level}: work: it is noon")


@pytest.mark.parametrize(("level", "number"), LEVELS.items())
def test_a_line_for_systemd_has_its_number(pipe: tuple[int, Said], level: str, number: int) -> None:
    """systemd takes the level from `<4>` and adds the time itself."""
    Log(pipe[0], "journal").say(level, "it is noon", "work")

    assert pipe[1]() == [f"<{number}>work: it is noon"]


def test_a_line_for_programs_is_json(pipe: tuple[int, Said]) -> None:
    """One object a line, with the time in UTC; a profile only if it is about one."""
    log = Log(pipe[0], "json")
    log.say("warning", 'a "quoted" word\nand a line', "work")
    log.say("info", "it is noon")

    first, second = (json.loads(line) for line in pipe[1]())

    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", first.pop("at"))
    assert first == {"level": "warning", "text": 'a "quoted" word\nand a line', "profile": "work"}
    assert set(second) == {"at", "level", "text"}


def test_a_log_that_nobody_reads_costs_nothing() -> None:
    """A closed pipe or a full disk is no reason to hand out no keys."""
    read, write = os.pipe()
    os.close(read)
    Log(write, "text").say("info", "it is noon")
    os.close(write)

    Log(write, "text").say("info", "it is noon")


# each thing once


def test_the_same_is_said_once(pipe: tuple[int, Said]) -> None:
    """Until it is over; then the next time counts as new."""
    log = Log(pipe[0], "journal")
    for _ in range(3):
        log.once("warning", "no answer", "work", about="trouble")
    log.over("works again", "work", about="trouble")
    log.over("works again", "work", about="trouble")
    log.once("warning", "no answer", "work", about="trouble")

    assert pipe[1]() == [
        "<4>work: no answer",
        "<6>work: works again",
        "<4>work: no answer",
    ]


def test_trouble_that_changes_its_words_is_said_once_in_each(pipe: tuple[int, Said]) -> None:
    """A weekend without a network fails now in one way, now in another: two lines, not hundreds."""
    log = Log(pipe[0], "journal")
    for _ in range(50):
        log.once("warning", "no answer", "work", about="trouble")
        log.once("warning", "no such host", "work", about="trouble")
    log.over("works again", "work", about="trouble")

    assert pipe[1]() == [
        "<4>work: no answer",
        "<4>work: no such host",
        "<6>work: works again",
    ]


def test_words_without_end_do_not_fill_the_memory(pipe: tuple[int, Said]) -> None:
    """Of words that are new each time, the last few are remembered."""
    log = Log(pipe[0], "journal")
    for number in range(1000):
        log.once("warning", f"no answer to request {number}", "work", about="trouble")

    assert len(pipe[1]()) == 1000
    log.once("warning", "no answer to request 999", "work", about="trouble")
    assert pipe[1]() == []
    assert sum(map(len, log._said.values())) < 20


def test_what_is_said_of_one_profile_is_not_said_of_another(pipe: tuple[int, Said]) -> None:
    """And the end of one trouble is not that of another."""
    log = Log(pipe[0], "journal")
    log.once("warning", "no answer", "work", about="trouble")
    log.once("warning", "no answer", "play", about="trouble")
    log.once("warning", "no answer", "work", about="the cache")
    log.over("works again", "work", about="trouble")

    assert pipe[1]() == [
        "<4>work: no answer",
        "<4>play: no answer",
        "<4>work: no answer",
        "<6>work: works again",
    ]


# the daemon's


@pytest.fixture
def gateway() -> Iterator[DevGateway]:
    with DevGateway() as server:
        yield server


# Failed calls are tried again at once, as often as calls may follow each other.
IMPATIENT = """
from datetime import timedelta
from keybroker import rotation
rotation.backoff = lambda *numbers, **more: timedelta()
"""


@pytest.fixture
def impatient(resident: Resident, gateway: DevGateway) -> Resident:
    """A daemon of one profile, not started, that tries again every second."""
    resident.environment["ADMIN"] = gateway.master_key
    resident.configure(
        f'[profiles.work]\nbase_url = "{gateway.url}"\n[profiles.work.source]\n'
        'type = "litellm"\nadmin = { env = "ADMIN" }\n'
    )
    return resident


def calls(resident: Resident) -> int:
    """Count the keys that were asked for."""
    journal = resident.state / JOURNAL
    return journal.read_bytes().count(b'"wanted"') if journal.exists() else 0


def test_an_offline_weekend_gives_one_line_and_its_end_another(
    impatient: Resident, gateway: DevGateway
) -> None:
    """However often it was tried; the key that came is named by its fingerprint."""
    gateway.close()
    impatient.start(command=daemon_with(IMPATIENT, impatient.state, impatient.socket))
    until(lambda: calls(impatient) >= 3)
    gateway.start()
    until(lambda: "works again" in impatient.said())
    key = impatient.key()

    said = [line.split(" ", 3)[2:] for line in impatient.said().splitlines()]

    assert [level for level, _ in said] == ["info:", "warning:", "info:", "info:"]
    assert said[0][1].endswith(f" listens at {impatient.socket}")
    assert said[1][1].startswith("work: litellm: ")
    assert {text for _, text in said[2:]} == {
        "work: works again",
        f"work: key {sha256(key.encode()).hexdigest()[:8]} is handed out",
    }


def test_an_outage_with_a_key_in_hand_is_said_once_too(
    impatient: Resident, gateway: DevGateway
) -> None:
    """A rotation that cannot be done is tried again and again, and told once."""
    impatient.start(command=daemon_with(IMPATIENT, impatient.state, impatient.socket))
    impatient.key()
    gateway.close()
    impatient.cli("rotate", "work")
    before = calls(impatient)
    until(lambda: calls(impatient) >= before + 2)

    assert len([line for line in impatient.said().splitlines() if " warning: " in line]) == 1


def test_every_line_is_an_object_if_that_is_wanted(
    impatient: Resident, gateway: DevGateway
) -> None:
    """From the first line to the last, the configuration's faults included."""
    impatient.start(form="json")
    impatient.key()
    good = impatient.file.read_text()
    impatient.file.write_text("rubbish")
    until(lambda: "stays in use" in impatient.said())
    impatient.file.write_text(good)
    until(lambda: "good again" in impatient.said())
    assert impatient.kill(signal.SIGTERM) == 0

    lines = [json.loads(line) for line in impatient.said().splitlines()]

    assert [line["level"] for line in lines] == ["info", "info", "error", "info", "info"]
    assert lines[-1]["text"] == "stopped"
    assert lines[1]["profile"] == "work"


def test_under_systemd_the_lines_have_its_levels(impatient: Resident) -> None:
    """It says where it reads our lines; the time is its own."""
    impatient.start(JOURNAL_STREAM="8:4711")
    impatient.key()

    assert all(line.startswith("<6>") for line in impatient.said().splitlines())


def test_a_configuration_that_cannot_be_read_ends_it_with_a_line(impatient: Resident) -> None:
    """At the start there is none before it that could stay in use: status 78."""
    impatient.file.write_text("rubbish")
    impatient.start(ready=False)
    assert impatient.process is not None

    assert impatient.process.wait(15) == 78
    [line] = impatient.said().splitlines()
    assert str(impatient.file) in line
    assert not impatient.socket.exists()


@pytest.mark.parametrize("form", ["text", "json"])
def test_no_secret_is_in_what_it_says(impatient: Resident, gateway: DevGateway, form: str) -> None:
    """Neither the admin key nor any that was minted, through an outage and a refusal."""
    impatient.start(form=form)
    keys = [impatient.key()]
    assert impatient.cli("rotate", "work")[0] == 0
    keys.append(impatient.key())
    gateway.close()
    impatient.cli("rotate", "work")
    gateway.start()
    impatient.cli("revoke", "work")
    impatient.kill(signal.SIGTERM)

    said = impatient.said()

    assert "stopped" in said
    assert [secret for secret in (*keys, gateway.master_key) if secret in said] == []
