"""
What every store of published keys promises: at AWS, in a Vault, and in the world of the tests.

What others read is asked past the code under test.
"""

from __future__ import annotations

import json
import os
import secrets
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from keybroker import sources
from keybroker.credential import Credential, Lease, Secret
from keybroker.errors import (
    KeybrokerError,
    SourceDenied,
    SourceError,
    SourceInvalid,
    SourceUnavailable,
)
from keybroker.journal import read_time
from keybroker.sources import Store
from keybroker.sources.aws.store import token_of
from keybroker.sources.held import Held
from keybroker.sources.vault.store import LABEL
from tests.contracts import check_silent, entry
from tests.scripted import Answer, Script
from tests.servers.aws import REGION, Aws, Keys, allow
from tests.servers.awsfaults import Front, refusal
from tests.servers.faults import CommitThenDrop, DropBeforeCommit, Faults
from tests.servers.vault import OpenBao
from tests.servers.vaultapi import Kv
from tests.world import Shelf, ShelfStore, Time

pytestmark = pytest.mark.servers

RACERS = 4
ACTIONS = ("DescribeSecret", "GetSecretValue", "PutSecretValue", "UpdateSecretVersionStage")


def label() -> str:
    return f"kb-0a1b2c3d-work-{secrets.token_hex(13)}"


def credential(lives: timedelta | None = timedelta(hours=2)) -> Credential:
    """Mint a key that no gateway knows."""
    now = datetime.now(UTC)
    ends = None if lives is None else now + lives
    key = f"sk-canary-{secrets.token_hex(16)}"
    return Credential(Secret(key), Lease("id", "litellm", now, ends, revocable=True))


def problem(kind: type[KeybrokerError], call: Callable[[], object]) -> KeybrokerError:
    """Return the error of a call: of this class, and without a key in it."""
    with pytest.raises(KeybrokerError) as caught:
        call()
    check_silent(caught.value, "canary")
    assert type(caught.value) is kind, caught.value.message
    return caught.value


def publish(store: Store, made: Credential, name: str = "") -> str:
    """Publish a key, as a worker does; return its label."""
    name = name or label()
    base = store.standing()
    store.stage(name, made)
    assert store.promote(name, made, base)
    return name


class Place(ABC):
    """One secret that others read, and those who write it."""

    beside = True  # a key can be put there before it is read
    empty = ""  # what stands where nothing is

    def __init__(self) -> None:
        self.opened: list[Store] = []

    @abstractmethod
    def make(self) -> Store:
        """Open it, as a process of its own."""

    def open(self) -> Store:
        self.opened.append(self.make())
        return self.opened[-1]

    def close(self) -> None:
        for store in self.opened:
            store.close()

    @abstractmethod
    def read(self) -> str | None:
        """Return the key that others read, asked past the code under test."""

    @abstractmethod
    def lose(self, *, committed: bool) -> None:
        """Have no answer come to the next call that makes a key the one that is read."""


