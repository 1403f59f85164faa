"""What `init` has to know: taken from flags, and asked for on a terminal where one is missing."""

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import click

from keybroker.cli.draft import Draft, reference, reference_or_none
from keybroker.credential import Secret
from keybroker.errors import ConfigError, KeybrokerError
from keybroker.fields import LOCAL_REFERENCE, REFERENCE, TEXT_OR_REFERENCE
from keybroker.vault import AUTH

T = TypeVar("T")
MOST_TRIES = 5  # of one question
MOST_SHOWN = 5  # choices that were listed before the question
PLACES = "keyring:NAME, file:PATH, env:NAME, command:PROGRAM"
LONGEST_LINE = 1 << 16
_VAULT_ADDRESSES = ("BAO_ADDR", "VAULT_ADDR")


@dataclass(slots=True)
class Asker:
    """
    Asks on a terminal for what no flag gave; what it asks goes to stderr.

    Attributes:
        yes: Whatever could be said no to is agreed to.
    """

    yes: bool = False
    can: bool = field(default_factory=lambda: sys.stdin.isatty() and sys.stderr.isatty())

    def text(self, given: str | None, flag: str, question: str, default: str | None = None) -> str:
        """
        Return what was given, else what is typed.

        Raises:
            click.UsageError: Nobody can be asked; the flag is named.
        """
        if given is not None:
            return given
        if self.can:
            answer: str = click.prompt(question, default=default, err=True)
            return answer
        if default is not None:
            return default
        raise click.UsageError(f"{flag} is missing, and there is no terminal to ask at")

    def optional(self, given: str | None, question: str) -> str | None:
        """Return what was given, else what is typed, else nothing."""
        if given is not None or not self.can:
            return given
        return click.prompt(question, default="", show_default=False, err=True) or None

    def choice(
        self, given: str | None, flag: str, question: str, words: Sequence[str], default: str | None
    ) -> str:
        """Return one of some words."""
        if given is not None:
            return given
        if not self.can:
            if default is None:
                missing = f"{flag} is missing, and there is no terminal to ask at"
                raise click.UsageError(f"{missing}; one of {', '.join(words)}")
            return default
        answer: str = click.prompt(
            question,
            type=click.Choice(list(words)),
            default=default,
            show_choices=len(words) > MOST_SHOWN,
            err=True,
        )
        return answer

    def agrees(self, question: str, given: bool | None = None, *, otherwise: bool = False) -> bool:
        """Return whether something may be done; `otherwise` where nobody can be asked."""
        if given is not None:
            return given
        if self.yes:
            return True
        return click.confirm(question, default=True, err=True) if self.can else otherwise

    def until_right(self, given: str | None, ask: Callable[[str | None], T]) -> T:
        """Ask again on a terminal as long as the answer is wrong; what a flag gave is an error."""
        for _ in range(MOST_TRIES - 1):
            try:
                return ask(given)
            except KeybrokerError as error:
                if given is not None or not self.can:
                    raise
                print(f"  {error.message}", file=sys.stderr)
                if error.hint:
                    print(f"  hint: {error.hint}", file=sys.stderr)
        return ask(given)


@dataclass(slots=True)
class Pending:
    """A secret that somebody typed, and where its reference goes once it is kept."""

    path: tuple[str, ...]
    name: str
    secret: Secret


