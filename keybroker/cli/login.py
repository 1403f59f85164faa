"""login, logout, whoami: a person signs in, once."""

import os
import select
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import closing
from datetime import UTC, datetime
from typing import Any

import click

from keybroker import signin, vault, wire
from keybroker.cli.base import in_words, logins, on_the_clock, print_json, progress
from keybroker.cli.keys import end_keys, raise_what_is_left
from keybroker.cli.sign_ins import described, row
from keybroker.cli.work import configuration, daemon_socket, state
from keybroker.config import Config
from keybroker.credential import Secret
from keybroker.errors import (
    CANNOT_KEEP,
    CacheError,
    CacheLocked,
    ConfigError,
    KeybrokerError,
    LoginNeeded,
    SourceError,
    SourceInvalid,
)
from keybroker.logins import Logins, name_of
from keybroker.pool import Pool, variables
from keybroker.signin import SignIn, Standing, needed_by

BEGIN_SECONDS = 60.0
STEP_SECONDS = 60.0
WAIT_SECONDS = 0.5
SIGN_SECONDS = 25.0
BROWSER, DEVICE = "browser", "device"
LONGEST_PASTE = 16_384
CONTAINERS = ("/.dockerenv", "/run/.containerenv")

JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.command("login")
@click.argument("login", required=False, shell_complete=logins)
@click.option("--device", is_flag=True, help="With a code that is typed on any device.")
@click.option("--browser", is_flag=True, help="With the browser of this machine.")
@click.option(
    "--no-browser", is_flag=True, help="Print the address, and take the one that it ends at."
)
@JSON
def login_command(
    login: str | None, device: bool, browser: bool, no_browser: bool, as_json: bool
) -> None:
    """Sign in to LOGIN, a [logins.NAME] table; with one table it need not be named.

    A browser is opened where there is one; over SSH, in a container or without a display it is
    a code that you type on any device. Nobody but this command ever opens a window.
    """
    if device + browser + no_browser > 1:
        raise click.UsageError("choose one of --device, --browser and --no-browser")
    config = configuration()
    sign_in = chosen(config, login)
    ways, by_hand = _ways(device=device, browser=browser, no_browser=no_browser)
    with closing(_Desk(config, sign_in)) as at:
        if sign_in.unattended:
            standing = signin.decode_standing(at.sign("try")["standing"])
        else:
            standing = at.sign_in(ways, by_hand=by_hand)
    if as_json:
        print_json(row(sign_in, standing))
        return
    if sign_in.unattended:
        print(f"Nobody has to sign in to {sign_in.name}: this machine does by itself.")
        print(f"It works{_as(standing)}.{_token(standing)}")
        return
    print(f"Signed in to {sign_in.name}{_as(standing)}.{_until(standing)}")


@click.command("logout")
@click.argument("login", required=False, shell_complete=logins)
@click.option("--force", is_flag=True, help="Sign out though keys could not be revoked.")
@JSON
def logout_command(login: str | None, force: bool, as_json: bool) -> None:
    """Sign out of LOGIN: end the keys that were had with it, then the sign-in at the provider.

    Keys come first, since only the sign-in can revoke them. Where they are published for others,
    who would be refused from then on, nothing is done without --force.
    """
    config = configuration()
    sign_in = chosen(config, login)
    standing = signin.standing_of(state(), sign_in)
    left_over = standing is None and sign_in.is_sealed
    left_over = left_over and signin.file_of(state(), sign_in.name).exists()
    if left_over and not force:
        raise ConfigError(
            f"login {sign_in.name}: somebody signed in by another table, which alone can end that",
            hint=f"put that table back, or forget it here: {_by_force(sign_in)}",
        )
    with closing(_Desk(config, sign_in)) as at:
        revoked, left = 0, 0
        found: Mapping[str, Any] = {"told": False}
        if left_over:
            at.sign("forget")
        elif standing is not None or sign_in.unattended:
            mine = [p for p in config.profiles.values() if sign_in in p.logins and p.kind.ours]
            published = [str(p.publish.issuer) for p in mine if p.publish is not None]
            if published and not force:
                raise ConfigError(
                    f"login {sign_in.name}: its keys are published at {', '.join(published)}, and "
                    "who reads them there would be refused",
                    hint=_all_the_same(sign_in),
                )
            try:
                at.sign("leave")
            except CacheError:  # what cannot be opened can still be removed
                if not force:
                    raise
            if mine:
                results = end_keys(config, [profile.name for profile in mine])
                revoked = sum(result["revoked"] for result in results)
                left = sum(result["left"] + result["unsettled"] for result in results)
                if not force:
                    _all_gone(results, sign_in)
            try:
                found = at.sign("end" if not force else "forget")
            except SourceError as error:
                error.hint = _all_the_same(sign_in)
                raise
    told = bool(found["told"])
    if as_json:
        print_json({"login": sign_in.name, "told": told, "revoked": revoked, "left": left})
        return
    if standing is None and not sign_in.unattended and not left_over:
        print(f"Nobody was signed in to {sign_in.name}.")
        return
    keys = f" {revoked} key{'' if revoked == 1 else 's'} revoked." if revoked else ""
    print(f"Signed out of {sign_in.name}.{keys}")
    if left:
        print(f"Not known to be revoked: {left}. They end by themselves, see keybroker status.")
    if sign_in.unattended:
        print("This machine signs in again by itself when a key is asked for.")
    for text in found.get("left", ()):  # of a Vault's token
        print(f"Not ended: {text}")
    if not told:
        print(_left(sign_in))


