"""The shape of the package: who may import whom, which library stands where, what is documented."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "keybroker"

# The package in reading order: a module imports only from lines above its own.
# Beside each, the foreign libraries that it alone may know.
TABLE: dict[str, set[str]] = {
    "": set(),  # the version; imports nothing
    "values": set(),
    "errors": set(),
    "clock": set(),
    "kernel": set(),
    "log": set(),
    "listening": set(),
    "credential": set(),
    "label": set(),
    "slots": set(),
    "rotation": set(),
    "sessions": set(),
    "document": set(),
    "fields": set(),
    "aws": set(),
    "vault": set(),
    "login_types": set(),
    "signin": set(),
    "config": set(),
    "schema": set(),
    "hooks": set(),
    "address": set(),
    "tiers": set(),
    "tables": set(),
    "paths": set(),
    "settings": set(),
    "asking": set(),
    "glance": set(),
    "statusline": set(),
    "wire": set(),
    "push": set(),
    "guidance": set(),
    "chain": set(),
    "journal": set(),
    "carry": set(),
    "endings": set(),
    "audit": set(),
    "oskeyring": {"keyring", "secretstorage"},
    "cache": {"cryptography"},
    "troubles": set(),
    "forms": set(),
    "export": set(),
    "sources.http": {"httpx", "truststore"},
    "sources.held": set(),
    "sources": set(),
    "sources.gateway": set(),
    "sources.recognise": set(),
    "sources.messages": set(),
    "sources.models": set(),
    "sources.entrust": set(),
    "sources.followed": set(),
    "sources.command": set(),
    "sources.reference": set(),
    "sources.aws": set(),
    "sources.aws.refusals": {"botocore"},
    "sources.vault": set(),
    "sources.vault.server": {"hvac"},
    "sources.vault.refusals": set(),
    "login.tokens": set(),
    "login.provider": set(),
    "login.oauth": {"oauthlib"},
    "login.jwt": {"joserfc"},
    "login.oidc": {"joserfc"},
    "login.gateway": set(),
    "login.litellm": set(),
    "login.workload": set(),
    "login.vault": set(),
    "login.aws": {"botocore"},
    "login.openrouter": set(),
    "login": set(),
    "login.page": set(),
    "login.loopback": set(),
    "login.flow": set(),
    "sources.signed_in": set(),
    "sources.vault.methods": {"botocore"},
    "sources.vault.login": set(),
    "sources.vault.place": set(),
    "sources.vault.source": set(),
    "sources.vault.store": set(),
    "sources.aws.account": {"boto3", "botocore"},
    "sources.aws.secret": set(),
    "sources.aws.source": set(),
    "sources.aws.store": set(),
    "sources.static": set(),
    "sources.litellm": set(),
    "connect": set(),
    "connect.plan": set(),
    "connect.files": set(),
    "connect.record": set(),
    "connect.edit": set(),
    "worker": set(),
    "rotation_lambda": set(),  # a process of AWS's own, with no worker beside it
    "logins": set(),
    "pool": set(),
    "handout": set(),
    "broker": set(),
    "standing": set(),
    "outcomes": set(),
    "server": set(),
    "answering": set(),
    "runs": set(),
    "ownership": set(),
    "starting": set(),
    "daemon": set(),
    "devgateway.server": set(),
    "devgateway.refusals": set(),
    "devgateway.replies": set(),
    "devgateway.row": set(),
    "devgateway.keys": set(),
    "devgateway.gateway": set(),
    "devgateway": set(),
    "devgateway.__main__": set(),
    "helper": set(),
    "foreign": set(),
    "foreground": set(),
    "connect.organisation": set(),
    "connect.tokens": set(),
    "connect.line": set(),
    "connect.proof": set(),
    "connect.claude": set(),
    "connect.inline": set(),
    "connect.bedrock": set(),
    "connect.vertex": set(),
    "connect.foundry": set(),
    "connect.aws": set(),
    "connect.vscode": set(),
    "connect.desktop": set(),
    "connect.own": set(),
    "connect.opencode": set(),
    "connect.cursor": set(),
    "connect.fazm": set(),
    "connect.agent_sdk": set(),
    "connect.github_actions": set(),
    "client": set(),
    "connect.connected": set(),
    "services.needs": set(),
    "services.manager": set(),
    "services.systemd": set(),
    "services.launchd": set(),
    "services": set(),
    "doctor": set(),
    "doctor.finding": set(),
    "doctor.requests": set(),
    "doctor.origins": set(),
    "doctor.program": set(),
    "doctor.files": set(),
    "doctor.agent": set(),
    "doctor.gateway": set(),
    "doctor.together": set(),
    "doctor.fixes": set(),
    "cli.names": set(),
    "cli.base": {"click"},
    "cli.sign_ins": set(),
    "cli.work": set(),
    "cli.keys": {"click"},
    "cli.models": {"click"},
    "cli.configuration": {"click"},
    "cli.table": set(),
    "cli.draft": set(),
    "cli.shells": set(),
    "cli.open": {"click"},
    "cli.run": {"click"},
    "cli.environment": {"click"},
    "cli.daemon": {"click"},
    "cli.service": {"click"},
    "cli.connect": {"click"},
    "cli.status": {"click"},
    "cli.login": {"click"},
    "cli.audit": {"click"},
    "cli.trial": set(),
    "cli.source": {"click"},
    "cli.questions": {"click"},
    "cli.init": {"click"},
    "cli.look": set(),
    "cli.verify": {"click"},
    "cli.doctor": {"click"},
    "cli.demo": {"click", "httpx"},  # the demonstration's client is a program of its own
    "cli": set(),
}
# The one place that imports downwards, inside functions: a source is chosen by its name.
CHOICES = {
    ("sources", f"sources.{name}")
    for name in (
        *(
            "command",
            "litellm",
            "signed_in",
            "static",
            "vault.place",
            "vault.source",
            "vault.store",
        ),
        *("aws.account", "aws.source", "aws.store"),
    )
}
# It listens first, and loads the rest while clients queue.
CHOICES |= {("listening", name) for name in ("daemon", "document", "errors", "paths")}

# A secret leaves through reveal() here and nowhere else.
REVEALS = {
    "pool": "the pipe to a worker",
    "worker": "the pipe back",
    "carry": "a session, to a worker or to be sealed",
    "cache": "seals it, and is sealed with the wrap key",
    "export": "writes it where a program without a helper reads it, as a person asked",
    "answering": "gives it to the one who asked, through the socket",
    "cli.keys": "prints it for the one who asked",
    "login.tokens": "seals what a sign-in gave",
    "login.oauth": "presents it to who gave it",
    "login.aws": "puts it where AWS's own programs have it, and presents it to AWS",
    "login.litellm": "presents it to who gave it, to learn whose it is",
    "login.workload": "shows a machine's token to who gives another for it",
    "sources": "an Anthropic key is known by its beginning",
    "sources.gateway": "presents it to the gateway",
    "sources.messages": "presents it to the gateway, as Claude Code does",
    "sources.models": "presents it to the gateway",
    "sources.entrust": "puts it where a reference finds it",
    "sources.litellm": "presents the admin key, and asks for the key that it chose",
    "sources.vault.server": "presents the token to Vault",
    "sources.vault.methods": "presents to Vault what a login is made with",
    "sources.vault.store": "puts it where others read it",
    "sources.aws.store": "puts it where others read it",
    "sources.aws.account": "hands boto3 the credentials of a role that it had before",
    "sources.vault.login": "asks Vault whose a wrapping token is, before it is used",
}

# What a process that stays must not load: a worker has it, for as long as it is needed.
HEAVY = {
    *("dataclasses", "inspect"),
    *("httpx", "httpcore", "truststore", "keyring", "secretstorage", "cryptography", "click"),
    *("hvac", "requests", "boto3", "botocore"),
    *("subprocess", "logging", "ssl", "_ssl", "socket", "asyncio", "hashlib", "_hashlib"),
    *("secrets", "hmac", "threading", "tempfile", "ctypes", "http", "email", "importlib.metadata"),
}
# What it loads today beyond what its job needs; each is one import that could still go.
LOADED_NOW = {
    "urllib.parse": "an address's host and port",
    "re": "names, durations and the lines of keys",
}


def name_of(path: Path) -> str:
    """Return a module's name below the package: `sources.http`; the package itself is empty."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports(source: str, known: set[str]) -> Iterator[tuple[str, bool]]:
    """Yield each imported module, wherever the import stands, and whether it is one of ours."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            named = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "an import relative to its module hides where it leads"
            module = node.module or ""
            named = [module]
            if module.split(".")[0] == "keybroker":
                below = module.removeprefix("keybroker").removeprefix(".")
                full = {
                    alias.name: ".".join(filter(None, (below, alias.name))) for alias in node.names
                }
                named = [
                    f"keybroker.{full[a.name]}" if full[a.name] in known else module
                    for a in node.names
                ]
        else:
            continue
        for one in named:
            ours = one.split(".")[0] == "keybroker"
            yield (one.removeprefix("keybroker").removeprefix("."), True) if ours else (one, False)


def out_of_order(name: str, source: str) -> list[str]:
    """Return what a module imports that is not above it in the table."""
    order = list(TABLE)
    return [
        one
        for one, ours in imports(source, set(TABLE))
        if ours
        and one != name
        and (name, one) not in CHOICES
        and (one not in TABLE or order.index(one) > order.index(name))
    ]


def foreign(source: str) -> set[str]:
    """Return the libraries of others that a module imports."""
    tops = {one.split(".")[0] for one, ours in imports(source, set(TABLE)) if not ours}
    return tops - sys.stdlib_module_names - {"_sha2", "_sha256"}  # of one Python each


def test_the_table_names_every_module_and_no_other() -> None:
    """A new module gets a line where it belongs."""
    assert sorted(TABLE) == sorted(MODULES)


@pytest.mark.parametrize("name", TABLE)
def test_a_module_imports_only_from_above(name: str) -> None:
    """Imports inside functions and those for the type checker count too."""
    assert out_of_order(name, MODULES[name].read_text()) == []


def test_an_import_from_below_is_seen_wherever_it_stands() -> None:
    """The check of the table fails on each form that an import can have."""
    for line in (
        "import keybroker.broker",
        "from keybroker.broker import Broker",
        "from keybroker import broker",
        "def f():\n    from keybroker import broker",
        "if TYPE_CHECKING:\n    from keybroker.broker import Broker",
    ):
        assert out_of_order("errors", line) == ["broker"]
    assert out_of_order("errors", "from keybroker import nobody_knows_this") == []
    assert out_of_order("errors", "import keybroker.unlisted") == ["unlisted"]


def test_every_choice_is_made() -> None:
    """An exception from the order that nobody needs any more is taken out."""
    made = {
        (name, one)
        for name, path in MODULES.items()
        for one, ours in imports(path.read_text(), set(TABLE))
        if ours and (name, one) in CHOICES
    }
    assert made == CHOICES


def test_a_library_is_known_where_the_table_says() -> None:
    """One foreign library, one module."""
    assert {name: foreign(path.read_text()) for name, path in MODULES.items()} == TABLE


def test_only_the_worker_touches_sources() -> None:
    """The sources are imported by what may block, and by each other."""
    touching = {
        name
        for name, path in MODULES.items()
        if not name.startswith(("sources", "login"))
        and any(
            one.startswith("sources") for one, ours in imports(path.read_text(), set(TABLE)) if ours
        )
    }
    assert touching == {"worker", "rotation_lambda"}


def test_the_package_itself_imports_nothing() -> None:
    """`keybroker.__version__` costs nothing."""
    assert list(imports(MODULES[""].read_text(), set(TABLE))) == []


def loaded(module: str) -> set[str]:
    """Return what a fresh interpreter has loaded after one import."""
    done = subprocess.run(
        [sys.executable, "-I", "-c", f"import sys, {module}; print(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    )
    return set(done.stdout.split())


@pytest.mark.parametrize("module", ["keybroker.broker", "keybroker.rotation", "keybroker.pool"])
def test_what_stays_in_memory_is_light(module: str) -> None:
    """The broker's side of the pipe loads no client, no keyring, no cipher and no logging."""
    bare = {"keybroker"} & loaded("sys")  # an editable install may load things before us
    assert loaded(module) & HEAVY - bare == set()


