"""The `[vault]` table: what it may say, what stands in for what it leaves out, who gets it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from keybroker import vault
from keybroker.config import Config, load, parse, read_profile
from keybroker.credential import Reference
from keybroker.document import Where
from keybroker.errors import ConfigError
from keybroker.pool import sessions, variables
from keybroker.rotation import RETRY_MAX, Kind
from keybroker.schema import schema
from keybroker.worker import decode_profile, encode_profile

ADDRESS = "https://vault.example.com:8200"
APPROLE = {"method": "approle", "role_id": "r", "secret_id": {"file": "~/secret-id"}}
TABLE = {"address": ADDRESS, "auth": APPROLE}


def read(
    source: Mapping[str, Any],
    table: Mapping[str, Any] | None = TABLE,
    environment: Mapping[str, str] | None = None,
    **more: Any,
) -> Config:
    """Read a configuration with one profile."""
    document: dict[str, Any] = {
        "profiles": {"work": {"base_url": "https://llm.example.com", "source": source, **more}}
    }
    if table is not None:
        document["vault"] = table
    return parse(document, Where({}, "test"), (), environment or {})


def kept(**more: Any) -> dict[str, Any]:
    return {"type": "vault", "path": "secret/data/llm/key", **more}


def problem(*given: Any, **more: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        read(*given, **more)
    return caught.value.message


def test_a_source_takes_the_table_with_it() -> None:
    """A worker gets the profile and nothing else: it reads the same from it."""
    profile = read(kept()).profiles["work"]
    again = decode_profile(json.loads(json.dumps(encode_profile(profile))))

    assert again == profile
    assert again.vault is not None
    assert (again.vault.address, again.vault.method) == (ADDRESS, "approle")
    assert again.vault.auth["secret_id"] == Reference("file", "~/secret-id")
    assert again.issuer == profile.issuer


def test_the_journal_can_log_in_again() -> None:
    """What an issuer carries is all that a revocation needs, without a secret in it."""
    profile = read(kept(engine="dynamic")).profiles["work"]
    found = vault.read_text(profile.issuer.vault)

    assert found == profile.vault
    assert found.session == vault.session_of(profile.issuer.vault)


@pytest.mark.parametrize(
    ("source", "kind"),
    [
        (kept(), Kind.FOLLOWED),
        (kept(engine="static-role", path="database/static-creds/x"), Kind.FOLLOWED),
        (kept(engine="dynamic", path="database/creds/x"), Kind.LEASED),
    ],
)
def test_whose_key_it_is_follows_from_the_engine(source: dict[str, Any], kind: Kind) -> None:
    assert read(source).profiles["work"].kind is kind


def test_a_followed_key_is_read_each_minute_and_no_failure_waits_longer() -> None:
    policy = read(kept()).profiles["work"].policy

    assert policy.poll == policy.retry_max == timedelta(seconds=60)
    assert read(kept(poll="1h")).profiles["work"].policy.retry_max == RETRY_MAX


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({"auth": {"method": "token", "token": {"file": "/t"}}}, True),
        ({"namespace": "team-a"}, False),
        ({"path": "secret/data/other"}, False),
        ({"field": "other"}, False),
        ({"version": 3}, False),
    ],
)
def test_a_key_is_this_profile_s_whoever_logs_in(changes: dict[str, Any], same: bool) -> None:
    """Another way in leads to the same key; another place is another key."""
    first, other = (read(kept(**one)).profiles["work"].issuer for one in ({}, changes))

    assert (first.url == other.url) is same


def test_the_same_table_is_one_session() -> None:
    table = {"nodes": ["https://b.example.com"], **TABLE}
    turned = dict(reversed(table.items()))
    one, two = (read(kept(), t).profiles["work"] for t in (table, turned))
    reference = {"type": "litellm", "admin": {"vault": "secret/data/admin#key"}}
    third = read(reference, table).profiles["work"]

    assert one.vault is not None
    assert two.vault is not None
    assert third.vault is not None
    assert one.vault.session == two.vault.session == third.vault.session
    assert sessions(read(kept(), table)) == [one.vault.session]


# what it leaves out


@pytest.mark.parametrize("prefix", ["VAULT", "BAO"])
def test_variables_stand_in_for_what_is_left_out(prefix: str) -> None:
    environment = {
        f"{prefix}_ADDR": "https://other.example.com",
        f"{prefix}_NAMESPACE": "team-a/",
        f"{prefix}_CACERT": "/etc/ca.pem",
        f"{prefix}_CLIENT_CERT": "/etc/client.pem",
        f"{prefix}_CLIENT_KEY": "/etc/client.key",
    }
    found = read(kept(), {"auth": APPROLE}, environment).profiles["work"].vault

    assert found is not None
    assert found.address == "https://other.example.com"
    assert found.namespace == "team-a"
    assert (found.ca, found.client_cert, found.client_key) == (
        *("/etc/ca.pem", "/etc/client.pem", "/etc/client.key"),
    )


def test_the_file_counts_more_than_a_variable_and_bao_more_than_vault() -> None:
    environment = {"VAULT_ADDR": "https://v.example.com", "BAO_ADDR": "https://b.example.com"}
    written = read(kept(), TABLE, environment).profiles["work"].vault
    found = read(kept(), {"auth": APPROLE}, environment).profiles["work"].vault

    assert written is not None
    assert found is not None
    assert written.address == ADDRESS
    assert found.address == "https://b.example.com"


def test_a_token_in_the_environment_is_nobody_s() -> None:
    environment = {"VAULT_ADDR": ADDRESS, "VAULT_TOKEN": "s.canary"}
    profile = read(kept(), {"auth": APPROLE}, environment).profiles["work"]

    assert "canary" not in repr(profile.raw)
    assert "VAULT_TOKEN" not in vault.VARIABLES


def test_a_variable_that_cannot_be_used_is_named() -> None:
    said = problem(kept(), {"auth": APPROLE}, {"VAULT_ADDR": "vault.example.com"})

    assert said.startswith("VAULT_ADDR: expected an address")
    said = problem(kept(), {"auth": APPROLE, "address": ADDRESS}, {"BAO_NAMESPACE": "/"})
    assert said.startswith("BAO_NAMESPACE: expected a name")


def test_a_mount_may_be_written_as_bao_auth_list_shows_it() -> None:
    """With a slash behind, which the server would answer with a redirect."""
    table = {**TABLE, "auth": {**APPROLE, "mount": "team/approle/"}, "namespace": "/eng/"}
    found = read(kept(), table).profiles["work"].vault
    assert found is not None
    assert (found.auth["mount"], found.namespace) == ("team/approle", "eng")


def test_a_relative_path_in_a_variable_is_of_this_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A daemon runs in another."""
    monkeypatch.chdir(tmp_path)
    found = read(kept(), TABLE, {"VAULT_CACERT": "ca.pem"}).profiles["work"].vault

    assert found is not None
    assert found.ca == str(tmp_path / "ca.pem")