@click.command("whoami")
@click.argument("login", required=False, shell_complete=logins)
@JSON
def whoami_command(login: str | None, as_json: bool) -> None:
    """Show who is signed in where, and until when. Asks nobody.

    Exit status: 0; 77 where nobody is signed in to LOGIN, or to any.
    """
    config = configuration()
    sign_ins = [chosen(config, login)] if login or len(config.logins) == 1 else None
    if sign_ins is None:
        if not config.logins:
            chosen(config, None)  # says what to write
        sign_ins = list(config.logins.values())
    found = [(one, signin.standing_of(state(), one)) for one in sign_ins]
    now = datetime.now(UTC)
    there = [
        one
        for one, standing in found
        if one.unattended or (standing is not None and not standing.over(now))
    ]
    if as_json:
        print_json([row(one, standing) for one, standing in found])
    else:
        for one, standing in found:
            print(f"{one.name}: {described(one, standing, now)}")
    if not there:
        name = sign_ins[0].name
        raise LoginNeeded(f"login {name}: nobody is signed in", hint=f"run: keybroker login {name}")


def chosen(config: Config, name: str | None) -> SignIn:
    """
    Return the login that is meant.

    Raises:
        ConfigError: There is none, or several and none was named.
    """
    if name is not None:
        return signin.one_named(name, config.logins)
    if len(config.logins) == 1:
        return next(iter(config.logins.values()))
    if not config.logins:
        raise ConfigError(
            "config: there is no [logins.NAME] table", hint="see docs/login.md for what to write"
        )
    raise ConfigError(
        "config: several logins, and none was named", hint=f"name one: {', '.join(config.logins)}"
    )


def _token(standing: Standing) -> str:
    ends = standing.access_ends
    if ends is None:
        return ""
    return f" The token ends {on_the_clock(ends)} ({in_words(ends - datetime.now(UTC))})."


def _as(standing: Standing) -> str:
    return f" as {standing.who}" if standing.who else ""


def _left(sign_in: SignIn) -> str:
    """Say what became of what a provider gave that was not told."""
    if sign_in.type == "openrouter":
        where = f"{sign_in.settings['url']}/settings/keys"
        return (
            f"The key lives on at OpenRouter, without an end: delete it at {where}, "
            f"where it is called keybroker {sign_in.name}."
        )
    return "The provider was not told: what it gave ends by itself."


def _until(standing: Standing) -> str:
    until = standing.lasts_until
    if until is None:
        return " It is renewed by itself." if standing.renewable else ""
    return f" It lasts until {on_the_clock(until)} ({in_words(until - datetime.now(UTC))})."


def _all_gone(results: list[dict[str, Any]], sign_in: SignIn) -> None:
    try:
        raise_what_is_left(results)
    except KeybrokerError as error:
        error.hint = _all_the_same(sign_in)
        raise


def _all_the_same(sign_in: SignIn) -> str:
    return f"sign out all the same: {_by_force(sign_in)}"


def _by_force(sign_in: SignIn) -> str:
    return f"keybroker logout --force {sign_in.name}"


def _ways(*, device: bool, browser: bool, no_browser: bool) -> tuple[list[str], bool]:
    """Return the ways that would do, the best one first, and whether a person opens the page."""
    if device:
        return [DEVICE], False
    if browser or no_browser:
        return [BROWSER], no_browser
    if _has_browser(os.environ):
        return [BROWSER, DEVICE], False
    return [DEVICE, BROWSER], True


def _has_browser(environment: Mapping[str, str]) -> bool:
    """Say whether a window that is opened here would be seen by whoever types."""
    if environment.get("BROWSER"):  # somebody says so; of an editor that forwards ports as well
        return True
    if environment.get("SSH_CONNECTION") or environment.get("SSH_TTY"):
        return False
    if environment.get("container") or any(map(os.path.exists, CONTAINERS)):
        return False
    if sys.platform != "linux":
        return True
    return bool(environment.get("DISPLAY") or environment.get("WAYLAND_DISPLAY"))


