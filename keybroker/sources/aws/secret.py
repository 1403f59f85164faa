"""One secret of Secrets Manager: its value, its versions, and why there is none.

Every version has an id; labels are moved between them: AWSCURRENT is on the one that counts,
AWSPREVIOUS on the one before, AWSPENDING on one that a rotation has begun with.

See: https://docs.aws.amazon.com/secretsmanager/latest/userguide/whats-in-a-secret.html
"""

import json
import re
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from keybroker.credential import Secret
from keybroker.errors import KeybrokerError, SourceInvalid
from keybroker.sources.aws.account import Account, Answer
from keybroker.sources.aws.refusals import CODES, Problem
from keybroker.values import dataclass

SOON = timedelta(seconds=5)  # after the moment by which its owner wants it rotated
OVERDUE = timedelta(hours=1)  # so long a rotation is awaited, less and less often
CURRENT, PREVIOUS, PENDING = "AWSCURRENT", "AWSPREVIOUS", "AWSPENDING"
NOT_THERE, MARKED = "ResourceNotFoundException", "InvalidRequestException"
LONGEST_SHOWN = 60  # of a field's name
INDEX = re.compile(r"0|[1-9][0-9]{0,8}")  # RFC 6901: no leading zeros


@dataclass(frozen=True, slots=True)
class Standing:
    """
    What DescribeSecret says.

    Attributes:
        current: The id of the version that counts; empty where there is none.
        versions: Those that bear a label, and which.
        changed_at: When anything of it was changed last; an answer with an earlier one is from a
            replica that is behind. AWS's clock.
        reread_at: When it is worth reading again, by the date that its owner rotates it on.
        rotated_at: When its last rotation was finished. AWS's clock.
    """

    current: str
    versions: Mapping[str, tuple[str, ...]]
    changed_at: datetime | None
    reread_at: datetime | None
    rotated_at: datetime | None


class Kept:
    """One secret, or one field of its JSON; `named` is how a person calls what names the field."""

    def __init__(
        self, account: Account, secret: str, field: str | None, named: str = "field"
    ) -> None:
        self.account, self.secret, self.field, self.named = account, secret, field, named

    def describe(self) -> Standing:
        """
        Ask which version counts: no value is read, and nothing decrypted.

        Raises:
            SourceInvalid: There is no such secret, or it is to be deleted; `withdrawn`.
            SourceError, ConfigError: As `Account.ask`.
        """
        answer = self.account.ask("DescribeSecret", self.secret, but=(NOT_THERE,))
        if answer.code:
            raise self.missing(answer)
        if deleted := _moment(answer, "DeletedDate"):
            raise self.error(
                f"is marked for deletion (DeletedDate {deleted:%Y-%m-%d})",
                f"aws secretsmanager restore-secret --secret-id {self.secret}",
                withdrawn=True,
            )
        stages = answer.value.get("VersionIdsToStages") or {}
        versions = {str(one): tuple(labels or ()) for one, labels in stages.items()}
        current = next((one for one, labels in versions.items() if CURRENT in labels), "")
        changed = _moment(answer, "LastChangedDate")
        rotated = _moment(answer, "LastRotatedDate")
        return Standing(current, versions, changed, _reread_at(answer), rotated)

    def read(self, stage: str = CURRENT, version: str | None = None) -> Answer:
        """
        Read a version by its label, or by its id.

        Raises:
            SourceInvalid: There is none; `withdrawn`.
            SourceError, ConfigError: As `Account.ask`.
        """
        which = {"VersionStage": stage} if version is None else {"VersionId": version}
        answer = self.account.ask("GetSecretValue", self.secret, but=(NOT_THERE, MARKED), **which)
        if answer.code == MARKED:
            self.describe()  # says until when it can be restored
            raise self.account.error(self.secret, CODES[MARKED])
        if answer.code:
            raise self.missing(answer)
        return answer

    def missing(self, answer: Answer) -> KeybrokerError:
        """Return what to say of a secret, or a version of it, that is not there."""
        if "staging label" in answer.message.lower() or "version" in answer.message.lower():
            hint = "aws secretsmanager put-secret-value …"
            return self.error("has no value yet", hint, withdrawn=True)
        hint = "see secret, region and profile; aws secretsmanager list-secrets"
        return self.error("there is no such secret", hint, withdrawn=True)

    def take(self, answer: Answer) -> tuple[Secret, Mapping[str, Any]]:
        """
        Return the key in a value, and the table in whose field it is; an empty one without.

        Raises:
            SourceInvalid: It is not there, or no key.
        """
        text = self.text(answer)
        if self.field is None:
            if _is_json(text):  # without a blank it would pass for a key
                shown = 'field = "/…"' if self.named == "field" else '"…#/…"'
                raise self.error("its value is JSON", f"name the field in it: {shown}")
            return self._key(text, "its value"), {}
        table = self.table(text)
        shown = self.field if len(self.field) <= LONGEST_SHOWN else self.field[:LONGEST_SHOWN] + "…"
        *above, last = pointed(self.field)
        inner: Any = table
        for name in above:
            inner = _member(inner, name)
        found = _member(inner, last)
        if found is None:
            raise self.error(f"has no field {shown}", f"see {self.named}")
        beside = inner if isinstance(inner, dict) else {}
        return self._key(found, f"field {shown}"), beside

    def text(self, answer: Answer) -> str:
        """Return a value as text, also of one that was stored as bytes."""
        found = answer.value.get("SecretString")
        if found is None and isinstance(data := answer.value.get("SecretBinary"), bytes):
            found = data.decode("utf-8", "replace")
        if not isinstance(found, str):  # a portal's page, a body that was cut: botocore has {}
            raise self.error("answers without a value", "is a proxy in between?")
        return found

    def table(self, text: str) -> Any:
        """Return what a value's JSON says."""
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            hint = f"leave {self.named} out if it is the key itself"
            raise self.error("is no JSON, so it has no fields", hint) from None

    def _key(self, found: Any, where: str) -> Secret:
        if not isinstance(found, str):
            raise self.error(f"{where} is no text", f"see {self.named}")
        try:
            return Secret(found.rstrip("\r\n"))  # which `echo` leaves there
        except ValueError as error:
            hint = "write one word of printable ASCII there"
            raise self.error(f"{where} is {error}", hint) from None

    def error(
        self, words: str, hint: str | None = None, *, withdrawn: bool = False
    ) -> KeybrokerError:
        problem = Problem(SourceInvalid, words, hint, withdrawn=withdrawn)
        return self.account.error(self.secret, problem)