def test_the_list_of_what_could_still_go_is_true() -> None:
    """What is listed as loaded today is, so that the list shrinks when the imports do."""
    assert set(LOADED_NOW) - loaded("keybroker.broker") == set()


def test_heavy_modules_are_seen() -> None:
    """The worker's own libraries are found by the same look."""
    assert {"httpx", "ssl", "subprocess"} - loaded("keybroker.sources.command") == set()


def test_rotation_knows_no_clock_and_no_disk() -> None:
    """The rule is a function of values: it calls nothing that reads the time, a file or chance."""
    for name in ("rotation", "slots"):
        source = MODULES[name].read_text()
        tops = {one.split(".")[0] for one, ours in imports(source, set(TABLE)) if not ours}
        assert tops <= {"collections", "datetime", "enum"}
        assert re.findall(r"\.now\(|\.today\(|\bopen\(", source) == []


def test_secrets_are_revealed_where_there_is_a_reason() -> None:
    """`grep 'reveal('` shows these modules, and no more."""
    calls = {
        name
        for name, path in MODULES.items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in ("reveal", "_text")
        if name != "credential"
    }
    assert calls == set(REVEALS)


def test_only_the_command_line_prints() -> None:
    """Nothing else writes for people; devgateway's own command says its address."""
    assert {
        name
        for name, path in MODULES.items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "print"
        if not name.startswith("cli.")
    } == set()