class StoreContract:
    """What the broker relies on."""

    @pytest.fixture
    def store(self, place: Place) -> Store:
        return place.open()

    def test_a_key_that_is_published_is_read(self, place: Place, store: Store) -> None:
        """The first one where nothing was, and the next in its place."""
        first, second = credential(), credential()
        assert store.standing() == place.empty
        publish(store, first)
        assert place.read() == first.secret.reveal()

        publish(store, second)

        assert place.read() == second.secret.reveal()
        assert store.standing() != place.empty

    def test_a_key_that_is_staged_is_not_read(self, place: Place, store: Store) -> None:
        """Staging changes nothing for readers, and can be done again."""
        first, second, name = credential(), credential(), label()
        publish(store, first)
        base = store.standing()

        store.stage(name, second)
        place.open().stage(name, second)

        assert place.read() == first.secret.reveal()
        assert store.standing() == base

    def test_what_is_staged_is_found_by_another_process(self, place: Place, store: Store) -> None:
        """By its label alone; a store that has nothing beside what is read has it once it is."""
        first, second, name = credential(), credential(), label()
        publish(store, first)
        base = store.standing()
        assert store.recover(name) is None
        store.stage(name, second)
        assert place.open().recover(name) == (second.secret if place.beside else None)

        assert place.open().promote(name, second, base)

        assert place.open().recover(name) == second.secret

    def test_what_is_done_twice_is_done_once(self, place: Place, store: Store) -> None:
        first, second = credential(), credential()
        publish(store, first)
        base = store.standing()
        name = publish(store, second)
        standing = store.standing()

        assert place.open().promote(name, second, base)

        assert store.standing() == standing
        assert place.read() == second.secret.reveal()

    def test_who_was_not_the_first_changes_nothing(self, place: Place, store: Store) -> None:
        """Another host published meanwhile: its key stays."""
        ours, theirs, name = credential(), credential(), label()
        publish(store, credential())
        base = store.standing()
        store.stage(name, ours)
        publish(place.open(), theirs)
        standing = store.standing()

        assert not store.promote(name, ours, base)

        assert store.standing() == standing
        assert place.read() == theirs.secret.reveal()

    def test_who_was_overtaken_since_is_told_so(self, place: Place, store: Store) -> None:
        """It had published, and did not hear of it; then another did."""
        ours, theirs, name = credential(), credential(), label()
        publish(store, credential())
        base = store.standing()
        publish(store, ours, name)
        publish(place.open(), theirs)

        assert not store.promote(name, ours, base)
        assert place.read() == theirs.secret.reveal()

    @pytest.mark.parametrize("committed", [True, False])
    def test_what_was_not_heard_of_is_done_again(
        self, place: Place, store: Store, committed: bool
    ) -> None:
        """Whether it had been done or not, it is done after the next call."""
        first, second, name = credential(), credential(), label()
        publish(store, first)
        base = store.standing()
        store.stage(name, second)
        place.lose(committed=committed)

        problem(SourceUnavailable, lambda: store.promote(name, second, base))
        read = place.read()
        again = place.open().promote(name, second, base)

        assert read == (second if committed else first).secret.reveal()
        assert again
        assert place.read() == second.secret.reveal()

    def test_of_many_that_race_one_wins(self, place: Place, store: Store) -> None:
        """And each of them knows whether it did."""
        publish(store, credential())
        base = store.standing()
        racers = [(place.open(), label(), credential()) for _ in range(RACERS)]
        for one, name, made in racers:
            assert one.standing() == base
            one.stage(name, made)

        with ThreadPoolExecutor(RACERS) as pool:
            won = list(pool.map(lambda racer: racer[0].promote(racer[1], racer[2], base), racers))

        assert sorted(won) == [False] * (RACERS - 1) + [True]
        assert place.read() == racers[won.index(True)][2].secret.reveal()

    def test_of_many_that_are_first_of_all_one_wins(self, place: Place, store: Store) -> None:
        """The same where nothing was published before."""
        racers = [(place.open(), label(), credential()) for _ in range(RACERS)]
        for one, name, made in racers:
            assert one.standing() == place.empty
            one.stage(name, made)

        with ThreadPoolExecutor(RACERS) as pool:
            won = list(
                pool.map(lambda racer: racer[0].promote(racer[1], racer[2], place.empty), racers)
            )

        assert sorted(won) == [False] * (RACERS - 1) + [True]
        assert place.read() == racers[won.index(True)][2].secret.reveal()


class ShelfPlace(Place):
    """The one of the tests' own world."""

    def __init__(self, beside: bool) -> None:
        super().__init__()
        self.beside, self.empty = beside, ""
        self.shelf = Shelf(Time(), beside)

    def make(self) -> Store:
        return ShelfStore(self.shelf)

    def read(self) -> str | None:
        return self.shelf.text

    def lose(self, *, committed: bool) -> None:
        self.shelf.plan = ["drop" if committed else "down"]


class TestShelf(StoreContract):
    @pytest.fixture(params=[True, False])
    def place(self, request: pytest.FixtureRequest) -> Place:
        return ShelfPlace(request.param)


