"""What a service is given, by what is configured; no systemd is needed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, cast

import pytest

from keybroker.answering import Answers
from keybroker.audit import Audit
from keybroker.config import Config, load
from keybroker.errors import ConfigError
from keybroker.paths import state_directory
from keybroker.push import SettingsFiles
from keybroker.services.needs import needs
from keybroker.services.systemd import DROP_IN, Systemd, plain, quoted
from tests.resident import Home, Resident

if TYPE_CHECKING:
    from keybroker.broker import Broker

SECRET = "sk-canary-of-a-variable"
HEAD = '[profiles.work]\nbase_url = "https://llm.example.com"\n[profiles.work.source]\n'
LITELLM = 'type = "litellm"\nadmin = {{ {} }}\n'


def config(home: Home, text: str) -> Config:
    file = home.path / "config.toml"
    file.write_text(text)
    file.chmod(0o600)
    return load((file,))


def asked(home: Home, reference: str = 'file = "/x"') -> Config:
    return config(home, HEAD + LITELLM.format(reference))


def test_nothing_but_what_is_needed(home: Home) -> None:
    """With an admin key in a file: the state, and the folder whose settings are touched."""
    found = needs(asked(home), home.environment)
    assert found.writable[0] == state_directory(home.environment)
    assert found.writable[1:] == (home.path / ".claude",)
    assert not found.programs and found.credentials == () and found.seals


def test_what_needs_less_gets_less(home: Home) -> None:
    """Without push no settings are touched."""
    text = HEAD.replace("\n[profiles.work.source]", "\npush = false\n[profiles.work.source]")
    found = needs(config(home, text + LITELLM.format('file = "/x"')), home.environment)
    assert home.path / ".claude" not in found.writable


@pytest.mark.parametrize(
    ("text", "programs"),
    [
        (HEAD + 'type = "command"\ncommand = ["/bin/x"]\n', True),
        (HEAD + LITELLM.format('command = ["pass", "x"]'), True),
        ('[hooks]\nlogin_ending = ["/bin/x"]\n' + HEAD + LITELLM.format('file = "/x"'), True),
        (HEAD + LITELLM.format('keyring = "x"'), False),
    ],
)
def test_programs_of_others_are_seen(home: Home, text: str, programs: bool) -> None:
    assert needs(config(home, text), home.environment).programs is programs


def test_variables_that_hold_no_secret_are_passed_on(home: Home) -> None:
    """Those that are the service manager's own are not; others are none of the daemon's."""
    given = {
        **home.environment,
        "HTTPS_PROXY": "http://proxy.example:3128",
        "SSL_CERT_FILE": "/etc/ssl/corp.pem",
        "DBUS_SESSION_BUS_ADDRESS": "unix:path=/x",
        "EDITOR": "vi",
    }
    found = needs(asked(home), given).environment
    assert found["HTTPS_PROXY"] == "http://proxy.example:3128"
    assert found["SSL_CERT_FILE"] == "/etc/ssl/corp.pem"
    assert not {"EDITOR", "HOME", "DBUS_SESSION_BUS_ADDRESS", "XDG_RUNTIME_DIR"} & set(found)


@pytest.mark.parametrize(
    ("reference", "variables"),
    [
        ('env = "ADMIN"', {"ADMIN": SECRET}),
        ('file = "/x"', {"HTTPS_PROXY": f"http://me:{SECRET}@proxy.example:3128"}),
        ('aws = "a#/b"', {"AWS_SECRET_ACCESS_KEY": SECRET, "AWS_REGION": "eu-central-1"}),
    ],
)
def test_a_secret_in_a_variable_is_refused_and_not_shown(
    home: Home, reference: str, variables: dict[str, str]
) -> None:
    with pytest.raises(ConfigError, match="a service does not see what a shell exports") as raised:
        needs(asked(home, reference), {**home.environment, **variables})
    assert next(iter(variables)) in raised.value.message
    assert SECRET not in str(raised.value) + str(raised.value.hint)


def test_a_variable_that_is_not_known_may_hold_one(home: Home) -> None:
    """Whatever it is called: its value is in no unit."""
    text = HEAD + 'type = "command"\ncommand = ["/bin/x"]\nenvironment = ["GATEWAY"]\n'
    with pytest.raises(ConfigError, match="GATEWAY: a service does not see") as raised:
        needs(config(home, text), {**home.environment, "GATEWAY": SECRET})
    assert SECRET not in str(raised.value) + str(raised.value.hint)
    assert "GATEWAY" not in needs(config(home, text), home.environment).environment


@pytest.mark.parametrize("reference", ['keyring = "x"', 'file = "~/x"'])
def test_what_a_shared_host_s_daemon_does_not_have(home: Home, reference: str) -> None:
    with pytest.raises(
        ConfigError, match=r"a shared host's daemon has no (keyring|HOME)"
    ) as raised:
        needs(asked(home, reference), home.environment, system=True)
    assert "credential" in str(raised.value.hint)


def test_what_a_unit_says_itself_is_not_said_again(home: Home) -> None:
    """For the whole system, where the state and the configuration are is the unit's."""
    given = {**home.environment, "KEYBROKER_CONFIG": "/x.toml", "XDG_STATE_HOME": "/y"}
    assert not {"KEYBROKER_CONFIG", "XDG_STATE_HOME"} & set(
        needs(asked(home), given, system=True).environment
    )
    assert needs(asked(home), given).environment["KEYBROKER_CONFIG"] == "/x.toml"