class _Desk:
    """A worker of our own for the sign-in, and whoever can keep what it gives."""

    def __init__(self, config: Config, sign_in: SignIn) -> None:
        self._config = config
        self._sign_in = sign_in
        self._state = state()
        self._pool = Pool(self._state, os.environ, None, variables(config))
        # as long as we live: Ctrl-C would be lost in the end of what stands for it
        self._browser: subprocess.Popen[bytes] | None = None

    @property
    def _seconds(self) -> float:
        return SIGN_SECONDS + self._sign_in.seconds

    def close(self) -> None:
        self._pool.close(at_once=True)

    def sign_in(self, ways: list[str], *, by_hand: bool) -> Standing:
        """Have a person sign in; return how it stands."""
        from keybroker.login.tokens import alone

        problem = "login: another `keybroker login` is under way"
        with alone(self._state, "_signing.lock", problem, 0.0):
            self.sign("check")  # nobody signs in for what cannot be kept
            found = self._call("sign_in", BEGIN_SECONDS, login=self._sign_in.text, ways=ways)
            self._tell(found, by_hand=by_hand)
            done = self._wait(paste=by_hand and found["way"] == BROWSER)
            self.sign("keep", done["key"])
        return signin.decode_standing(done["standing"])

    def sign(self, stage: str, key: str | None = None) -> Mapping[str, Any]:
        """Have the daemon keep or end a sign-in; without one, it is done here."""
        socket = daemon_socket()
        if socket is not None:
            found: Mapping[str, Any] = wire.control(
                socket, "sign", self._seconds, login=self._sign_in.name, stage=stage, key=key
            )
            return found
        opened = self._call("unlock", SIGN_SECONDS, kind=self._config.cache_key)
        if opened["key"] is None and self._sign_in.is_sealed and stage != "forget":
            raise CacheLocked(
                f"login {self._sign_in.name}: a sign-in can be kept nowhere: {opened['origin']}",
                hint=CANNOT_KEEP,
            )
        found = self._call(
            "sign",
            self._seconds,
            login=self._sign_in.text,
            stage=stage,
            key=key,
            unseals=opened["key"],
        )
        if stage in ("end", "forget") and opened["key"] is not None:
            found = {**found, "left": list(self._end_sessions(stage, Secret(opened["key"])))}
        if stage not in ("check", "keep"):
            for name, profile in self._config.profiles.items():
                if self._sign_in in profile.logins and not profile.kind.ours:  # the token itself
                    self._call("forget", SIGN_SECONDS, profile=name)
        return found

    def _end_sessions(self, stage: str, key: Secret) -> Iterator[str]:
        """End the sessions that were begun with it; yield what could not be done."""
        issuers = [one for profile in self._config.profiles.values() for one in profile.asked]
        for issuer in issuers:
            begins = issuer.vault and vault.logs_in(issuer.vault)  # else it is the sign-in's own
            if not begins or self._sign_in not in needed_by(issuer):
                continue
            named = {"session_key": name_of(issuer), "wrap_key": key}
            held = Logins(self._pool.ask("vault", "recall", SIGN_SECONDS, **named).sessions)
            if (session := held.end(issuer)) is None:
                continue
            self._pool.call("vault", "forget_session", SIGN_SECONDS, session_key=session.key)
            if stage == "end":
                ended = {"vault": issuer.vault, "session": session}
                answer = self._pool.ask("vault", "end_session", SIGN_SECONDS, **ended)
                if answer.error is not None:
                    yield answer.error.message

    def _call(self, op: str, seconds: float, **values: Any) -> Mapping[str, Any]:
        return self._pool.call("login", op, seconds, **values)

    def _tell(self, found: Mapping[str, Any], *, by_hand: bool) -> None:
        """Show the page, or open it."""
        say = _to_stderr
        if found["way"] == DEVICE:
            say(f"Open   {found['url']}   on any device, and type   {found['code']}")
            if found["whole"]:
                say(f"or open {found['whole']}")
        elif by_hand:
            say("Open this address in a browser:")
            say(f"\n{found['url']}\n")
            say("If it ends at an address that cannot be opened, paste that address here.")
        else:
            say("Your browser opens to sign in. If it does not, open this address:")
            say(f"\n{found['url']}\n")
            self._browser = _open(found["url"])

    def _wait(self, *, paste: bool) -> Mapping[str, Any]:
        """Return what the sign-in gave, when it is done."""
        with progress("waiting for you to sign in"):
            while True:
                pasted = _pasted() if paste else None
                wait = 0.0 if pasted else WAIT_SECONDS
                try:
                    found = self._call("sign_in_step", STEP_SECONDS, pasted=pasted, wait=wait)
                except SourceInvalid as error:
                    if pasted is None or not sys.stdin.isatty():
                        raise
                    _to_stderr(f"{error.message}; {error.hint}")
                    continue
                if found["key"] is not None:
                    return found


def _open(url: str) -> "subprocess.Popen[bytes]":
    """Open a window. What a browser prints, and our Ctrl-C, are not for one another."""
    nothing = subprocess.DEVNULL
    return subprocess.Popen(
        [sys.executable, "-I", "-m", "webbrowser", url],
        stdin=nothing,
        stdout=nothing,
        stderr=nothing,
        start_new_session=True,
    )


def _pasted() -> str | None:
    """Return a line that was typed meanwhile, if one was."""
    if not select.select([sys.stdin], [], [], 0)[0]:
        return None
    line = sys.stdin.readline(LONGEST_PASTE).strip()
    return line or None


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
