"""What docs/aws.md says is tried: its policies, configurations, template and messages."""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
import secrets
import subprocess
import tomllib
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import botocore.session
import pytest

from keybroker import aws as accounts
from keybroker import sources
from keybroker.config import Profile, parse
from keybroker.credential import Look
from keybroker.devgateway import DevGateway
from keybroker.document import Where
from keybroker.errors import SourceDenied
from keybroker.sources import Source
from keybroker.sources.aws.account import Account
from keybroker.sources.held import Held
from tests.resident import Home
from tests.servers.aws import REGION, Aws, Keys, allow
from tests.servers.awsfaults import Front
from tests.servers.sso import Sso
from tests.servers.vault import OpenBao
from tests.test_docs import ROOT, blocks

pytestmark = pytest.mark.servers

PAGE = ROOT / "docs" / "aws.md"
STEPS = ("createSecret", "setSecret", "testSecret", "finishSecret")
LABELS = (
    "kb-3f9a1c02-work-01m7ztpxppb5atdr6wvpqkza126",
    "kb-3f9a1c02-work-01m7ztpxppb5atdr6wvpqkza127",
)


def section(heading: str) -> str:
    """Return what stands under a heading, without what its subheadings are about."""
    found = re.search(rf"^#+ {re.escape(heading)}\n(.*?)(?=^#|\Z)", outside(), re.M | re.S)
    assert found, f"no heading {heading}"
    text = found[1]
    for n, block in enumerate(BLOCKS):
        text = text.replace(f"\x00{n}\x00", block)
    return text


BLOCKS: list[str] = re.findall(r"^```.*?^```$", PAGE.read_text(), re.M | re.S)


def outside() -> str:
    """Return the page with a mark for each of its blocks, in which # is no heading."""
    text = PAGE.read_text()
    for n, block in enumerate(BLOCKS):
        text = text.replace(block, f"\x00{n}\x00", 1)
    return text


def policies(heading: str) -> list[dict[str, Any]]:
    return [json.loads(text) for text in blocks(section(heading), "json")]


READER = policies("In two minutes")[0]
TOGETHER, PUBLISHER, KMS = policies("The least policy")
TEMPLATE = policies("AWS owns the schedule")[0]["Resources"]
[ROLE] = [one["PolicyDocument"] for one in TEMPLATE["Role"]["Properties"]["Policies"]]


class Right(NamedTuple):
    """One action of one statement of a policy."""

    statement: int
    action: str


def actions(statement: Mapping[str, Any]) -> list[str]:
    said = statement["Action"]
    return [said] if isinstance(said, str) else list(said)


def rights(policy: Mapping[str, Any]) -> list[Right]:
    return [
        Right(n, action)
        for n, statement in enumerate(policy["Statement"])
        for action in actions(statement)
    ]


def without(policy: Mapping[str, Any], right: Right | None) -> dict[str, Any]:
    """Take one right from a policy."""
    said = json.loads(json.dumps(policy))
    if right is not None:
        statement = said["Statement"][right.statement]
        statement["Action"] = [one for one in actions(statement) if one != right.action]
        if not statement["Action"]:
            del said["Statement"][right.statement]
    return dict(said)


def denied(right: Right) -> Any:
    """Expect the message that names what is missing."""
    call = right.action.removeprefix("secretsmanager:")
    return pytest.raises(SourceDenied, match=rf"arn:aws:[a-z]+::[0-9]+:.* may not {call}$")


class Place:
    """The page's account, region and secrets, as they are on the tests' server."""

    def __init__(self, aws: Aws, front: Front, gateway: DevGateway, folder: Path) -> None:
        self.aws, self.front, self.gateway, self.folder = aws, front, gateway, folder
        self.own = f"llm-{secrets.token_hex(4)}/"
        self.held = Held()

    def here(self, text: str) -> str:
        for theirs, ours in {
            "eu-central-1": REGION,
            "123456789012": self.aws.account,
            "llm/": self.own,
            "https://llm.example.com": self.gateway.url,
        }.items():
            text = text.replace(theirs, ours)
        return text

    def put(self, name: str, value: str) -> str:
        return self.aws.put(self.here(f"llm/{name}"), value)

    def value(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.aws.value(self.here(f"llm/{name}")))
        return found

    def user(self, policy: Mapping[str, Any]) -> None:
        """Be a user with a policy, by the profile that the page names."""
        said = json.loads(self.here(json.dumps(policy)))
        keys = self.aws.user(f"docs-{secrets.token_hex(4)}", said)
        (self.folder / "credentials").write_text(
            f"[work]\naws_access_key_id = {keys.access_key}\n"
            f"aws_secret_access_key = {keys.secret_key}\n"
        )
        self.held = Held()

    def profiles(self, heading: str) -> Mapping[str, Profile]:
        """Read the configuration under a heading."""
        [text] = blocks(section(heading), "toml")
        return parse(tomllib.loads(self.here(text)), Where({}, "docs/aws.md")).profiles

    def source(self, profile: Profile) -> Source:
        return sources.build(profile, os.environ, self.held)


