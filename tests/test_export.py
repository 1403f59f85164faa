"""Keys in files, for programs that run no helper: current while they are there, gone in time."""

from __future__ import annotations

import json
import os
import stat
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from keybroker import export
from keybroker.credential import Secret
from keybroker.devgateway import DevGateway
from keybroker.errors import CacheError
from keybroker.paths import KEYS, Disk
from tests.canaries import Canaries, Gateway
from tests.crash import resident as crash
from tests.resident import Resident, until
from tests.servers.faults import Faults, PauseResponse, Status

WHEN = ("before", "during", "after")
WHO = ("worker", "daemon", "both")


@pytest.fixture
def gateway() -> Iterator[DevGateway]:
    with DevGateway() as server:
        yield server


def profile(url: str, name: str = "work", settings: str = 'export = "file"') -> str:
    return (
        f'[profiles.{name}]\nbase_url = "{url}"\nhelper_ttl = "1s"\nhold = "2s"\n{settings}\n'
        f'[profiles.{name}.source]\ntype = "litellm"\nadmin = {{ env = "ADMIN" }}\n'
    )


@pytest.fixture
def running(resident: Resident, gateway: DevGateway) -> Resident:
    """A daemon with one profile whose key is kept in a file."""
    resident.environment["ADMIN"] = gateway.master_key
    resident.configure(profile(gateway.url))
    resident.start()
    until(lambda: file_of(resident).exists())
    return resident


def file_of(resident: Resident, name: str = "work") -> Path:
    return resident.socket.parent / KEYS / name


def held(file: Path) -> str:
    """Return the key in a file; empty where there is none."""
    with suppress(FileNotFoundError):
        return file.read_text()
    return ""


def is_alive(url: str, key: str) -> bool:
    """Ask the gateway with a key."""
    request = urllib.request.Request(f"{url}/v1/models", headers={"x-api-key": key})
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(request) as answer:
            return bool(answer.status == 200)
    except urllib.error.HTTPError as error:
        error.close()
        return False


class Reader:
    """Reads a file again and again, and tries what is in it: a dead key that stays is noted."""

    def __init__(self, file: Path, url: str) -> None:
        self.file, self.url = file, url
        self.keys: list[str] = []
        self.dead: list[str] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._read)

    def __enter__(self) -> Reader:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _read(self) -> None:
        while not self._over.wait(0.02):
            key = held(self.file)
            if key and key not in self.keys[-1:]:
                self.keys.append(key)
            if key and not is_alive(self.url, key) and held(self.file) == key:
                self.dead.append(Secret(key).fingerprint)


def test_the_file_holds_the_key_and_nothing_else(running: Resident) -> None:
    """It is readable for its owner alone, in a folder that only its owner enters."""
    file = file_of(running)

    assert held(file) == running.key("work")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    assert os.listdir(file.parent) == ["work"]


def test_status_lists_it(running: Resident) -> None:
    """Where it is stands in the text and in JSON; nothing of the key does."""
    status, text, _ = running.cli("status")
    found = json.loads(running.cli("status", "--json")[1])["profiles"][0]

    assert status == 0
    assert f"\n  exported     {file_of(running)}\n" in text
    assert found["exported"] == str(file_of(running))
    assert held(file_of(running)) not in text


def test_a_key_that_is_pasted_is_listed_and_in_no_file(
    resident: Resident, gateway: DevGateway
) -> None:
    """It is only noted."""
    resident.environment["ADMIN"] = gateway.master_key
    resident.configure(profile(gateway.url, settings='export = "paste"'))
    resident.start()
    resident.key("work")

    assert resident.row()["exported"] == "pasted by hand"
    assert not file_of(resident).parent.exists()


def test_it_is_replaced_before_its_key_is_revoked(running: Resident, gateway: DevGateway) -> None:
    """Through three rotations, whoever reads it has a key that the gateway takes."""
    file = file_of(running)
    with Reader(file, gateway.url) as reader:
        for count in range(1, 4):
            before = running.key("work")
            assert running.cli("rotate", "work")[0] == 0
            until(lambda before=before: not is_alive(gateway.url, before))
            until(lambda count=count: len(reader.keys) > count)

    assert len(reader.keys) == 4
    assert reader.dead == []
    assert held(file) == running.key("work")