# a source of its own


def test_an_address_of_its_own_takes_nothing_from_the_table() -> None:
    """What logs in at one server is not shown to another."""
    said = problem(kept(address="https://other.example.com"))
    assert "has no auth table" in said

    own = {"method": "token", "token": {"env": "OTHER"}}
    whole = {**TABLE, "namespace": "team-a", "nodes": ["https://b.example.com"]}
    found = read(kept(address="https://other.example.com", auth=own), whole).profiles["work"].vault
    assert found is not None
    assert (found.method, found.namespace, found.nodes) == ("token", None, ())


def test_a_source_may_name_another_namespace() -> None:
    found = read(kept(namespace="team-b")).profiles["work"].vault

    assert found is not None
    assert (found.address, found.namespace) == (ADDRESS, "team-b")


@pytest.mark.parametrize("kind", ["litellm", "static"])
def test_a_reference_needs_the_table(kind: str) -> None:
    reference = {"vault": "secret/data/llm/admin#key"}
    source = {"type": kind, ("admin" if kind == "litellm" else "key"): reference}

    assert "no [vault] table" in problem(source, None)
    assert read(source).profiles["work"].vault is not None


# what is wrong with it


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"addres": ADDRESS}, "vault.addres: unknown key; did you mean address?"),
        ({"auth": APPROLE}, "has no address of a Vault"),
        ({"address": ADDRESS}, "has no auth table"),
        ({**TABLE, "auth": "approle"}, "has no auth table"),
        ({**TABLE, "auth": {}}, "vault.auth.method: expected one of token, approle"),
        ({**TABLE, "auth": {"method": "aprole"}}, "vault.auth.method: expected one of"),
        ({**TABLE, "auth": {"method": "approle"}}, "vault.auth: has no role_id"),
        ({**TABLE, "auth": {**APPROLE, "rol": "x"}}, "vault.auth.rol: unknown key"),
        ({**TABLE, "auth": {**APPROLE, "secret_id": "pasted-canary"}}, "expected a reference"),
        (
            {**TABLE, "auth": {**APPROLE, "secret_id": {"vault": "a/b#c"}}},
            "expected exactly one of env, file, keyring, command",
        ),
        (
            {**TABLE, "auth": {"method": "approle", "role_id": "r", "wrapped_by": "x"}},
            "there is no secret_id to unwrap",
        ),
        ({**TABLE, "auth": {"method": "cert"}}, "cert needs client_cert and client_key"),
        ({**TABLE, "client_cert": "/c.pem"}, "client_cert and client_key belong together"),
        ({**TABLE, "address": "unix:run/agent"}, "expected a path after unix:"),
        ({**TABLE, "address": "vault:8200"}, "it must begin with https:// or http://"),
        ({**TABLE, "namespace": "é"}, "vault.namespace: expected a name such as"),
        ({**TABLE, "namespace": "eng\n"}, "vault.namespace: expected a name such as"),
        ({**TABLE, "auth": {**APPROLE, "mount": "a?b"}}, "vault.auth.mount: expected a name"),
        ({**TABLE, "address": "vault"}, 'such as "https://vault.example.com:8200" or "unix:/'),
        ({**TABLE, "nodes": ADDRESS}, "expected a list of texts"),
        ({**TABLE, "nodes": ["b.example.com"]}, "vault.nodes: expected an address"),
    ],
)
def test_a_wrong_table_is_refused(table: dict[str, Any], said: str) -> None:
    """By key, and without what was pasted."""
    found = problem(kept(), table)

    assert said in found
    assert "canary" not in found


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ({"path": "/v1/secret/data/llm"}, "expected a path such as"),
        ({"path": "v1/secret/data/llm"}, "expected a path such as"),
        ({"path": "secret/data/llm?version=1"}, "expected a path such as"),
        ({"path": "secret"}, "expected a path such as"),
        ({"path": "secret/llm", "version": 2}, "only a KV 2 secret has versions"),
        ({"path": "db/creds/x", "engine": "dynamic", "version": 2}, "only a KV 2 secret"),
        ({"path": "secret/data/llm", "lifetime": "1h"}, 'is for engine = "dynamic"'),
        ({"path": "secret/data/llm", "parameters": {}}, 'is for engine = "dynamic"'),
        ({"path": "secret/data/llm", "allow_orphans": True}, 'is for engine = "dynamic"'),
        ({"path": "db/creds/x", "engine": "dynamic", "lifetime": "1m"}, "three times the hold"),
        ({"path": "secret/data/llm", "engine": "kv2"}, "expected one of kv, dynamic"),
    ],
)
def test_a_wrong_source_is_refused(source: dict[str, Any], said: str) -> None:
    assert said in problem({"type": "vault", **source})


