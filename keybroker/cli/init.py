"""init: from nothing to a working profile."""

import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import click

from keybroker import asking, wire
from keybroker.address import ANTHROPIC, OPTSCALE, Address, read_pasted
from keybroker.cli.base import coloured, in_words, print_json, progress
from keybroker.cli.connect import connect_profile
from keybroker.cli.draft import Draft, File
from keybroker.cli.keys import start_daemon
from keybroker.cli.questions import Asker, Pending, Questions, lists
from keybroker.cli.trial import Report, try_out
from keybroker.cli.work import daemon_socket, desk, owner, state
from keybroker.config import SOURCES, Config, Profile, origin
from keybroker.connect import organisation, tokens
from keybroker.connect.claude import committed_file
from keybroker.connect.plan import Place
from keybroker.credential import Reference, fingerprint
from keybroker.errors import (
    ConfigError,
    KeybrokerError,
    NobodyAnswers,
    NotReady,
    SourceDenied,
)
from keybroker.pool import Pool

SECONDS = 20.0
RELOAD_SECONDS = 5.0
KINDS = {
    "litellm": "keybroker mints short-lived ones with an admin key",
    "static": "you have one, or the gateway checks none",
    "command": "a program prints them",
    "vault": "they are kept in Vault or OpenBao, or made by it",
    "aws": "they are kept in AWS Secrets Manager",
}
SOURCES_OF = {"litellm": "litellm"}  # by the gateway's kind; else a key that somebody has
FLAGS = {  # of each source, beside those that all have
    "litellm": ("admin",),
    "static": ("key", "placeholder"),
    "command": ("command",),
    "vault": ("path", "field", "address", "auth"),
    "aws": ("secret", "field", "region", "aws_profile"),
}
TYPED = {  # what hints name of a configuration, as it is typed here
    'set key = "file" in a table [cache]': "--set cache.key=file",
    "source.admin": "--admin",
    "source.url": "--set source.url=URL",
    "user_id and team_id": "--set source.user_id=… and --set source.team_id=…",
    "{ file = … }": "--admin file:PATH",
}
ERRORS: dict[int, type[KeybrokerError]] = {
    69: NobodyAnswers,
    75: NotReady,
    77: SourceDenied,
    78: ConfigError,
}


