"""The function that Secrets Manager calls to rotate a secret: its four steps, each at any time.

    {"Step": "createSecret", "SecretId": "arn:aws:secretsmanager:…", "ClientRequestToken": "…"}

Nothing is kept between the steps. What a journal knows elsewhere is known here by names: the label
of a key at its gateway is made of the secret and of the version that the key is in, so that what
an interrupted step left behind is found again. A key is revoked by the first rotation that finds
its version without a label, and replaced a hold ago.

`KEYBROKER_CONFIG` names the configuration, `KEYBROKER_PROFILE` the profile, where it has several;
its `publish` table is about the secret that is rotated.

See: https://docs.aws.amazon.com/secretsmanager/latest/userguide/rotate-secrets_lambda-functions.html
"""

import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any

from keybroker import paths, sources
from keybroker.config import Profile, load
from keybroker.credential import Look, sha256
from keybroker.errors import ConfigError, KeybrokerError, SourceInvalid, SourceUnavailable
from keybroker.label import LETTERS, prefix
from keybroker.rotation import LOOKS_AT_NEW_KEY, Kind
from keybroker.sources import Source
from keybroker.sources.aws.account import Account
from keybroker.sources.aws.secret import CURRENT, MARKED, NOT_THERE, PENDING, PREVIOUS, Kept
from keybroker.sources.aws.store import move_current, put_pending, take_off_pending
from keybroker.sources.held import Held
from keybroker.values import replace

CURRENT_ALREADY = "the version is current already"
OVERTAKEN = "rotation: another version was made current meanwhile"
MOST_PAGES = 10  # of a hundred versions


def handler(event: Mapping[str, Any], context: object = None) -> None:
    """
    Do one step of a rotation.

    Args:
        event: As Secrets Manager sends it.
        context: Lambda's own; not looked at.

    Raises:
        KeybrokerError: The step was not done; it is safe to call again. Secrets Manager does so,
            and shows the message. No secret is in it.
    """
    del context
    step = event.get("Step")
    if step not in STEPS:
        raise ConfigError(f"rotation: there is no step {step!r:.40}")
    secret, token = event.get("SecretId"), event.get("ClientRequestToken")
    if not isinstance(secret, str) or not isinstance(token, str) or not token:
        raise ConfigError("rotation: the event has no SecretId or no ClientRequestToken")
    profile = _profile(secret)
    held = Held()
    assert profile.publish is not None, "which was looked at"
    assert profile.publish.account is not None, "it is at AWS"
    account = Account.of(replace(profile.publish.account, region=_region(secret)), held)
    kept = Kept(account, secret, profile.publish.settings["field"])
    try:
        with closing(sources.build(profile, os.environ, held)) as source:
            said = STEPS[step](_Rotation(profile, source, kept, token))
    except KeybrokerError as error:
        if error.hint:  # a traceback has none
            sys.stderr.write(f"keybroker: {step}: {error.message}\nhint: {error.hint}\n")
        raise
    sys.stderr.write(f"keybroker: {step}: {said}\n")


class _Rotation:
    """One rotation of one secret, whose new version is named by its token."""

    def __init__(self, profile: Profile, source: Source, kept: Kept, token: str) -> None:
        self.profile, self.source, self.kept, self.token = profile, source, kept, token

    def label(self, version: str) -> str:
        """Return the label of the key in a version: the same whenever it is asked for."""
        number = int(sha256(version.encode()), 16)
        name = "".join(LETTERS[number >> shift & 31] for shift in range(125, -1, -5))
        return f"{prefix(sha256(self.kept.secret.encode())[:8])}{self.profile.name}-{name}"

    def is_current(self, versions: Mapping[str, tuple[str, ...]]) -> bool:
        """
        Say whether the rotation is over.

        Raises:
            SourceInvalid: Another one has begun since.
        """
        labels = versions.get(self.token, ())
        if CURRENT not in labels and PENDING not in labels:
            raise SourceInvalid("rotation: this version is not AWSPENDING any more")
        return CURRENT in labels

    def end(self, version: str) -> int:
        """Revoke the key of a version; return how many there were."""
        found = self.source.find(self.label(version))
        for lease in found:
            self.source.revoke(lease)
        return len(found)

    def pending(self) -> Any:
        """Return the answer with the new version's value; one with a code where there is none."""
        return self.kept.account.ask(
            "GetSecretValue",
            self.kept.secret,
            but=(NOT_THERE, MARKED),
            VersionId=self.token,
            VersionStage=PENDING,
        )


def _create(at: _Rotation) -> str:
    """Mint a key and put it beside the one that is read, unless that was done."""
    versions = at.kept.describe().versions
    if at.token in versions and at.is_current(versions):
        return CURRENT_ALREADY
    answer = at.pending()
    if not answer.code and ("SecretString" in answer.value or "SecretBinary" in answer.value):
        return f"{at.kept.take(answer)[0].fingerprint} is there already"
    at.end(at.token)  # of a call that was interrupted: its secret is lost
    credential = at.source.issue(at.label(at.token))
    try:
        sources.check_hand_out(credential.secret, at.profile)
        if not put_pending(at.kept, at.token, credential):
            raise SourceUnavailable("rotation: this version has a value that could not be read")
    except KeybrokerError as error:
        if not getattr(error, "unknown", False):  # else it may be there, and is found by its label
            at.source.revoke(credential.lease)
        raise
    return f"minted {credential.secret.fingerprint}"