def test_a_source_that_mints_nothing_has_no_key_api() -> None:
    assert "has no key API" in problem(kept(), verify="info")


def test_a_table_in_a_profile_is_no_key_of_ours() -> None:
    assert "vault is a table of its own: [vault]" in problem(kept(), vault=TABLE)


@pytest.mark.parametrize("text", ["", "x", "[]", "{}", '{"address":"x"}'])
def test_a_journal_that_was_tampered_with_is_said(text: str) -> None:
    with pytest.raises(ConfigError):
        vault.read_text(text)


def test_an_error_has_file_and_line(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text(f'[vault]\naddress = "{ADDRESS}"\n[vault.auth]\nmethod = "nope"\n')
    file.chmod(0o600)
    with pytest.raises(ConfigError) as caught:
        load([file], {})

    assert f"{file}:4: vault.auth.method" in caught.value.message


# what it is needed for


def test_workers_get_the_variables_that_a_login_names_and_no_others() -> None:
    auth = {"method": "userpass", "username": "u", "password": {"env": "PASSWORD"}}
    config = read(kept(), {"address": ADDRESS, "auth": auth})
    gone = read(kept(), {"address": ADDRESS, "auth": {"method": "aws"}}).profiles["work"].issuer

    assert variables(config) == {"vault": {"PASSWORD"}}
    assert variables(None, [gone])["vault"] >= {"AWS_PROFILE", "AWS_WEB_IDENTITY_TOKEN_FILE"}
    reference = {"type": "litellm", "admin": {"vault": "secret/data/admin#key"}}
    admin = read(reference, {"address": ADDRESS, "auth": auth})
    assert variables(admin) == {"litellm": {"PASSWORD"}}


def test_the_files_of_a_login_are_known() -> None:
    table = {
        "address": ADDRESS,
        "client_cert": "/c.pem",
        "client_key": "/k.pem",
        "auth": {"method": "kubernetes", "role": "r"},
    }
    found = read(kept(), table).profiles["work"].issuer

    assert vault.files(found.vault) == [vault.KUBERNETES_TOKEN, "/c.pem", "/k.pem"]
    assert vault.files(read(kept()).profiles["work"].issuer.vault) == ["~/secret-id"]


@pytest.mark.parametrize("method", vault.AUTH)
def test_every_method_can_be_read_and_is_in_the_schema(method: str) -> None:
    import jsonschema

    needed: dict[str, Any] = {
        "role_id": "r",
        "secret_id": {"file": "/s"},
        "token": {"file": "/t"},
        "jwt": {"command": ["print-token"]},
        "role": "r",
        "username": "u",
        "password": {"keyring": "p"},
    }
    auth = {"method": method} | {
        name: needed[name] for name, one in vault.AUTH[method].items() if one.required
    }
    table = {"address": ADDRESS, "client_cert": "/c", "client_key": "/k", "auth": auth}
    profile = {"base_url": "https://llm.example.com", "source": kept()}
    document = {"vault": table, "profiles": {"work": profile}}

    found = parse(document, Where({}, "test"), (), {}).profiles["work"].vault
    assert found is not None
    assert found.method == method
    jsonschema.validate(document, schema())
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**document, "vault": {**table, "auth": {"method": "x"}}}, schema())


def test_a_profile_that_is_read_alone_needs_all_in_it() -> None:
    """As a worker reads it."""
    raw = {"base_url": "https://llm.example.com", "source": kept(**TABLE)}

    assert read_profile("work", raw, Where({}, "test")).vault is not None