@click.command("init")
@click.option("--base-url", metavar="URL", help="The gateway's address, as its documents have it.")
@click.option("--source", "kind", type=click.Choice(list(KINDS)), help="Where keys come from.")
@click.option("--profile", "name", default="work", show_default=True, help="The profile's name.")
@click.option("--admin", metavar="REF", help="litellm: where its admin key is; -: on stdin.")
@click.option("--key", metavar="REF", help="static: where the key is; -: on stdin.")
@click.option("--placeholder", metavar="WORD", help="static: a word, where no key is checked.")
@click.option("--command", metavar="PROGRAM", help="command: what prints a key.")
@click.option("--path", metavar="PATH", help="vault: secret/data/llm/key.")
@click.option("--field", metavar="NAME", help="vault, aws: the field that holds the key.")
@click.option("--address", metavar="URL", help="vault: the server.")
@click.option("--auth", metavar="METHOD", help="vault: how to log in.")
@click.option("--secret", metavar="NAME", help="aws: the name or ARN of the secret.")
@click.option("--region", metavar="REGION", help="aws: its region.")
@click.option("--aws-profile", metavar="NAME", help="aws: the profile of ~/.aws/config.")
@click.option("--adopt-token", is_flag=True, default=None, help="Move a key that was pasted.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Any other key.")
@click.option("--exact", is_flag=True, help="Take the address as it is.")
@click.option("--allow-http", is_flag=True, help="Let keys travel in clear.")
@click.option("--force", is_flag=True, help="Go on where the organisation has decided.")
@click.option("--no-check", is_flag=True, help="Ask no gateway and try no key.")
@click.option("--connect/--no-connect", default=None, help="Write Claude Code's settings, too.")
@click.option("--yes", is_flag=True, help="Agree to what would be asked.")
@click.option("--dry-run", is_flag=True, help="Print what would be added; change nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def init_command(**flags: Any) -> None:
    """Set up a profile: find the gateway, write the configuration, get a key.

    Asks for what no flag gives, on a terminal. Nothing is written before the new profile was seen
    to work. REF is keyring:NAME, file:PATH, env:NAME, command:PROGRAM, vault:PATH#FIELD or
    aws:NAME.

    \b
    keybroker init
    keybroker init --base-url https://llm.example.com --source litellm --admin env:ADMIN_KEY
    keybroker init --base-url http://localhost:11434 --source static --placeholder ollama
    """
    session = _Session(flags)
    try:
        session.run()
    finally:
        if flags["as_json"] and not flags["dry_run"]:
            print_json(session.facts)


@dataclass(slots=True)
class _Session:
    """One run of `init`."""

    flags: Mapping[str, Any]
    facts: dict[str, Any] = field(default_factory=dict)
    kept: list[Reference] = field(default_factory=list)  # what was put somewhere just now

    def run(self) -> None:
        flags = self.flags
        asker = Asker(flags["yes"])
        file = File.find(os.environ)
        file.refuse_known(flags["name"])
        self._organisation()
        if flags["base_url"] is not None:  # what is wrong with it comes first
            self._pasted(flags["base_url"], "--base-url")
        committed = committed_file(Place.here())  # others have that one too
        found = [one for one in tokens.tokens(os.environ, _folder()) if one.path != committed]
        adopted = self._adopted(asker, found)
        self._notes(found, adopted)
        gateway = asker.until_right(flags["base_url"], lambda given: self._gateway(asker, given))
        draft = Draft(flags["name"], vault_in_source=_vault_in_source(file, flags))
        questions = Questions(asker, draft, flags)
        self._fill(questions, file, gateway, adopted)
        problem = self._keyring(asker, file, draft)
        config = file.checked(draft.text(), os.environ)  # before anything is kept
        if flags["dry_run"]:
            for pending in questions.pending if problem else ():
                draft.put(pending.path, {"file": str(_free(file.path.parent, pending.name))})
            for one in found:
                if adopted is not None and one.secret == adopted.secret and one.alone:
                    self._say("would", f"take {one.variable} out of {one.place}, for good")
            sys.stdout.write(draft.text())
            return
        if not flags["no_check"]:
            daemon_socket()  # one with another configuration is found out now
        try:
            for pending in questions.pending:
                self._keep(draft, pending, file.path.parent if problem else None)
            config = file.checked(draft.text(), os.environ)
            profile = config.profiles[draft.profile]
            if not flags["no_check"]:
                self._check(config, profile)
            file.write(draft.text())
        except BaseException:
            self._take_back()
            raise
        self.facts.update(profile=draft.profile, file=str(file.path), added=draft.text())
        self._say("written", f"[profiles.{draft.profile}] in {_short(file.path)}")
        for text in profile.warnings:
            self._say("warning", text)
        if not flags["no_check"]:
            self._first_key(config, profile)
            self._out_of_their_files(found, adopted)
        self._next(asker, profile.name)

    # Before

    def _organisation(self) -> None:
        findings = organisation.organisation(environment=os.environ)
        self.facts["organisation"] = [
            {"place": one.place, "keys": dict(one.keys), "binding": list(one.binding)}
            for one in findings
        ]
        for one in findings:
            self._say("managed", str(one))
        if not self.flags["force"]:
            organisation.refuse(findings, "init")

    def _adopted(self, asker: Asker, found: list[tokens.Found]) -> tokens.Found | None:
        """Return the pasted key that becomes the profile's, if one does."""
        fits = [one for one in found if one.variable == tokens.TOKEN and one.secret is not None]
        wanted, kind = self.flags["adopt_token"], self.flags["kind"]
        other = [n for n in ("key", "placeholder") if self.flags[n] is not None]
        if wanted and not fits:
            raise ConfigError(
                "--adopt-token: no settings file and no shell profile has an ANTHROPIC_AUTH_TOKEN "
                "that could be moved",
                hint="leave it out; the key is asked for, or given with --key",
            )
        if wanted and (kind not in (None, "static") or other):
            raise click.UsageError("--adopt-token is for --source static, and is its key")
        if not fits or (kind is not None and kind != "static") or other or wanted is False:
            return None
        if wanted is None:
            question = (
                f"{fits[0]}\nMove it out of there, and have keybroker hand it out? It stays a "
                "fixed key; no goes on to keys that are made, or kept elsewhere"
            )
            wanted = asker.can and asker.agrees(question)
        if wanted and self.flags["no_check"]:
            raise click.UsageError("a key is moved only once it was seen to work: no --no-check")
        return fits[0] if wanted else None

    def _notes(self, found: list[tokens.Found], adopted: tokens.Found | None) -> None:
        self.facts["tokens"] = [
            {"place": one.place, "variable": one.variable, "adopted": one is adopted}
            for one in found
        ]
        for one in found:
            if one is not adopted:
                self._say("note", f"{one}: Claude Code prefers it to keybroker's")
        if os.environ.get(tokens.TOKEN):
            self._say("note", f"{tokens.TOKEN} is set in this shell: Claude Code prefers it")

    def _gateway(self, asker: Asker, given: str | None) -> dict[str, Any]:
        """Find out which address it is, and ask it what it is."""
        text = asker.text(
            given, "--base-url", "Address of the gateway", tokens.base_url(os.environ) or None
        )
        exact = self.flags["exact"]
        meant = self._pasted(text, "type" if given is None else "--base-url")
        if self.flags["no_check"]:
            return _guess(meant)
        with progress(f"asking {urlsplit(meant.root).netloc}"), _pool() as pool:
            found = dict(
                pool.call(
                    "init",
                    "recognise",
                    SECONDS,
                    candidates=list(meant.candidates),
                    root=meant.root,
                    ca=self._ca(),
                    asked=exact,
                )
            )
        found["root"] = meant.root
        self.facts["gateway"] = found
        checks = {True: ", which checks keys", False: ", which checks no key"}
        self._say("gateway", f"{found['name']}{checks.get(found['checks_keys'], '')}")
        was = "" if found["base_url"] == meant.given else f", for what was {meant.given}"
        self._say("address", f"{found['base_url']}{was}")
        return found

    def _pasted(self, text: str, flag: str) -> Address:
        allow_http, exact = self.flags["allow_http"], self.flags["exact"]
        return read_pasted(text, allow_http=allow_http, exact=exact, flag=flag)

    def _ca(self) -> str | None:
        for text in self.flags["settings"]:
            if text.startswith("ca="):
                return str(text.removeprefix("ca="))
        return None

    def _fill(
        self,
        questions: Questions,
        file: File,
        gateway: Mapping[str, Any],
        adopted: tokens.Found | None,
    ) -> None:
        """Put into the draft what flags and answers say."""
        draft, flags = questions.draft, self.flags
        base_url, root = gateway["base_url"], gateway["root"]
        draft.put((*draft.own, "base_url"), base_url)
        openai = gateway["openai_base_url"]
        if openai is not None and openai != f"{base_url}/v1":
            draft.put((*draft.own, "openai_base_url"), openai)
        kind = self._kind(questions.asker, gateway, adopted)
        draft.source("type", kind)
        if kind == "litellm" and root != origin(base_url):
            draft.source("url", root)
        if kind == "vault":  # first, since `--set` may say the rest of it
            known = "vault" in file.document.tables
            for text in flags["settings"]:
                if re.match(r"vault\.(address|auth\.method)\s*=", text):
                    draft.assign(text)
            questions.vault(known=known)
        for text in flags["settings"]:
            draft.assign(text)
        if adopted is not None:
            assert adopted.secret is not None, "only one with a value is adopted"
            path = (*draft.own, "source", "key")
            questions.keep(path, f"{draft.profile}-key", adopted.secret, "--adopt-token")
        elif kind == "litellm":
            questions.litellm()
        elif kind == "static" and draft.get((*draft.own, "source", "placeholder")) is None:
            word = gateway["kind"] if gateway["kind"] != "unknown" else "none"
            questions.static(keys_are_checked=gateway["checks_keys"], word=word)
        elif kind == "command":
            questions.command()
        elif kind == "aws":
            account = file.document.tables.get("aws", {})
            region = account.get("region") or draft.get(("aws", "region"))
            questions.aws(region=region or os.environ.get("AWS_REGION"))
        if draft.get((*draft.vault, "auth")) is not None:
            questions.vault_login()
        file.refuse_tables(draft)

    def _kind(self, asker: Asker, gateway: Mapping[str, Any], adopted: tokens.Found | None) -> str:
        likely = SOURCES_OF.get(gateway["kind"], "static")
        if adopted is not None:
            return "static"
        given = self.flags["kind"]
        if given is None and asker.can:
            click.echo("Where do keys come from?", err=True)
            for word, what in KINDS.items():
                click.echo(f"  {word:<8} {what}", err=True)
        kind = asker.choice(given, "--source", "Source", list(KINDS), likely if asker.can else None)
        assert kind in SOURCES
        mine = FLAGS[kind]
        every = {name for names in FLAGS.values() for name in names}
        other = {n: self.flags[n] for n in every if n not in mine}
        for flag in sorted(lists(other)):
            raise click.UsageError(f"{flag} is not for --source {kind}")
        return kind

    def _keyring(self, asker: Asker, file: File, draft: Draft) -> str:
        """See whether a keyring works; without one, have a file seal the cache if that is open."""
        with _pool() as pool:
            problem = str(pool.call("cache", "keyring", SECONDS)["problem"] or "")
        source = draft.get((*draft.own, "source"))
        keeps = "placeholder" not in source and not os.environ.get("CREDENTIALS_DIRECTORY")
        is_open = "cache" not in file.document.tables and draft.get(("cache", "key")) is None
        if not problem or not is_open or not keeps:
            return problem
        said = problem.removeprefix("keyring: ")
        question = f"No keyring works ({said}). May a file that only you can read seal keys?"
        if not asker.agrees(question, otherwise=True):
            raise ConfigError(
                "init: nothing here could keep a key",
                hint="start a keyring, or say --set cache.key=memory: each start costs another key",
            )
        draft.put(("cache", "key"), "file")
        self._say("keyring", f'{said}: a file of mode 0600 seals keys, cache.key = "file"')
        return problem

    # The new profile

    def _keep(self, draft: Draft, pending: Pending, folder: Path | None) -> None:
        """Put a secret where its reference will find it."""
        with _pool() as pool:
            found = pool.call(
                "cache",
                "entrust",
                SECONDS,
                name=pending.name,
                secret=pending.secret,
                folder=None if folder is None else str(folder),
            )
        kept = Reference(found["kind"], found["value"])
        if found["new"]:
            self.kept.append(kept)
        draft.put(pending.path, {kept.kind: kept.value})
        self._say("kept", f"key {pending.secret.fingerprint} as {kept}")

    def _take_back(self) -> None:
        """Leave nothing behind: what was kept for a profile that was not written."""
        with suppress(KeybrokerError), _pool() as pool:
            for one in self.kept:
                pool.call("cache", "withdraw", SECONDS, kind=one.kind, value=one.value)

    def _check(self, config: Config, profile: Profile) -> None:
        """Try the profile as `source test` does; nothing of it is written yet."""
        report = Report(self._quiet)
        self.facts["steps"] = report.rows
        try:
            with owner() as lock, desk(config, lock=lock, only=profile) as at:
                try_out(at, profile, report)
        except KeybrokerError as error:
            error.hint = error.hint and _typed(error.hint)
            error.message = f"{error.message}; nothing was written"
            error.args = (error.message,)
            if any(str(one) in (error.hint or "") for one in self.kept):
                error.hint = "give another key; this one was kept nowhere"
            raise

    def _first_key(self, config: Config, profile: Profile) -> None:
        """Have the daemon get a key, and show it by its fingerprint."""
        try:
            with progress("getting a key"):
                socket = daemon_socket()
                if socket is None:
                    socket = start_daemon(config)
                else:
                    wire.control(socket, "reload", RELOAD_SECONDS)
                request = asking.request(profile.name.encode(), dict(os.environb))
                status, text = asking.read_reply(wire.ask(socket, request)) or (69, "")
            if status != 0:
                said = text.removeprefix("keybroker: ")
                raise ERRORS.get(status, NobodyAnswers)(said or "the daemon did not answer")
            row = _row(socket, profile.name)
        except KeybrokerError as error:
            raise type(error)(
                f"init: the profile works and is written; there is no key yet: {error.message}",
                hint=f"keybroker get {profile.name}; it tries again",
            ) from None
        key = fingerprint(text)
        ends = row.get("expires_at")
        verified = row.get("verified")
        self.facts["key"] = {"fingerprint": key, "expires_at": ends, "verified": verified}
        line = f"{key}, verified by {verified}" if verified else f"{key}, not verified"
        if ends:
            left = datetime.fromisoformat(ends) - datetime.now().astimezone()
            line += f", ends in {in_words(max(left, timedelta()))}"
        self._say("key", line)

    # After

    def _out_of_their_files(self, found: list[tokens.Found], adopted: tokens.Found | None) -> None:
        """Take a key out of where it was pasted, now that it is kept and was handed out."""
        if adopted is None or adopted.secret is None:
            return
        if self.facts["key"]["fingerprint"] != adopted.secret.fingerprint:
            raise NotReady(
                "init: the daemon handed out another key; the one that was pasted is where it was",
                hint="keybroker status",
            )
        moved: list[str] = []
        self.facts["moved"] = moved
        for one in found:
            if one.secret != adopted.secret:
                continue
            try:
                tokens.take_out(one)
            except ConfigError as error:
                self._say("note", f"{error.message}; {error.hint}")
                continue
            moved.append(one.place)
            self._say("moved", f"{one.variable} out of {one.place}")
        if os.environ.get(tokens.TOKEN):
            self._say("note", f"this shell still has it: unset {tokens.TOKEN}")

    def _next(self, asker: Asker, name: str) -> None:
        """Offer what comes next: Claude Code's settings."""
        command = f"keybroker connect --profile {name}"
        self.facts.update(connected=False, next=command)
        wanted = self.flags["connect"]
        if not asker.agrees("Connect Claude Code to it, in your settings.json?", wanted):
            self._say("next", command)
            return
        try:
            # what it says is for people: not for who reads our JSON
            with redirect_stdout(sys.stderr if self.flags["as_json"] else sys.stdout):
                connect_profile(name, force=self.flags["force"])
        except KeybrokerError as error:
            raise type(error)(
                f"init: the profile is written and works; {error.message}",
                hint=error.hint or command,
            ) from None
        self.facts.update(connected=True, next=None)

    def _say(self, word: str, text: str) -> None:
        if self.flags["as_json"]:
            return
        out = sys.stderr if self.flags["dry_run"] else sys.stdout
        shown = coloured(f"{word:<9}", "yellow") if word in ("note", "warning") else f"{word:<9}"
        print(f"{shown} {text}", file=out)

    @property
    def _quiet(self) -> bool:
        return bool(self.flags["as_json"] or self.flags["dry_run"])


@contextmanager
def _pool() -> Iterator[Pool]:
    pool = Pool(state(), os.environ, None)
    try:
        yield pool
    finally:
        pool.close()


def _guess(meant: Address) -> dict[str, Any]:
    """Say what an address is without asking it."""
    below = OPTSCALE.search(urlsplit(meant.root).path) is not None
    exact = meant.candidates == (meant.given,)
    url = meant.given if exact else meant.root + (ANTHROPIC if below else "")
    return {
        "kind": "optscale" if below else "unknown",
        "base_url": url,
        "openai_base_url": meant.openai if below else None,
        "checks_keys": None,
        "root": meant.root,
    }


def _typed(hint: str) -> str:
    """Name flags where a hint names what stands in a configuration: there is none yet."""
    for key, flag in TYPED.items():
        hint = hint.replace(key, flag)
    return hint


def _free(folder: Path, name: str) -> Path:
    """Return the file that a secret would be kept in, as `entrust` finds it."""
    names = (name, *(f"{name}-{number}" for number in range(2, 10)))
    return next((folder / one for one in names if not (folder / one).exists()), folder / name)


def _vault_in_source(file: File, flags: Mapping[str, Any]) -> bool:
    given = flags["address"] or flags["auth"]
    settings = any(text.startswith("vault.") for text in flags["settings"])
    return "vault" in file.document.tables and bool(given or settings)


def _row(socket: Path, profile: str) -> Mapping[str, Any]:
    rows = wire.control(socket, "status", RELOAD_SECONDS)["profiles"]
    return next((row for row in rows if row["profile"] == profile), {})


def _folder() -> Path | None:
    with suppress(OSError):
        return Path.cwd()
    return None


def _short(path: Path) -> str:
    home = os.environ.get("HOME", "")
    text = str(path)
    return f"~{text[len(home) :]}" if home and text.startswith(f"{home}/") else text