SHORT = 6  # lines; the name of a function this short says what it does


def undocumented(source: str) -> list[str]:
    """Return the module, the public classes and functions that say nothing about themselves."""
    tree = ast.parse(source)
    found = [] if ast.get_docstring(tree) else ["the module"]

    def look(body: list[ast.stmt], within: str) -> None:
        for node in body:
            if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
                continue
            name = f"{within}{node.name}"
            lines = (node.end_lineno or 0) - node.body[0].lineno + 1
            short = isinstance(node, ast.FunctionDef) and lines <= SHORT
            if ast.get_docstring(node) is None and not short:
                found.append(name)
            if isinstance(node, ast.ClassDef):
                look(node.body, f"{name}.")

    look(tree.body, "")
    return found


@pytest.mark.parametrize("name", TABLE)
def test_what_is_public_is_documented(name: str) -> None:
    """Every public module and class has a docstring, and every function but the shortest."""
    assert undocumented(MODULES[name].read_text()) == []


def test_the_look_for_docstrings_sees_their_absence() -> None:
    """A module, a class and a function that is not short."""
    body = "\n".join(f"    a{n} = 1" for n in range(SHORT + 1))
    assert undocumented(f"class A:\n    pass\ndef f():\n{body}") == ["the module", "A", "f"]