# Secrets Manager.


class AwsPlace(Place):
    """A secret without a value, and a user who may do what the docs say."""

    def __init__(self, aws: Aws, front: Front, keys: Keys, field: str | None) -> None:
        super().__init__()
        self.aws, self.front, self.keys, self.field = aws, front, keys, field
        self.name = f"llm/{secrets.token_hex(4)}"
        manager = aws.client("secretsmanager")
        made = manager.create_secret(Name=self.name, SecretString="none")
        manager.update_secret_version_stage(  # real ones begin so
            SecretId=self.name, VersionStage="AWSCURRENT", RemoveFromVersionId=made["VersionId"]
        )

    def make(self) -> Store:
        given: dict[str, Any] = {"to": "aws", "secret": self.name, "region": REGION}
        given |= {} if self.field is None else {"field": self.field}
        source = {"type": "litellm", "admin": {"env": "ADMIN"}}
        return sources.store(entry("http://127.0.0.1:9", source, publish=given), {}, Held())

    def read(self) -> str | None:
        text = self.aws.value(self.name)
        found: str = text if self.field is None else json.loads(text)[self.field.strip("/")]
        return found

    def lose(self, *, committed: bool) -> None:
        fault = CommitThenDrop() if committed else DropBeforeCommit()
        self.front.fault(fault, "UpdateSecretVersionStage")


def publisher(aws: Aws, *, but: str | None = None) -> Keys:
    """Make a user who may do all that publishing takes, but for one thing."""
    actions = [f"secretsmanager:{one}" for one in ACTIONS if one != but]
    return aws.user(f"publisher-{but or 'all'}", allow(actions))