def test_a_revoked_key_is_out_of_the_file_before_the_gateway_is_asked(
    resident: Resident, gateway: DevGateway
) -> None:
    """While the revocation is on the wire, nobody reads the key any more."""
    with Faults(gateway.url) as faults:
        resident.environment["ADMIN"] = gateway.master_key
        resident.configure(profile(faults.url))
        resident.start()
        file = file_of(resident)
        until(file.exists)
        pause = PauseResponse(at_most=20.0)
        faults.next(pause, path="/key/delete")
        revoking = threading.Thread(target=resident.cli, args=("revoke", "work"))
        revoking.start()
        assert pause.reached.wait(20.0)
        there = file.exists()
        pause.release.set()
        revoking.join()

        assert not there
        assert not file.exists()
        assert is_alive(gateway.url, resident.key("work"))  # who asks has a new one made
        until(lambda: held(file) == resident.key("work"))


@pytest.mark.parametrize("settings", ["", 'export = "paste"', None], ids=str)
def test_it_goes_when_it_is_not_wanted_any_more(
    running: Resident, gateway: DevGateway, settings: str | None
) -> None:
    """Switched off, or with its profile; who configures it again has it again."""
    text = "" if settings is None else profile(gateway.url, settings=settings)
    running.configure(text + profile(gateway.url, "other", ""))
    until(lambda: not file_of(running).exists())

    running.configure(profile(gateway.url))
    until(file_of(running).exists)
    until(lambda: held(file_of(running)) == running.key("work"))


@pytest.mark.parametrize("cache", ["file", "memory"])
def test_a_daemon_makes_it_anew(running: Resident, gateway: DevGateway, cache: str) -> None:
    """What was there of others, or was left half written, is gone; so is a key that was lost."""
    running.configure(profile(gateway.url) + f'[cache]\nkey = "{cache}"\n')
    until(lambda: "configuration read" in running.said() or cache == "file")
    running.stop()
    file = file_of(running)
    file.unlink()
    for name in ("gone", ".work.123"):
        (file.parent / name).write_text("sk-of-somebody")
    running.start()

    until(file.exists)
    until(lambda: held(file) == running.key("work"))
    assert os.listdir(file.parent) == ["work"]


def test_one_that_somebody_removes_is_made_anew(running: Resident) -> None:
    """As is its folder."""
    file = file_of(running)
    file.rename(running.home.path / "elsewhere")
    until(file.exists)
    file.parent.rename(running.home.path / "folder")
    until(file.exists)

    assert held(file) == running.key("work")


def test_a_disk_that_does_not_have_it_costs_no_key(running: Resident) -> None:
    """It is said, the key is handed out, and a reload tries again at once."""
    file = file_of(running)
    until(lambda: in_the_way(file))
    assert running.cli("rotate", "work")[0] == 0
    until(lambda: running.row()["trouble"])

    assert running.row()["trouble"] == f"export: {file}: cannot be written (Is a directory)"
    assert running.key("work")
    file.rename(running.home.path / "elsewhere")
    assert running.cli("reload")[0] == 0
    until(file.exists)
    until(lambda: running.row()["trouble"] is None)
    assert held(file) == running.key("work")


def in_the_way(file: Path) -> bool:
    """Put a folder where a file is, unless the file was made anew meanwhile."""
    with suppress(FileNotFoundError):
        file.unlink()
    with suppress(FileExistsError):
        (file / "in the way").mkdir(parents=True)
        return True
    return False


def test_without_a_daemon_a_command_keeps_it(resident: Resident, gateway: DevGateway) -> None:
    """`get --no-start` writes it, `revoke` removes it."""
    resident.environment["ADMIN"] = gateway.master_key
    resident.configure(profile(gateway.url))
    status, key, _ = resident.cli("get", "--no-start", "work")

    assert (status, held(file_of(resident))) == (0, key.removesuffix("\n"))
    assert resident.cli("revoke", "work")[0] == 0
    assert not file_of(resident).exists()


def test_what_is_followed_is_in_a_file_too(resident: Resident, gateway: DevGateway) -> None:
    """The key is the one that its owner keeps; a new one of theirs is in the file at once."""
    keys = [gateway_key(gateway), gateway_key(gateway)]
    kept = resident.home.path / "kept"
    kept.touch(0o600)
    kept.write_text(keys[0])
    resident.configure(
        f'[profiles.work]\nbase_url = "{gateway.url}"\nexport = "file"\n'
        f'[profiles.work.source]\ntype = "static"\nkey = {{ file = "{kept}" }}\n'
    )
    resident.start()
    until(lambda: held(file_of(resident)) == keys[0])
    kept.write_text(keys[1])

    until(lambda: held(file_of(resident)) == keys[1])