def test_nothing_is_left_to_do() -> None:
    """What is not done is in the list of what is missing, not in the source."""
    marks = re.compile("TO" + "DO|FIX" + "ME|X" + "XX")
    files = [
        path
        for folder in ("keybroker", "native", "tests", "benchmarks", "docs")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".md", ".sh", ".c")
    ]
    assert len(files) > 50
    assert [str(path) for path in files if marks.search(path.read_text())] == []


def listed() -> dict[str, str]:
    """Return the packages of docs/dependencies.md, with the line of each."""
    text = (ROOT / "docs" / "dependencies.md").read_text()
    rows = re.findall(r"^\| `([^`]+)` \|(.+)\|$", text, re.M)
    assert len(rows) == len(dict(rows)), "a package has one line"
    return dict(rows)


def test_every_dependency_is_justified() -> None:
    """docs/dependencies.md has a line for each package of pyproject.toml, and no other."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    asked = [
        *project["build-system"]["requires"],
        *project["project"]["dependencies"],
        *(one for group in project["dependency-groups"].values() for one in group),
    ]
    assert set(listed()) == {re.split(r"[<>=;~! ]", one)[0] for one in asked}


def test_docs_say_which_module_knows_a_library() -> None:
    """The column of docs/dependencies.md agrees with the table above."""
    known: dict[str, set[str]] = {}
    for name, libraries in TABLE.items():
        for library in libraries:
            place = "cli/" if library == "click" else name.replace(".", "/")
            known.setdefault(library, set()).add(place)
    rows = {name.partition("[")[0]: row for name, row in listed().items()}
    for library, places in known.items():
        assert set(re.findall(r"`([^`]+)`", rows[library].split("|")[0])) == places