@pytest.fixture(scope="module")
def gateway() -> Iterator[DevGateway]:
    with DevGateway() as server:
        yield server


@pytest.fixture
def place(
    aws: Aws,
    aws_front: Front,
    gateway: DevGateway,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Place:
    for name in [*os.environ]:
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_ENDPOINT_URL", aws_front.url)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    (tmp_path / "config").touch()
    return Place(aws, aws_front, gateway, tmp_path)


# Policies.


@pytest.mark.parametrize("missing", [None, *rights(READER)])
def test_the_policy_of_the_first_two_minutes(place: Place, missing: Right | None) -> None:
    """With it the key is read as it is configured there; without either action it is not."""
    place.put("key", '{"key": "sk-of-somebody"}')
    place.user(without(READER, missing))
    source = place.source(place.profiles("In two minutes")["work"])
    if missing is None:
        credential = source.issue("")
        assert credential.secret.reveal() == "sk-of-somebody"
        assert source.look(credential.lease) == credential.lease
        return
    with denied(missing):
        source.issue("")


@pytest.mark.parametrize("missing", [None, *rights(TOGETHER)])
def test_the_policy_to_read_several(place: Place, missing: Right | None) -> None:
    """One request reads both. Without that right each is read by itself, and nothing is said."""
    profile = place.profiles("In two minutes")["work"]
    assert profile.account is not None
    names = [place.here(f"llm/{n}") for n in range(2)]
    for name in names:
        place.aws.put(name, '{"key": "sk-of-somebody"}')
    place.user(without(TOGETHER, missing))
    place.front.forget()
    account = Account.of(profile.account, place.held)
    account.foresee(names)
    found = [account.foreseen(name) for name in names]
    if missing is None:
        assert [call.operation for call in place.front.calls] == ["BatchGetSecretValue"]
        assert None not in found
    if missing is not None and missing.action.endswith("BatchGetSecretValue"):
        assert found == [None, None]
        assert account.ask("GetSecretValue", names[0], VersionStage="AWSCURRENT").value
    if missing is not None and missing.action.endswith(":GetSecretValue"):
        with denied(missing):
            account.ask("GetSecretValue", names[0], VersionStage="AWSCURRENT")
    if missing is not None and missing.action.endswith(":DescribeSecret"):
        with denied(missing):
            account.ask("DescribeSecret", names[0])


@pytest.mark.parametrize("missing", [None, *rights(PUBLISHER)])
def test_the_policy_to_publish(place: Place, missing: Right | None) -> None:
    """With the admin key from there, a key is minted, staged, found again, promoted and ended."""
    place.put("admin", place.gateway.master_key)
    place.put("shared", '{"team": "eng"}')
    place.user(without(PUBLISHER, missing))
    profile = place.profiles("keybroker rotates it")["work"]

    def rotate() -> None:
        with closing(place.source(profile)) as source:
            credential = source.issue(LABELS[0])
            try:
                store = sources.store(profile, os.environ, place.held)
                base = store.standing()
                store.stage(LABELS[0], credential)
                assert "key" not in place.value("shared")
                assert store.recover(LABELS[0]) == credential.secret
                assert store.promote(LABELS[0], credential, base)
                assert not store.promote(LABELS[1], credential, base)
                value = place.value("shared")
                assert value["key"] == credential.secret.reveal()
                assert value["team"] == "eng"
                assert source.verify(credential.secret).look is Look.ALIVE
            finally:
                source.revoke(credential.lease)

    if missing is None:
        rotate()
        return
    with denied(missing):
        rotate()


def test_the_policy_for_vault(place: Place, openbao: OpenBao) -> None:
    """Publishing there needs three capabilities of one path; the other fields stay."""
    kv = openbao.kv()
    path = kv.path("llm")
    kv.put("llm", team="eng")
    name = f"docs-{secrets.token_hex(4)}"
    [rule] = [one for one in blocks(section("To Vault"), "") if "capabilities" in one]
    openbao.do("PUT", f"sys/policies/acl/{name}", {"policy": rule.replace(SHARED, path)})
    role_id, secret_id = openbao.approle(name, [name])
    (place.folder / "secret-id").write_text(secret_id)
    (place.folder / "secret-id").chmod(0o600)
    [text] = blocks(section("To Vault"), "toml")
    text = place.here(text.replace(SHARED, path)).replace("~/.config/keybroker", str(place.folder))
    text = text.replace("https://vault.example.com:8200", openbao.url)
    text = re.sub(r'role_id = ".*"', f'role_id = "{role_id}"', text)
    text = text.replace('keyring = "litellm-admin"', f'file = "{place.folder}/admin"')
    (place.folder / "admin").write_text(place.gateway.master_key)
    (place.folder / "admin").chmod(0o600)
    profile = parse(tomllib.loads(text), Where({}, "docs/aws.md")).profiles["work"]

    with closing(place.source(profile)) as source:
        credential = source.issue(LABELS[0])
        store = sources.store(profile, os.environ, place.held)
        base = store.standing()
        assert store.recover(LABELS[0]) is None
        assert store.promote(LABELS[0], credential, base)
        assert store.recover(LABELS[0]) == credential.secret
        source.revoke(credential.lease)
        store.close()
    data = openbao.do("GET", path)["data"]["data"]
    assert (data["team"], data["keybroker_label"]) == ("eng", LABELS[0])
    assert data["key"] == credential.secret.reveal()


SHARED = "secret/data/llm/shared"


def test_every_policy_names_actions_of_one_service() -> None:
    """Also those that no server here enforces: KMS's, and another account's."""
    statements = [KMS, *policies("A secret of another account")]
    for one in [READER, TOGETHER, PUBLISHER, ROLE, *statements]:
        for statement in one.get("Statement", [one]):
            assert statement["Effect"] == "Allow"
            assert all(re.fullmatch(r"(secretsmanager|kms):\w+", a) for a in actions(statement))
            assert "Resource" in statement
    assert "kms:Decrypt" in actions(KMS)


# The function.


def resolved(value: Any, known: Mapping[str, str]) -> Any:
    """Fill in what the parameters of a stack are."""
    if isinstance(value, dict) and set(value) == {"Ref"}:
        return known[value["Ref"]]
    if isinstance(value, dict):
        return {name: resolved(one, known) for name, one in value.items()}
    return [resolved(one, known) for one in value] if isinstance(value, list) else value


class Stack:
    """The function of the template, with the role and the variables that it has there."""

    def __init__(self, place: Place, patched: pytest.MonkeyPatch, missing: Right | None) -> None:
        self.place = place
        for name, value in {"admin": place.gateway.master_key, "shared": "{}"}.items():
            place.put(name, value)
        self.secret = place.aws.arn(place.here("llm/shared"))
        known = {"Secret": self.secret, "Admin": place.aws.arn(place.here("llm/admin"))}
        policy = resolved(without(ROLE, missing), known)
        role = place.aws.role(f"docs-{secrets.token_hex(4)}", policy)
        for name, value in self.lambdas_own(place.aws.session(role)).items():
            patched.setenv(name, value)
        function = TEMPLATE["Function"]["Properties"]
        for name, value in function["Environment"]["Variables"].items():
            patched.setenv(name, value.replace("/var/task", str(place.folder)))
        [config] = blocks(section("AWS owns the schedule"), "toml")
        (place.folder / "config.toml").write_text(place.here(config))
        module, _, name = function["Handler"].rpartition(".")
        self.handler = getattr(importlib.import_module(module), name)

    def lambdas_own(self, keys: Keys) -> dict[str, str]:
        """Return what AWS itself sets in a function."""
        return {
            "AWS_ACCESS_KEY_ID": keys.access_key,
            "AWS_SECRET_ACCESS_KEY": keys.secret_key,
            "AWS_SESSION_TOKEN": keys.session_token or "",
            "AWS_REGION": REGION,
            "AWS_LAMBDA_FUNCTION_NAME": "keybroker",
        }

    def rotate(self) -> str:
        token = secrets.token_hex(16)
        for step in STEPS:
            event = {"Step": step, "SecretId": self.secret, "ClientRequestToken": token}
            self.handler(event, object())
        return token


@pytest.mark.parametrize("missing", [None, *rights(ROLE)])
def test_the_function_of_the_template(
    place: Place, missing: Right | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It rotates with the role that it is given there, and with nothing less."""
    stack = Stack(place, monkeypatch, missing)
    if missing is not None:
        with denied(missing):
            stack.rotate()
        return
    tokens = [stack.rotate() for _ in range(2)]
    labels = place.aws.labels(place.here("llm/shared"))
    assert [labels["AWSPREVIOUS"], labels["AWSCURRENT"]] == tokens
    reader = place.profiles("EKS, ECS, EC2")["work"]
    place.put("key", json.dumps(place.value("shared")))
    keys = [place.value("shared")["key"]]
    assert keys == [place.value("key")["key"]]
    assert reader.source["field"] == "/key"


def test_the_parts_of_the_template_belong_together(place: Place) -> None:
    """AWS may call the function for the one secret; a key outlives one rotation that fails."""
    function, schedule = TEMPLATE["Function"]["Properties"], TEMPLATE["Schedule"]["Properties"]
    permission = TEMPLATE["Permission"]["Properties"]
    assert permission["Principal"] == "secretsmanager.amazonaws.com"
    assert permission["SourceArn"] == schedule["SecretId"] == {"Ref": "Secret"}
    assert permission["SourceAccount"] == {"Ref": "AWS::AccountId"}
    assert permission["FunctionName"] == {"Ref": "Function"}
    assert schedule["RotationLambdaARN"] == {"Fn::GetAtt": ["Function", "Arn"]}
    assert TEMPLATE["Schedule"]["DependsOn"] == "Permission"
    assert function["Role"] == {"Fn::GetAtt": ["Role", "Arn"]}
    assert function["Timeout"] == 60
    [hours] = re.findall(r"rate\((\d+) hours\)", schedule["RotationRules"]["ScheduleExpression"])
    profile = place.profiles("AWS owns the schedule")["work"]
    assert profile.source["lifetime"] >= 2 * timedelta(hours=int(hours))
    version = "".join(re.findall(r"--python-version ([\d.]+) ", PAGE.read_text()))
    assert function["Runtime"] == f"python{version}"


# Files and variables of AWS's.


@pytest.mark.parametrize("text", list(blocks(PAGE.read_text(), "ini")))
def test_every_profile_of_aws_s_can_be_read(place: Place, text: str) -> None:
    """By AWS's own library; what one names of another is there."""
    (place.folder / "config").write_text(text)
    config = botocore.session.Session().full_config
    work = config["profiles"]["work"]
    assert work["region"] == "eu-central-1"
    assert work.get("source_profile", "work") in config["profiles"]
    assert {work.get("sso_session", "corp")} <= {"corp", *config.get("sso_sessions", {})}
    assert {"credential_process", "role_arn", "sso_session"} & set(work)


def minted(gateway: DevGateway) -> str:
    """Mint a key as somebody does who keeps it at AWS."""
    request = urllib.request.Request(
        f"{gateway.url}/key/generate",
        b'{"duration": "1h"}',
        {"authorization": f"Bearer {gateway.master_key}", "content-type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=10) as reply:
        key: str = json.load(reply)["key"]
        return key


@pytest.mark.parametrize("way", ["A sign-in", "A program", "A role"])
def test_who_we_are_by_the_files_of_the_page(
    place: Place, home: Home, sso: Sso, aws_role: str, way: str
) -> None:
    """As each is written there, `keybroker get` finds out who we are, and reads the key."""
    key = minted(place.gateway)
    place.put("key", json.dumps({"key": key}))
    [config] = blocks(section("In two minutes"), "toml")
    file = home.path / ".config/keybroker/config.toml"
    file.parent.mkdir(mode=0o700)
    file.write_text(f'[cache]\nkey = "file"\n{place.here(config)}')

    aws_own = home.path / ".aws"
    if way == "A sign-in":
        sso.write(home.path)  # what `aws sso login` leaves
    aws_own.mkdir(exist_ok=True)
    [text] = blocks(section(way), "ini")
    text = place.here(text).replace("role/llm-reader", "role/" + aws_role.rpartition("/")[2])
    text = text.replace("sso_role_name = llm-reader", f"sso_role_name = {sso.role}")
    text = text.replace("/usr/local/bin", str(home.path))
    (aws_own / "config").write_text(text)
    me = place.aws.user(f"me-{secrets.token_hex(4)}", allow("sts:AssumeRole"))
    (aws_own / "credentials").write_text(
        f"[me]\naws_access_key_id = {me.access_key}\naws_secret_access_key = {me.secret_key}\n"
    )
    keys = place.aws.session(aws_role)
    said = {
        "Version": 1,
        "AccessKeyId": keys.access_key,
        "SecretAccessKey": keys.secret_key,
        "SessionToken": keys.session_token,
    }
    program = home.path / "print-aws-credentials"
    program.write_text(f"#!/bin/sh\ncat <<'EOF'\n{json.dumps(said)}\nEOF\n")
    program.chmod(0o700)
    done = subprocess.run(
        ["keybroker", "get", "--no-start", "work"],
        env={
            **home.environment,
            "AWS_ENDPOINT_URL": place.front.url,
            "AWS_ENDPOINT_URL_SSO": sso.url,
            "AWS_ENDPOINT_URL_SSO_OIDC": sso.url,
            "AWS_EC2_METADATA_DISABLED": "true",
        },
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert (done.stdout, done.stderr) == (f"{key}\n", "")


def test_every_variable_is_named() -> None:
    """Those in the table are the ones that a worker is given."""
    named = re.findall(r"`(AWS_[A-Z0-9_]+)`", section("Variables").partition("No other")[0])
    assert set(named) == set(accounts.VARIABLES)
    assert len(named) == len(set(named))


# Messages.


def texts() -> Iterator[str]:
    """Yield every text in the code that may be in a message; … is what is filled in."""
    package = ROOT / "keybroker"
    files = [*package.glob("*.py"), *(package / "sources").rglob("*.py"), *package.glob("cli/*.py")]
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value
            elif isinstance(node, ast.JoinedStr):
                yield "".join(
                    one.value if isinstance(one, ast.Constant) else "…" for one in node.values
                )


TEXTS = [re.sub(r"…+", "…", text) for text in texts()]
HEADINGS = [
    *("Reaching it", "Who we are", "Reading", "Publishing", "In the function"),
]
FILLED = {  # what stands for … in the code, in examples of the page
    "refuses what this clock signs: it is 20 min behind": [
        "refuses what this clock signs",
        "min …",
    ],
    "field /key is not one token of printable ASCII": ["field …", "not one token of printable"],
    "its value is not one token of printable ASCII": ["its value", "not one token of printable"],
    "field /key is no text": ["field …", "… is no text"],
    "… may not DescribeSecret": ["… may not …"],
}


def messages() -> list[tuple[str, str]]:
    found = []
    last = PAGE.read_text().partition("## When something fails")[2]
    for heading in HEADINGS:
        table = last.partition(f"### {heading}\n")[2].partition("\n###")[0]
        rows = re.findall(r"^\| (`.*?) \| ", table, re.M)
        assert rows, heading
        found += [(heading, one) for row in rows for one in re.findall(r"`([^`]+)`", row)]
    return [one for one in found if one[1] not in ("ahead",)]


def is_said(message: str) -> bool:
    """Say whether the code has a message, whatever is filled in."""
    pattern = re.escape(message).replace("…", ".*")
    for shown in (r"/key", r"405", r"400", r"2026\-12\-04", r"2026\-01\-01\ 00:00"):
        pattern = pattern.replace(shown, "(?:…|" + shown + ")")
    return any(re.search(pattern, text) for text in TEXTS)


@pytest.mark.parametrize(("heading", "message"), messages())
def test_every_message_is_in_the_code(heading: str, message: str) -> None:
    parts = FILLED.get(message, [message])
    assert [part for part in parts if not is_said(part)] == []


def test_a_message_that_nobody_says_is_seen() -> None:
    assert not is_said("answers in verse")
    assert not is_said("may not … anything")


def test_a_refusal_that_is_new_is_in_the_tables() -> None:
    """What the code says of AWS's refusals has a row, in its words."""
    from keybroker.sources.aws import refusals

    page = PAGE.read_text()
    problems = [
        *refusals.EXCEPTIONS.values(),
        *refusals.PROVIDERS.values(),
        *refusals.CODES.values(),
    ]
    never = {  # of calls that are not made here, or that are put into words by who asked
        "has that version, with another value",
        "is not ready for that",
        "has a session policy that is too large",
    }
    said = {one.words for one in problems} - never
    assert sorted(words for words in said if words not in page) == []