def pointed(pointer: str) -> list[str]:
    """Read a JSON Pointer. See: https://www.rfc-editor.org/rfc/rfc6901"""
    return [one.replace("~1", "/").replace("~0", "~") for one in pointer.split("/")[1:]]


def written_at(answer: Answer) -> datetime | None:
    """Return when a version was made, by AWS's clock."""
    return _moment(answer, "CreatedDate")


def _moment(answer: Answer, name: str) -> datetime | None:
    found = answer.value.get(name)
    try:
        return found.astimezone(UTC) if isinstance(found, datetime) else None
    except OverflowError:  # at an end of the calendar
        return None


def _is_json(text: str) -> bool:
    """Tell JSON with fields from a key."""
    try:
        return text.lstrip()[:1] in ("{", "[") and isinstance(json.loads(text), dict | list)
    except (ValueError, RecursionError):
        return False


def _member(table: Any, name: str) -> Any:
    if isinstance(table, dict):
        return table.get(name)
    if isinstance(table, list) and INDEX.fullmatch(name) and int(name) < len(table):
        return table[int(name)]
    return None


def _reread_at(answer: Answer) -> datetime | None:
    """
    Return when to read again: shortly after the owner rotates, by AWS's date or by the rule.

    One that is late is looked for at growing distances, and then as often as any.
    """
    by = _moment(answer, "NextRotationDate")
    last = _moment(answer, "LastRotatedDate")
    days = (answer.value.get("RotationRules") or {}).get("AutomaticallyAfterDays")
    try:
        if by is None and last is not None and answer.value.get("RotationEnabled") and days:
            by = last + timedelta(days=days)
        if by is None:
            return None
        late = answer.asked_at + answer.skew - by
        if late > OVERDUE:
            return None
        return answer.asked_at - late + max(SOON, 2 * late)
    except (OverflowError, TypeError):  # at an end of the calendar
        return None