@pytest.fixture
def as_user(
    aws: Aws, aws_front: Front, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[[Keys], None]:
    """Have workers be somebody, and nobody else whom this machine knows."""

    def be(keys: Keys) -> None:
        for name in [*os.environ]:
            if name.startswith("AWS_"):
                monkeypatch.delenv(name)
        monkeypatch.setenv("HOME", str(tmp_path))
        for name, value in aws.environment(keys, aws_front.url).items():
            monkeypatch.setenv(name, value)

    return be


At = Callable[..., AwsPlace]


@pytest.fixture
def at(aws: Aws, aws_front: Front, as_user: Callable[[Keys], None]) -> At:
    def make(field: str | None = "/key", *, but: str | None = None) -> AwsPlace:
        keys = publisher(aws, but=but)
        as_user(keys)
        return AwsPlace(aws, aws_front, keys, field)

    return make


class TestAws(StoreContract):
    """A field of a JSON, and a secret that is the key."""

    @pytest.fixture(params=["/key", None])
    def place(self, request: pytest.FixtureRequest, at: At) -> Place:
        return at(request.param)


def test_aws_keeps_the_other_fields(at: At) -> None:
    """And says when the new key ends; what was said of the old one is gone."""
    place, made = at("/deep/key"), credential()
    place.aws.put(place.name, '{"url": "https://…", "deep": {"key": "sk-old", "ttl": 60, "a": 1}}')

    publish(place.open(), made)

    found = json.loads(place.aws.value(place.name))
    ends = read_time(found["deep"].pop("expires_at"))
    assert found == {"url": "https://…", "deep": {"key": made.secret.reveal(), "a": 1}}
    assert ends == made.lease.expires_at
    publish(place.open(), credential(None))
    assert "expires_at" not in json.loads(place.aws.value(place.name))["deep"]


def test_aws_has_its_own_labels_as_after_a_rotation_of_its_own(at: At) -> None:
    """AWSPREVIOUS is on the one before, AWSPENDING on none; the version's id is the label's."""
    place = at()
    old = place.aws.put(place.name, '{"key": "sk-old"}')

    name = publish(place.open(), credential())

    assert place.aws.labels(place.name) == {"AWSCURRENT": token_of(name), "AWSPREVIOUS": old}


def test_aws_takes_off_its_label_after_a_crash(at: At) -> None:
    """Whoever died between the two moves did not leave a rotation open."""
    place, made, name = at(), credential(), label()
    store, base = place.open(), place.aws.put(place.name, '{"key": "sk-old"}')
    store.stage(name, made)
    place.aws.move(place.name, token_of(name), base)

    assert store.promote(name, made, base)

    assert place.aws.labels(place.name) == {"AWSCURRENT": token_of(name), "AWSPREVIOUS": base}


def test_aws_has_another_s_rotation_that_was_interrupted(at: At) -> None:
    """Its AWSPENDING goes over to us; that version is not what we publish."""
    place, made = at(), credential()
    old = place.aws.put(place.name, '{"key": "sk-old"}')
    place.aws.put(place.name, '{"key": "sk-left"}', VersionStages=["AWSPENDING"])

    name = publish(place.open(), made)

    assert place.read() == made.secret.reveal()
    assert place.aws.labels(place.name) == {"AWSCURRENT": token_of(name), "AWSPREVIOUS": old}


def test_aws_may_have_the_version_with_other_fields(at: At) -> None:
    """Somebody changed one between two tries: it is not the first, and says so as it is moved."""
    place, made, name = at(), credential(), label()
    place.aws.put(place.name, '{"key": "sk-old", "note": 1}')
    store = place.open()
    base = store.standing()
    store.stage(name, made)
    place.aws.put(place.name, '{"key": "sk-old", "note": 2}')

    store.stage(name, made)

    assert not store.promote(name, made, base)
    assert json.loads(place.aws.value(place.name)) == {"key": "sk-old", "note": 2}


def test_aws_and_a_stage_that_was_not_heard_of(at: At) -> None:
    place, made, name = at(), credential(), label()
    store, base = place.open(), place.aws.put(place.name, '{"key": "sk-old"}')
    place.front.fault(CommitThenDrop(), "PutSecretValue")

    problem(SourceUnavailable, lambda: store.stage(name, made))
    store.stage(name, made)

    assert store.promote(name, made, base)
    assert place.read() == made.secret.reveal()


@pytest.mark.parametrize(
    ("value", "field", "words"),
    [
        ("sk-alone", "/key", "is no JSON, so it has no fields"),
        ("[1]", "/key", "has no place for /key"),
        ('{"deep": "text"}', "/deep/key", "has no place for /deep/key"),
    ],
)
def test_aws_has_no_place_for_it(at: At, value: str, field: str, words: str) -> None:
    """What somebody else wrote there is not overwritten."""
    place = at(field)
    place.aws.put(place.name, value)

    error = problem(SourceInvalid, lambda: place.open().stage(label(), credential()))

    assert error.message == f"aws: the default profile, {REGION}: {place.name}: {words}"
    assert place.aws.value(place.name) == value


def test_aws_has_no_such_secret(at: At) -> None:
    place = at()
    place.name = "llm/nobody"

    error = problem(SourceInvalid, place.open().standing)

    assert "llm/nobody: there is no such secret" in error.message
    assert "secretsmanager list-secrets" in str(error.hint)


def test_aws_is_about_to_delete_it(at: At) -> None:
    """Nothing is published there, and nothing of ours counts as lost."""
    place, made = at(), credential()
    store = place.open()
    name = publish(store, made)
    place.aws.client("secretsmanager").delete_secret(SecretId=place.name, RecoveryWindowInDays=7)

    calls = (lambda: store.recover(name), lambda: store.promote(name, made, "v"), store.standing)
    for call in calls:
        error = problem(SourceInvalid, call)
        assert "is marked for deletion" in error.message
        assert "restore-secret" in str(error.hint)


@pytest.mark.parametrize("action", ACTIONS)
def test_aws_forbids_one_of_four_actions(at: At, action: str) -> None:
    """Each statement of the policy is needed, and the error names the one that is missing."""
    place = at(but=action)
    place.aws.put(place.name, '{"key": "sk-old"}')

    error = problem(SourceDenied, lambda: publish(place.open(), credential()))

    assert f"may not {action}" in error.message
    assert error.hint == f"if its name and region are right, allow it secretsmanager:{action}"
    assert place.read() == "sk-old"


def test_aws_forbids_to_find_out_what_is_there(at: At) -> None:
    """A secret that is the key needs GetSecretValue for what was interrupted, and says so."""
    place, made = at(None, but="GetSecretValue"), credential()
    name = publish(place.open(), made)

    error = problem(SourceDenied, lambda: place.open().recover(name))

    assert "may not GetSecretValue" in error.message
    assert place.read() == made.secret.reveal()


def test_aws_answers_with_what_was_before(at: At) -> None:
    """A refusal that contradicts what is answered is not taken for another one's key."""
    place, made, name = at(), credential(), label()
    store, base = place.open(), place.aws.put(place.name, '{"key": "sk-old"}')
    store.stage(name, made)
    place.front.fault(refusal("InvalidParameterException"), "UpdateSecretVersionStage")

    error = problem(SourceUnavailable, lambda: store.promote(name, made, base))

    assert "answers with an older state" in error.message
    assert store.promote(name, made, base)


def test_aws_has_lost_the_version(at: At) -> None:
    """It was staged at another secret, by another configuration: it is not published here."""
    place = at()
    base = place.aws.put(place.name, '{"key": "sk-old"}')

    assert not place.open().promote(label(), credential(), base)
    assert place.read() == "sk-old"


# Vault.


class VaultPlace(Place):
    """A path of a KV 2 that nothing was written to, behind a wire."""

    beside, empty = False, ""

    def __init__(self, bao: OpenBao, kv: Kv, wire: Faults, allowed: list[str]) -> None:
        super().__init__()
        self.kv, self.wire, self.field = kv, wire, "key"
        self.name = f"llm-{secrets.token_hex(4)}"
        self.path = kv.path(self.name)
        policy = bao.policy(self.name, {self.path: allowed} if allowed else {})
        role_id, self.secret_id = bao.approle(self.name, [policy])
        self.auth = {"method": "approle", "role_id": role_id, "secret_id": {"env": "SECRET_ID"}}

    def make(self) -> Store:
        given = {"to": "vault", "path": self.path, "field": self.field}
        given |= {"address": self.wire.url, "auth": self.auth}
        source = {"type": "litellm", "admin": {"env": "ADMIN"}}
        profile = entry("http://127.0.0.1:9", source, publish=given)
        return sources.store(profile, {"SECRET_ID": self.secret_id}, Held())

    @property
    def data(self) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self.kv.api.do("GET", self.path)["data"]["data"]
        return found

    def read(self) -> str | None:
        found: str | None = self.data.get("key")
        return found

    def lose(self, *, committed: bool) -> None:
        fault = CommitThenDrop() if committed else DropBeforeCommit()
        methods = ("POST", "PUT")
        self.wire.next(fault, where=lambda one: one.method in methods and "/data/" in one.path)


@pytest.fixture(scope="module")
def kv(openbao: OpenBao) -> Kv:
    """A KV 2 of this module."""
    return openbao.kv()


In = Callable[..., VaultPlace]


@pytest.fixture
def in_vault(openbao: OpenBao, kv: Kv) -> Iterator[In]:
    with ExitStack() as stack:
        wire = stack.enter_context(Faults(openbao.url))

        def make(*allowed: str) -> VaultPlace:
            place = VaultPlace(openbao, kv, wire, [*(allowed or ("create", "read", "update"))])
            stack.callback(place.close)
            return place

        yield make


class TestVault(StoreContract):
    """A field of a KV 2."""

    @pytest.fixture
    def place(self, in_vault: In) -> Place:
        return in_vault()


def test_vault_keeps_the_other_fields(in_vault: In) -> None:
    """And says when the new key ends, and whose it is."""
    place, made = in_vault(), credential()
    place.kv.put(place.name, key="sk-old", url="https://…", ttl="60", expires_at="2001-01-01")

    name = publish(place.open(), made)

    found = dict(place.data)
    assert read_time(found.pop("expires_at")) == made.lease.expires_at
    assert found == {"key": made.secret.reveal(), "url": "https://…", LABEL: name}
    publish(place.open(), credential(None))
    assert place.data["expires_at"] == ""


def test_vault_has_a_version_that_was_deleted(in_vault: In) -> None:
    """The next one follows on it."""
    place, made = in_vault(), credential()
    place.kv.put(place.name, key="sk-old")
    place.kv.delete(place.name)
    store = place.open()
    assert store.standing() == "1"
    assert store.recover(label()) is None

    publish(store, made)

    assert place.read() == made.secret.reveal()


def test_vault_has_another_field_changed_meanwhile(in_vault: In) -> None:
    """Which counts as another's key: what was written then stays."""
    place, made = in_vault(), credential()
    place.kv.put(place.name, key="sk-old")
    store = place.open()
    base = store.standing()
    place.kv.put(place.name, key="sk-old", note="two")

    assert not store.promote(label(), made, base)
    assert place.data == {"key": "sk-old", "note": "two"}


@pytest.mark.parametrize("again", [False, True])
def test_vault_has_a_path_that_was_deleted_meanwhile(in_vault: In, again: bool) -> None:
    """With all its versions, perhaps begun anew: what was staged is no reason to wait for ever."""
    place, made = in_vault(), credential()
    for _ in range(3):
        publish(place.open(), credential())
    store = place.open()
    base = store.standing()
    place.kv.forget(place.name)
    if again:
        place.kv.put(place.name, key="sk-other", note="two")

    assert store.promote(label(), made, base)
    assert place.read() == made.secret.reveal()
    assert not again or place.data["note"] == "two"


@pytest.mark.parametrize(
    ("allowed", "there", "capability"),
    [
        (["create", "update"], True, "read"),
        (["create", "read"], True, "update"),
        (["read", "update"], False, "create"),
    ],
)
def test_vault_forbids_one_of_three(
    in_vault: In, allowed: list[str], there: bool, capability: str
) -> None:
    """The error names the path and what has to be allowed there."""
    place = in_vault(*allowed)
    if there:
        place.kv.put(place.name, key="sk-old")

    error = problem(SourceDenied, lambda: publish(place.open(), credential()))

    assert place.path in error.message
    assert capability in f"{error.message} {error.hint}"
    assert not there or place.read() == "sk-old"


def test_vault_has_nothing_mounted_there(in_vault: In, openbao: OpenBao) -> None:
    place = in_vault()
    place.path = f"nobody-{place.name}/data/llm"
    policy = openbao.policy(place.name, {place.path: ["read", "create", "update"]})
    assert policy == place.name

    error = problem(SourceInvalid, place.open().standing)

    assert "nothing is mounted there" in error.message


@pytest.mark.parametrize("seen", [3, 4])
def test_vault_s_standby_that_is_behind_is_not_believed(seen: int) -> None:
    """One that does not know yet what was written is no proof of another's key."""
    with Script() as script:
        versions = {"data": {"data": {"key": "sk-old"}, "metadata": {"version": seen}}}
        script.says("secret/data/llm", Answer(200, versions))
        text = "check-and-set parameter did not match the current version"
        refuses = Answer(400, {"errors": [text]})
        script.says("secret/data/llm", Answer(200, versions), refuses, Answer(200, versions))
        given = {"to": "vault", "path": "secret/data/llm", "address": script.url}
        given |= {"auth": {"method": "token", "token": {"env": "TOKEN"}}}
        source = {"type": "litellm", "admin": {"env": "ADMIN"}}
        profile = entry("http://127.0.0.1:9", source, publish=given)
        store = sources.store(profile, {"TOKEN": "hvs.one"}, Held())
        script.says("auth/token/lookup-self", Answer(200, {"data": {"ttl": 0, "num_uses": 0}}))

        with pytest.raises(SourceError) as caught:
            store.promote(label(), credential(), "4")

        store.close()
    assert type(caught.value) is SourceUnavailable
    assert "an older version was answered" in caught.value.message