def test_words_are_written_so_that_systemd_reads_them(home: Home) -> None:
    """systemd.syntax(7): quotes, backslashes, specifiers."""
    assert quoted('a "b" \\ 50%') == '"a \\"b\\" \\\\ 50%%"'
    assert plain(Path("/a b/50%")) == "/a b/50%%"
    given = {**home.environment, "PATH": '/a "b"/50%:/usr/bin'}
    text = Systemd(given).files(needs(asked(home), given))
    drop_in = text[home.path / ".config/systemd/user" / DROP_IN]
    assert 'Environment="PATH=/a \\"b\\"/50%%:/usr/bin"' in drop_in


def test_a_credential_that_is_not_there_is_said(home: Home) -> None:
    """And how to make it; once it is there, it is named: sealed, if it is."""
    found = needs(asked(home, 'credential = "admin"'), home.environment)
    assert found.credentials == ("admin",)
    manager = Systemd(home.environment)
    with pytest.raises(ConfigError, match="credential:admin: neither") as raised:
        manager.files(found)
    assert "systemd-creds encrypt --name=admin" in str(raised.value.hint)

    folder = home.path / ".config/keybroker/credentials"
    folder.mkdir(parents=True)
    (folder / "admin").touch()
    where = home.path / ".config/systemd/user" / DROP_IN
    assert f"LoadCredential=admin:{folder}/admin\n" in manager.files(found)[where]
    (folder / "admin.cred").touch()
    assert f"LoadCredentialEncrypted=admin:{folder}/admin.cred\n" in manager.files(found)[where]


def test_an_interpreter_in_a_home_is_none_of_a_host_s(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The service would not see it."""
    monkeypatch.setattr(sys, "executable", "/home/ada/.venv/bin/python")
    manager = Systemd(home.environment, system=True)
    manager.folder = home.path
    with pytest.raises(ConfigError, match="is in a HOME") as raised:
        manager.write(needs(asked(home), home.environment, system=True))
    assert "/opt" in str(raised.value.hint)
    assert not list(home.path.rglob("*.service"))


@pytest.mark.parametrize("folder", ["here", "./here", ""])
def test_a_folder_has_to_be_named_in_full(home: Home, folder: str) -> None:
    with pytest.raises(ConfigError, match=r"config.toml:2: service.writable"):
        config(home, f'[service]\nwritable = ["{folder}"]\n' + HEAD + LITELLM.format('file = "/x"'))


def test_whom_the_configuration_names_no_more_has_nothing(home: Home) -> None:
    """Though they are connected already: only owners have what nobody's name is beside."""
    whole = asked(home)
    answers = Answers(whole, Audit(home.path), SettingsFiles(home.path), {})
    answers.owners, answers.others = frozenset({0}), {1001: whole.of({"work"})}
    assert set(answers.config_of(0).profiles) == set(answers.config_of(1001).profiles) == {"work"}
    answers.others = {}
    assert not answers.config_of(1001).profiles
    for line in (b"1 get work 0 0\n", b"1 get - 0 0\n"):
        answers.broker = cast("Broker", object())  # it would be asked for the key
        reply = answers.at_once(line, 1001)
        assert reply is not None and reply.startswith(b"error 78 ")


def test_how_a_service_stands_is_said_without_a_configuration(resident: Resident) -> None:
    """Nothing is installed, and nothing has to be configured for that."""
    assert resident.cli("service", "status") == (
        69,
        "no service is installed; keybroker service install\n",
        "",
    )
    resident.configure("bogus = 1\n")
    status, said, _ = resident.cli("service", "status", "--json")
    found = json.loads(said)
    assert (status, found["installed"]) == (69, False)
    assert "bogus: unknown key" in found["problem"]