def gateway_key(gateway: DevGateway) -> str:
    request = urllib.request.Request(
        f"{gateway.url}/key/generate",
        b"{}",
        {"authorization": f"Bearer {gateway.master_key}", "content-type": "application/json"},
    )
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(request) as answer:
        return str(json.loads(answer.read())["key"])


@pytest.mark.parametrize("who", WHO)
@pytest.mark.parametrize("when", WHEN)
def test_whoever_dies_of_it_the_file_is_right(gateway: DevGateway, when: str, who: str) -> None:
    """
    A rotation during which worker, daemon or both are killed at the writing of the file.

    Meanwhile the key in the file is always one that the gateway takes; in the end it is the one
    that is handed out, and nothing half written is left.
    """
    home = crash.Resident(gateway.url, gateway.master_key, reads=False)
    config = home.home / ".config/keybroker/config.toml"
    config.write_text(config.read_text().replace('hold = "2s"', 'hold = "2s"\nexport = "file"'))
    file = home.socket.parent / KEYS / "work"
    with home:
        until(file.exists, 30)
        first = held(file)
        with Reader(file, gateway.url) as reader:
            home.plan(crash.plan("export", when, who))
            asked = home.say("rotate")
            until(lambda: home.died() == 1, 30)
            asked.join()
            until(lambda: held(file) not in ("", first), 30)
            until(lambda: not is_alive(gateway.url, first), 30)
        until(lambda: (key := home.ask()) is not None and held(file) == key, 30)

        assert reader.dead == []
        assert os.listdir(file.parent) == ["work"]


def test_the_key_is_in_its_file_and_in_no_other(resident: Resident) -> None:
    """Nor in what the daemon and commands say, through a rotation and a crash of the daemon."""
    canaries = Canaries()
    with Gateway(canaries) as gateway:
        resident.environment["ADMIN"] = gateway.master_key
        resident.configure(profile(gateway.url))
        resident.start()
        file = file_of(resident)
        until(file.exists)
        first = held(file)
        said = "".join((*resident.cli("rotate", "work")[1:], *resident.cli("status")[1:]))
        until(lambda: held(file) not in ("", first))
        resident.kill()
        resident.start()
        until(lambda: held(file) == resident.key("work"))

        assert len(gateway.minted) >= 2
        assert canaries.below(resident.home.path, {file: "minted"}) == []
        assert canaries.seen_in(said) == []


def test_a_key_that_cannot_be_read_just_now_stays(tmp_path: Path) -> None:
    """By its fingerprint; any other is removed."""
    file = tmp_path / "run" / KEYS / "work"
    secret = Secret("sk-one")
    assert export.keep(file, secret, "", Disk()) is True
    assert export.keep(file, None, secret.fingerprint, Disk()) is False
    assert held(file) == "sk-one"
    assert export.keep(file, None, Secret("sk-two").fingerprint, Disk()) is False
    assert not file.exists()


def test_a_folder_of_others_is_not_written_into(tmp_path: Path) -> None:
    """Who else may enter it could read the key."""
    (tmp_path / "run").mkdir(mode=0o755)
    (tmp_path / "run").chmod(0o755)

    with pytest.raises(CacheError, match="others can enter it"):
        export.keep(tmp_path / "run" / KEYS / "work", Secret("sk-one"), "", Disk())


def test_a_link_in_its_place_is_not_followed(tmp_path: Path) -> None:
    """What it leads to stays as it is."""
    folder = tmp_path / "run" / KEYS
    folder.mkdir(parents=True, mode=0o700)
    (tmp_path / "run").chmod(0o700)
    other = tmp_path / "other"
    other.write_text("theirs")
    (folder / "work").symlink_to(other)
    export.keep(folder / "work", Secret("sk-one"), "", Disk())

    assert (other.read_text(), held(folder / "work")) == ("theirs", "sk-one")
    assert not (folder / "work").is_symlink()


def test_a_key_that_ends_with_no_other_to_follow_is_removed(
    resident: Resident, gateway: DevGateway
) -> None:
    """The gateway makes no more keys: the file goes when the key ends, not later."""
    with Faults(gateway.url) as faults:
        resident.environment["ADMIN"] = gateway.master_key
        resident.configure(profile(faults.url).replace("admin =", 'lifetime = "6s"\nadmin ='))
        resident.start()
        file = file_of(resident)
        until(file.exists)
        faults.next(Status(503, {}, b""), times=None, path="/key/generate")
        key = held(file)
        ends = time.monotonic() + 8
        until(lambda: not file.exists(), 20)

    assert time.monotonic() < ends
    until(lambda: not is_alive(gateway.url, key), 3)  # by our clock it ended a moment earlier