def _set(at: _Rotation) -> str:
    """Do nothing: the gateway knows the key that it made."""
    return f"nothing to do at {at.profile.issuer}"


def _test(at: _Rotation) -> str:
    """Try the new key at the gateway. One that is refused is revoked, and AWSPENDING taken off."""
    if at.is_current(at.kept.describe().versions):
        return CURRENT_ALREADY
    answer = at.pending()
    if answer.code:
        raise at.kept.missing(answer)
    secret, _ = at.kept.take(answer)
    seen = timedelta()
    for moment in LOOKS_AT_NEW_KEY:
        time.sleep((moment - seen).total_seconds())
        seen = moment
        verdict = at.source.verify(secret)
        if verdict.look in (Look.ALIVE, Look.UNVERIFIED):
            return f"{secret.fingerprint} is {verdict.look.value} by {verdict.method}"
    problem = f"{at.profile.type}: the gateway did not take {secret.fingerprint} ({verdict.reason})"
    if verdict.look is Look.UNDECIDED:
        raise SourceUnavailable(problem)
    at.end(at.token)
    take_off_pending(at.kept, at.token)  # else no other rotation could begin
    raise SourceInvalid(problem)


def _finish(at: _Rotation) -> str:
    """
    Make the new version the one that is read, and end the keys that nobody should have.

    One that became current since the new version was made has what the new one lacks: it stays.
    """
    standing = at.kept.describe()
    is_done = at.is_current(standing.versions)
    made = {version: when for when, version, _ in _versions(at.kept)}
    mine = made.get(at.token)
    overtaken = not is_done and mine is not None and made.get(standing.current, mine) > mine
    if overtaken or not move_current(at.kept, at.token, standing.current):
        at.end(at.token)
        take_off_pending(at.kept, at.token)  # else no other rotation could begin
        raise SourceInvalid(OVERTAKEN)
    ended = sum(at.end(version) for version in _outdated(at, standing.rotated_at))
    return f"{at.token[:8]} is current, {ended} keys were revoked"


STEPS = {
    "createSecret": _create,
    "setSecret": _set,
    "testSecret": _test,
    "finishSecret": _finish,
}


def _outdated(at: _Rotation, rotated_at: datetime | None) -> Iterator[str]:
    """
    Yield the versions whose keys may be alive, and that nobody should have any more.

    A version was replaced when the next one was made, or later: when the rotation before this one
    was finished at the latest. Who read it until then has it for a hold.
    """
    now = datetime.now(UTC)
    if rotated_at is not None and now < rotated_at + at.profile.hold:
        return
    versions = sorted(_versions(at.kept), key=lambda one: one[0])
    for (made, version, labels), (replaced, *_) in pairwise(versions):
        ended = made + at.profile.policy.lifetime + timedelta(days=1) < now
        held = now < replaced + at.profile.hold
        if not (ended or held or labels & {CURRENT, PREVIOUS, PENDING}):
            yield version


def _versions(kept: Kept) -> Iterator[tuple[datetime, str, set[str]]]:
    """Yield when each version was made, its id and its labels."""
    more: dict[str, str] = {}
    for _ in range(MOST_PAGES):
        answer = kept.account.ask(
            "ListSecretVersionIds", kept.secret, IncludeDeprecated=True, **more
        ).value
        for one in answer.get("Versions") or ():
            yield one["CreatedDate"], str(one["VersionId"]), set(one.get("VersionStages") or ())
        if not answer.get("NextToken"):
            return
        more = {"NextToken": answer["NextToken"]}


def _profile(secret: str) -> Profile:
    """
    Return the profile that is meant.

    Raises:
        ConfigError: It mints nothing, or publishes elsewhere.
    """
    files = paths.config_files(os.environ)
    if not any(file.exists() for file in files):
        raise ConfigError(f"{files[-1]}: does not exist", hint="KEYBROKER_CONFIG names it")
    config = load(files)
    profile = config.profile(os.environ.get("KEYBROKER_PROFILE") or None)
    where = f"profiles.{profile.name}"
    publish = profile.publish
    if profile.kind is not Kind.MINTED or publish is None or publish.account is None:
        raise ConfigError(f'{where}: needs a source that mints, and publish with to = "aws"')
    if _name(secret) not in (publish.settings["secret"], _name(publish.settings["secret"])):
        raise ConfigError(f"{where}.publish.secret: is another secret than the one to be rotated")
    return profile


def _name(secret: str) -> str:
    """Return the name in an ARN, which ends with six letters of AWS's own."""
    _, found, name = secret.partition(":secret:")
    return name[:-7] if found and name[-7:-6] == "-" else secret


def _region(secret: str) -> str | None:
    """Return the region of an ARN; a name leaves it to the environment."""
    parts = secret.split(":")
    return parts[3] if len(parts) > 3 and parts[0] == "arn" else None
