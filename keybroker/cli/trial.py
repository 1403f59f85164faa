"""The whole life of one key against the real thing, step by step: `source test`, and `init`."""

import time
from collections.abc import Callable
from typing import TypeVar

from keybroker.cli.base import coloured, in_words, progress
from keybroker.cli.work import Desk, minted
from keybroker.clock import Clock
from keybroker.config import Profile
from keybroker.credential import Credential
from keybroker.errors import (
    CANNOT_KEEP,
    CacheLocked,
    KeybrokerError,
    SourceInvalid,
    SourceUnavailable,
)
from keybroker.label import new_label
from keybroker.rotation import Kind
from keybroker.worker import decode_credential

T = TypeVar("T")
SECONDS = 30.0
LOOKS_FOR_GONE = 5


def try_out(at: Desk, profile: Profile, report: "Report") -> None:
    """
    Mint a key, verify it, find it, revoke it, and see it refused; or read and verify one.

    The key is of its own: the current one is not touched.

    Raises:
        KeybrokerError: The first step that failed.
    """
    if minted(profile):
        _whole_life(at, profile, report)
        return
    credential = report.step("read", lambda: _read(at, profile))
    report.step("verify", lambda: _alive(at, profile, credential))


def _whole_life(at: Desk, profile: Profile, report: "Report") -> None:
    report.step("keep", lambda: _keep(at))
    if profile.publish is not None:  # before there is a key that could not be published
        report.step("publish", lambda: _published(at, profile))
    label = new_label(at.instance, profile.name, Clock().read().wall)
    credential = report.step("issue", lambda: _issue(at, profile, label))
    try:
        report.step("verify", lambda: _alive(at, profile, credential))
        if profile.kind is Kind.MINTED:
            report.step("find", lambda: _find(at, profile, label, expected=1))
    finally:
        report.step("revoke", lambda: _revoke(at, profile, label, credential))
    report.step("refused", lambda: _refused(at, profile, credential))
    if profile.kind is Kind.MINTED:
        report.step("gone", lambda: _find(at, profile, label, expected=0))


class Report:
    """Prints a line for each step as it ends."""

    def __init__(self, quiet: bool) -> None:
        self.rows: list[dict[str, object]] = []
        self._quiet = quiet

    def step(self, name: str, act: Callable[[], tuple[T, str]]) -> T:
        """Do one step, which returns what it found and what to say of it."""
        started = time.monotonic()
        try:
            with progress(name):
                found, seen = act()
        except KeybrokerError as error:
            self._say(name, False, error.message, started)
            raise
        self._say(name, True, seen, started)
        return found

    def _say(self, name: str, ok: bool, seen: str, started: float) -> None:
        milliseconds = round((time.monotonic() - started) * 1000)
        self.rows.append({"step": name, "ok": ok, "seen": seen, "ms": milliseconds})
        if not self._quiet:
            mark = coloured("ok    ", "green") if ok else coloured("failed", "red")
            print(f"{mark}  {name:<8} {seen} ({milliseconds} ms)")


def _keep(at: Desk) -> tuple[None, str]:
    """A key that cannot be sealed would be lost with the process that minted it."""
    if at.wrap_key.key is None:
        raise CacheLocked(
            f"cache: a minted key could not be kept: {at.wrap_key.origin}",
            hint=CANNOT_KEEP,
        )
    return None, f"sealed with the {at.wrap_key.origin}"


def _published(at: Desk, profile: Profile) -> tuple[None, str]:
    assert profile.publish is not None
    there = profile.publish.issuer
    seen = at.call(profile, "published", SECONDS, at=there, profile=profile)
    version = f"version {seen['version']}" if seen["version"] else "no version yet"
    return None, f"{version} at {there}; whether we may write is not tried"


def _issue(at: Desk, profile: Profile, label: str) -> tuple[Credential, str]:
    answer = at.call(profile, "issue", SECONDS, profile=profile, label=label)
    return _described(decode_credential(answer["credential"]))


def _read(at: Desk, profile: Profile) -> tuple[Credential, str]:
    answer = at.call(profile, "poll", SECONDS, profile=profile)
    return _described(decode_credential(answer["credential"]))


def _described(credential: Credential) -> tuple[Credential, str]:
    lease = credential.lease
    ends = "has no end"
    if lease.expires_at is not None:
        ends = f"lives {in_words(lease.expires_at - lease.issued_at)}"
    return credential, f"key {credential.secret.fingerprint}, {ends}"


def _verify(at: Desk, profile: Profile, credential: Credential) -> tuple[str, str]:
    seen = at.call(profile, "verify", SECONDS, profile=profile, secret=credential.secret)
    return str(seen["look"]), f"{seen['look']} by {seen['method']} ({seen['reason']})"


def _alive(at: Desk, profile: Profile, credential: Credential) -> tuple[None, str]:
    look, seen = _verify(at, profile, credential)
    if look in ("refused", "undecided") or "(401:" in seen:
        kind = SourceUnavailable if look == "undecided" else SourceInvalid
        hint = f"does {profile.base_url} serve /v1/models?"
        if look == "refused":
            hint = "the gateway does not know this key: is it the right one, and for "
            hint += f"{profile.base_url}?"
        raise kind(f"verify: {seen}", hint=hint)
    return None, seen


def _find(at: Desk, profile: Profile, label: str, expected: int) -> tuple[None, str]:
    answer = at.call(profile, "find", SECONDS, profile=profile, label=label)
    count = len(answer["found"])
    if count != expected:
        raise SourceInvalid(f"find: {count} keys bear the label {label}, not {expected}")
    return None, f"{count} by the label {label}"


def _revoke(at: Desk, profile: Profile, label: str, credential: Credential) -> tuple[None, str]:
    at.call(
        profile,
        "revoke",
        SECONDS,
        profile=profile.name,
        label=label,
        fingerprint=credential.secret.fingerprint,
        issuer=profile.issuer,
        timeout=profile.policy.timeout,
        lease=credential.lease,
    )
    return None, "confirmed"


def _refused(at: Desk, profile: Profile, credential: Credential) -> tuple[None, str]:
    """A revoked key is refused; some gateways need a while to know it everywhere."""
    for _ in range(LOOKS_FOR_GONE):
        look, seen = _verify(at, profile, credential)
        if look != "alive":
            return None, seen
        time.sleep(1)
    raise SourceInvalid(
        f"refused: the revoked key is still {seen}",
        hint="the gateway caches keys; LiteLLM does so for up to 60 s",
    )
