"""Profiles for one program each: made of one of the file, gone with the program.

    work-run-3f9a1c    of `work`, as long as the connection of a `keybroker run` lasts
    work-env-9b12d0    of `work`, until the end of the one key that was printed

Whoever is connected says what the profile is made of, and says it again to another daemon: no file
remembers it. A key that is exported, to a program that cannot be given another, is retired at once
with its own end as the date: so any later process knows when to revoke it.
"""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from datetime import timedelta
from typing import Any

from keybroker.config import SOURCES, Config, Profile, only_one, read_profile
from keybroker.document import Where
from keybroker.errors import ConfigError, NobodyAnswers, NotReady
from keybroker.fields import show_duration
from keybroker.label import is_made
from keybroker.rotation import Kind
from keybroker.server import Client
from keybroker.values import dataclass, replace

SHORTEST = timedelta(seconds=10)
TTL = timedelta(minutes=30)
MOST = 256  # at a time
_MILLISECOND = timedelta(milliseconds=1)


@dataclass(frozen=True, slots=True)
class Limits:
    """
    What a profile for one program may do less than the one that it is made of.

    Attributes:
        ttl: How long a key lives; None: as long as one of the profile, but at most half an hour.
        budget: Of one key.
        models: All that it may use, the first for every tier of Claude Code's; none: those of
            the profile.
    """

    ttl: timedelta | None = None
    budget: float | None = None
    models: tuple[str, ...] = ()


@dataclass(slots=True)
class Run:
    """
    Somebody who is connected for a program.

    Attributes:
        name: The profile that was made for it; the one of the file where that mints nothing.
        of: The profile of the file.
        profile: What was made; None where there is none, or its key was exported.
        exported: The program has the key itself.
    """

    name: str
    of: str
    profile: Profile | None
    limits: Limits
    client: Client
    program: str
    pid: int
    exported: bool

    def row(self) -> dict[str, Any]:
        """Return what `status` shows of it."""
        return {
            "profile": self.name,
            "of": self.of,
            "program": self.program,
            "pid": self.pid,
            "exported": self.exported,
        }