@dataclass(slots=True)
class Questions:
    """Fills a draft for one source; secrets that were typed wait in `pending`."""

    asker: Asker
    draft: Draft
    flags: Mapping[str, Any]
    pending: list[Pending] = field(default_factory=list)
    _stdin_is_read: bool = False

    def litellm(self) -> None:
        """Where the admin key is, unless somebody signs in for it."""
        if self.draft.get((*self.draft.own, "source", "login")) is not None:
            return
        path = (*self.draft.own, "source", "admin")
        self._secret(path, "--admin", f"{self.draft.profile}-admin", "Admin key of the gateway")

    def static(self, *, keys_are_checked: bool | None, word: str) -> None:
        """A key that somebody has, or a word in its place."""
        placeholder = self.flags["placeholder"]
        if placeholder is None and self.flags["key"] is None and keys_are_checked is False:
            question = "The gateway checks no key. A word in its place"
            placeholder = self.asker.text(None, "--placeholder", question, word)
        if placeholder is not None:
            self.draft.source("placeholder", placeholder)
            return
        path = (*self.draft.own, "source", "key")
        self._secret(path, "--key", f"{self.draft.profile}-key", "The key")

    def command(self) -> None:
        """A program that prints keys."""
        question = "The program that prints a key, with its arguments"
        text = self.asker.text(self.flags["command"], "--command", question)
        found = reference_or_none(f"command:{text}")
        if found is None or not found["command"]:
            raise ConfigError("--command: expected a program and its arguments")
        self.draft.source("command", found["command"])

    def vault(self, *, known: bool) -> None:
        """Where in Vault, which one, and how to log in; `known`: a [vault] says the last two."""
        question = "Path as the API has it, such as secret/data/llm/key"
        self.draft.source("path", self.asker.text(self.flags["path"], "--path", question))
        name = self.asker.text(self.flags["field"], "--field", "Field that holds the key", "key")
        if name != "key":
            self.draft.source("field", name)
        address, method = self.flags["address"], self.flags["auth"]
        if known and address is None and method is None:
            return
        there = next((os.environ[n] for n in _VAULT_ADDRESSES if os.environ.get(n)), None)
        if self.draft.get((*self.draft.vault, "address")) is None and (address or there is None):
            address = self.asker.text(address, "--address", "Address of Vault or OpenBao")
            self.draft.put((*self.draft.vault, "address"), address)
        auth = (*self.draft.vault, "auth")
        if method is None:
            method = self.draft.get((*auth, "method"))
        method = self.asker.choice(method, "--auth", "How to log in there", list(AUTH), None)
        self.draft.put((*auth, "method"), method)

    def vault_login(self) -> None:
        """What the way to log in needs, once `--set` had its say."""
        auth = (*self.draft.vault, "auth")
        method = self.draft.get((*auth, "method"))
        for name, one in AUTH.get(str(method), {}).items():
            if not one.required or self.draft.get((*auth, name)) is not None:
                continue
            flag = f"--set vault.auth.{name}=…"
            if one.kind in (REFERENCE, LOCAL_REFERENCE):
                self._secret((*auth, name), flag, f"{self.draft.profile}-{name}", one.doc)
                continue
            text = self.asker.text(None, flag, one.doc.rstrip("."))
            found = reference_or_none(text) if one.kind is TEXT_OR_REFERENCE else None
            self.draft.put((*auth, name), found or text)

    def aws(self, *, region: str | None) -> None:
        """Which secret; where it is and who asks, only if AWS's own files do not say so."""
        question = "Name or ARN of the secret"
        secret = self.asker.text(self.flags["secret"], "--secret", question)
        self.draft.source("secret", secret)
        question = "Field of its JSON, such as /key (empty: the whole text is the key)"
        if name := self.asker.optional(self.flags["field"], question):
            self.draft.source("field", name)
        for flag, key in (("region", "region"), ("aws_profile", "profile")):
            given = self.flags[flag]
            if flag == "region" and given is None and region is None and "arn:" not in secret:
                given = self.asker.optional(None, "Region (empty: as ~/.aws/config has it)")
            if given:
                self.draft.source(key, given)

    def _secret(self, path: tuple[str, ...], flag: str, name: str, question: str) -> None:
        """Take a reference, or the secret itself from stdin or without echo."""
        if self.draft.get(path) is not None:
            return  # by `--set`
        option = flag.removeprefix("--")
        given = self.flags.get(option) if option.isidentifier() else None
        if given is not None and given != "-":
            self.draft.put(path, reference(given, flag))
            return
        if given is None and not self.asker.can:
            missing = f"{flag} is missing, and there is no terminal to ask at"
            raise click.UsageError(f"{missing}; it takes {PLACES}, or - for stdin")
        ask = f"{question.rstrip('.')} (not shown; or {PLACES}, …)"
        typed = (
            self._line(flag) if not self.asker.can else click.prompt(ask, hide_input=True, err=True)
        )
        found = reference_or_none(typed.strip()) if given is None else None
        if found is not None:
            self.draft.put(path, found)
            return
        self.keep(path, name, typed, flag)

    def keep(self, path: tuple[str, ...], name: str, text: str | Secret, flag: str) -> None:
        """Have a secret kept later; until then its reference is a guess."""
        if isinstance(text, str):
            try:
                text = Secret(text.strip())
            except ValueError as error:
                raise ConfigError(f"{flag}: what was read is {error}") from None
        self.pending.append(Pending(path, name, text))
        self.draft.put(path, {"keyring": name})

    def _line(self, flag: str) -> str:
        if self._stdin_is_read:
            raise click.UsageError(f"{flag} -: stdin has one secret, and it is taken already")
        self._stdin_is_read = True
        return sys.stdin.readline(LONGEST_LINE)


def lists(flags: Mapping[str, Any]) -> Iterator[str]:
    """Yield the flags that were given, as they are typed."""
    for name, value in flags.items():
        if value is not None:
            yield f"--{name.replace('_', '-')}"