def made(profile: Profile, name: str, limits: Limits) -> Profile:
    """
    Make a profile for one program.

    Its hold is a third of its keys' life if that is less than the profile's: the rules of the
    file hold for it too.

    Args:
        profile: One of the file, whose keys are ours.

    Raises:
        ConfigError: It would be allowed more than the profile is, or something that its source
            cannot do.
    """
    known, old = SOURCES[profile.type], profile.source
    raw = {k: value for k, value in profile.raw.items() if k not in ("publish", "export")}
    source = raw["source"] = dict(raw["source"])
    if profile.kind is Kind.MINTED:
        ttl = limits.ttl or min(TTL, old["lifetime"])
        _check(profile, ttl)
        hold = min(profile.hold, ttl / 3 // _MILLISECOND * _MILLISECOND)
        helper_ttl = min(profile.helper_ttl, hold / 3 // _MILLISECOND * _MILLISECOND)
        source["lifetime"] = show_duration(ttl)
        raw |= {"hold": show_duration(hold), "helper_ttl": show_duration(helper_ttl)}
    elif limits.ttl is not None:
        raise _refused(profile, "ttl", "how long its leases live is Vault's to say")
    if limits.budget is not None:
        if "max_budget" not in known:
            raise _refused(profile, "budget", "its keys cannot have a budget")
        if limits.budget > (old["max_budget"] or limits.budget):
            raise _refused(profile, "budget", f"more than its keys have, {old['max_budget']:g}")
        source["max_budget"] = limits.budget
    if limits.models:
        if "models" in known:
            if beyond := set(limits.models) - set(old["models"] or limits.models):
                raise _refused(profile, "model", f"its keys may not use {min(beyond)}")
            source["models"] = list(limits.models)
            raw["verify_model"] = limits.models[0]
        raw["claude"] = {**raw.get("claude", {}), **tiers(limits.models[0])}
    return read_profile(name, raw, Where({}, f"run: {profile.name}"))


def with_models(profile: Profile, models: tuple[str, ...]) -> Profile:
    """Return a profile that somebody else keeps the key of, with one model for every tier."""
    if not models:
        return profile
    return replace(profile, claude={**profile.claude, **tiers(models[0])})


def tiers(model: str) -> dict[str, str]:
    return dict.fromkeys(("haiku", "sonnet", "opus"), model)


def _check(profile: Profile, ttl: timedelta) -> None:
    longest: timedelta = profile.source["lifetime"]
    if ttl > longest:
        raise _refused(profile, "ttl", f"longer than its keys live, {show_duration(longest)}")
    if ttl < SHORTEST:
        raise _refused(profile, "ttl", f"at least {show_duration(SHORTEST)} works")
    if ttl % timedelta(seconds=1):
        raise _refused(profile, "ttl", "expected whole seconds")


def _refused(profile: Profile, option: str, problem: str) -> ConfigError:
    return ConfigError(f"profiles.{profile.name}: --{option}: {problem}")


class Runs:
    """Who is connected for a program now."""

    def __init__(self) -> None:
        self._runs: dict[str, list[Run]] = {}  # of a profile of the file there may be several
        # Nobody is connected for them: to be forgotten when nothing is left of them.
        self.leaving: set[str] = set()
        self.seen: set[str] = set()  # while somebody may yet connect who was there before

    def __iter__(self) -> Iterator[Run]:
        return (run for group in self._runs.values() for run in group)

    def add(self, config: Config, asked: Mapping[str, Any], client: Client, *, early: bool) -> Run:
        """
        Take in somebody who connects.

        Args:
            config: The file's.
            asked: `name`, `profile`, `program`, `pid`, `exported` and the limits: `ttl_s`,
                `budget`, `models`; `again` by one who has the key of a daemon before.
            early: Others may yet connect, who were there before this daemon.

        Raises:
            ConfigError: There is no such profile, or it cannot be made so.
            NotReady: There are too many.
            NobodyAnswers: It was asked in words that are not known.
        """
        try:
            ttl = asked.get("ttl_s")
            limits = Limits(
                None if ttl is None else timedelta(seconds=int(ttl)),
                None if asked.get("budget") is None else float(asked["budget"]),
                tuple(map(str, asked.get("models", ()))),
            )
            name, program, pid = str(asked["name"]), str(asked["program"])[:64], int(asked["pid"])
        except (KeyError, TypeError, ValueError, OverflowError):
            raise NobodyAnswers("the daemon was asked in words it does not know") from None
        of = config.profile(str(asked.get("profile")))
        if sum(map(len, self._runs.values())) >= MOST:
            raise NotReady(f"{MOST} programs have keys of their own already", hint="end one")
        exported, profile = bool(asked.get("exported")), None
        if of.kind is Kind.FOLLOWED:
            name = of.name
        elif not is_made(name) or self._runs.get(name):
            raise NobodyAnswers("the daemon was asked in words it does not know")
        elif not (exported and asked.get("again")):
            profile = made(of, name, limits)
        run = Run(name, of.name, profile, limits, client, program, pid, exported)
        self._runs.setdefault(name, []).append(run)
        self.leaving.discard(name)
        if early:
            self.seen.add(name)
        return run

    def give(self, name: str) -> Run | None:
        """Note that a program has a key for good; return who is connected for it."""
        for run in self._runs.get(name, ()):
            if run.profile is not None and run.exported:
                run.profile = None
                return run
        return None

    def part(self) -> list[Run]:
        """Return those who are gone since the last time."""
        gone = [run for run in self if run.client.closed]
        for run in gone:
            self._runs[run.name].remove(run)
            if not self._runs[run.name]:
                del self._runs[run.name]
            if is_made(run.name):
                self.leaving.add(run.name)
        return gone

    def over(self, config: Config) -> Config:
        """Return the file's configuration with what was made of its profiles."""
        profiles = {**config.profiles}
        for run in self:
            if run.profile is None:
                continue
            with suppress(ConfigError):  # anew, for the file may have changed; else as it was
                run.profile = made(config.profile(run.of), run.name, run.limits)
            profiles[run.name] = run.profile
        if len(profiles) == len(config.profiles):
            return config
        default = config.default
        only = only_one(config.profiles.values())
        if default is None and only is not None:  # it is still the one that is meant
            default = only.name
        return replace(config, profiles=profiles, default=default)
