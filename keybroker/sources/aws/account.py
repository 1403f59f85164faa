"""One account of AWS's: boto3 finds who we are and makes the calls, this says what came of them.

Nothing of the chain of credentials is written here. What it obtains and could use again, such as
an assumed role, is handed to the broker, which keeps it for the next worker.

See: https://docs.aws.amazon.com/sdkref/latest/guide/standardized-credentials.html
"""

import json
import os
import shlex
from base64 import b64decode, b64encode
from collections.abc import Collection, Iterator, Mapping, MutableMapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import Any

import boto3  # type: ignore[import-untyped]
import botocore.config  # type: ignore[import-untyped]
import botocore.credentials  # type: ignore[import-untyped]
import botocore.exceptions as problems  # type: ignore[import-untyped]
import botocore.parsers  # type: ignore[import-untyped]
import botocore.session  # type: ignore[import-untyped]

from keybroker import __version__
from keybroker.aws import Account as Place
from keybroker.aws import session_of
from keybroker.credential import Secret, Session
from keybroker.errors import KeybrokerError, SourceDenied, SourceError
from keybroker.sources.aws.refusals import (
    NO_ANSWER,
    SET_THE_CLOCK,
    SIGN_IN,
    Problem,
    facts,
    is_denial,
    of_answer,
    of_exception,
)
from keybroker.sources.held import Held
from keybroker.values import dataclass, field, replace

# Another try is the broker's to make, who knows when a key ends.
CALLS = botocore.config.Config(
    connect_timeout=3,
    read_timeout=5,
    retries={"total_max_attempts": 1},
    user_agent_extra=f"keybroker/{__version__}",
)
IDENTITY = botocore.config.Config(connect_timeout=1, read_timeout=1)
MOST_AT_ONCE = 20  # secrets in one BatchGetSecretValue
SKEW = timedelta(seconds=30)  # the header counts whole seconds and the call took its time


@dataclass(frozen=True, slots=True)
class Answer:
    """
    What AWS answered about a secret.

    Attributes:
        value: Its members; empty when it said no.
        code: Its no, if that is one that the caller wanted to know of.
        message: What it said with that; for comparison only.
        asked_at: Our clock, before the call.
        skew: How far AWS's clock is ahead of ours; zero when close.
    """

    value: Mapping[str, Any] = field(repr=False)  # may hold a key
    asked_at: datetime
    skew: timedelta
    code: str = ""
    message: str = field(default="", repr=False)


class Account:
    """
    Asks Secrets Manager as one account.

    Attributes:
        who: What messages call it: its profile and region.
    """

    def __init__(self, place: Place, held: Held) -> None:
        self._place = place
        self.who = f"aws: {place}"
        self._kept = _Kept(held, session_of(place.text))
        self._core: Any = None
        self._client: Any = None
        self._foreseen: dict[str, Answer] = {}

    @classmethod
    def of(cls, place: Place, held: Held) -> "Account":
        """Return the account that all sources of this worker share: one client, one connection."""
        return held.shared(f"aws {place.text}", lambda: cls(place, held))

    def ask(
        self, operation: str, secret: str, *, but: Collection[str] = (), **given: Any
    ) -> Answer:
        """
        Make one call about a secret.

        Args:
            operation: In the API's words: GetSecretValue.
            secret: Its name or ARN.
            but: Codes of refusals that the caller puts into words.

        Raises:
            SourceUnavailable: No answer, not AWS's, or one that may be another next time;
                `unknown` when something may have been done all the same.
            SourceDenied: Nobody is signed in, or who is may not do that.
            SourceInvalid: It will not do that.
            ConfigError: There is nobody to ask as, or no region to ask in.
        """
        asked_at = datetime.now(UTC)
        with self._translated(operation, secret):
            method = getattr(self._connected(), botocore.xform_name(operation))
            try:
                found = method(SecretId=secret, **given)
            except problems.ClientError as error:
                code, _, message = facts(error.response)
                if code not in but:
                    raise
                return Answer({}, asked_at, _skew(error.response, asked_at), code, message)
        if not isinstance(found, dict) or not isinstance(found.get("ARN"), str):
            raise self.error(secret, NO_ANSWER)
        return Answer(found, asked_at, _skew(found, asked_at))

    def foresee(self, secrets: list[str]) -> None:
        """Read several secrets with one call; who asks for one of them next has it from here."""
        self._foreseen.clear()
        wanted = list(dict.fromkeys(secrets))
        for n in range(0, len(wanted), MOST_AT_ONCE):
            some = wanted[n : n + MOST_AT_ONCE]
            asked_at = datetime.now(UTC)
            try:
                with self._translated("BatchGetSecretValue", "*"):
                    found = self._connected().batch_get_secret_value(SecretIdList=some)
            except KeybrokerError:  # each is read by itself, and says what is wrong
                return
            skew = _skew(found, asked_at)
            for one in found.get("SecretValues") or ():
                for name in (one.get("ARN"), one.get("Name")):
                    self._foreseen[str(name)] = Answer(one, asked_at, skew)

    def foreseen(self, secret: str) -> Answer | None:
        """Return what was read of a secret together with others, once."""
        return self._foreseen.pop(secret, None)

    def error(self, secret: str, problem: Problem) -> KeybrokerError:
        """Put a problem with a secret into words: who asked for what, and what came of it."""
        about = f"{secret}: " if secret else ""
        text = f"{self.who}: {about}{problem.words}"[:200]
        if not issubclass(problem.kind, SourceError):
            return problem.kind(text, hint=problem.hint)
        return problem.kind(
            text,
            hint=problem.hint,
            unknown=problem.unknown,
            withdrawn=problem.withdrawn,
            retry_after=problem.retry_after,
        )

    def close(self) -> None:
        """Let go of the client; whoever asks next finds out anew who we are."""
        if self._client is not None:
            self._client.close()
        self._client = None

    def _connected(self) -> Any:
        """Return the client; who we are is found out first, where a failure can be named."""
        if self._client is not None:
            return self._client
        self._core = core = botocore.session.Session()
        core.set_default_client_config(CALLS)
        session = boto3.session.Session(
            botocore_session=core,
            profile_name=self._place.profile,
            region_name=self._place.region,
        )
        self.who = f"aws: {replace(self._place, region=session.region_name)}"
        chain = botocore.credentials.create_credential_resolver(
            core, cache=self._kept, region_name=session.region_name
        )
        core.register_component("credential_provider", chain)
        client = session.client("secretsmanager")
        try:
            found = core.get_credentials()
            if found is None:
                raise problems.NoCredentialsError()
            found.get_frozen_credentials()
        except (OSError, ValueError, KeyError) as error:  # of a program, a file
            if isinstance(error, problems.BotoCoreError):
                raise
            raise problems.CredentialRetrievalError(provider="", error_msg="") from None
        self._client = client
        return client

    @contextmanager
    def _translated(self, operation: str, secret: str) -> Iterator[None]:
        """Raise botocore's exceptions as ours; none of their text is in there."""
        try:
            yield
        except problems.ClientError as error:
            raise self._refusal(operation, secret, error) from None
        except problems.BotoCoreError as error:
            if self._client is None or not isinstance(error, problems.HTTPClientError):
                secret = ""  # it is not about any one
            self.close()  # the files and variables that it read may be others next time
            raise self.error(secret, self._for_us(of_exception(error))) from None
        except botocore.parsers.ResponseParserError:
            raise self.error(secret, NO_ANSWER) from None

    def _refusal(self, operation: str, secret: str, error: Any) -> KeybrokerError:
        code, status, message = facts(error.response)
        asked = str(error.operation_name)
        if is_denial(code, status):
            return self._denied(operation, asked, secret, message)
        problem = of_answer(code, status, message)
        if problem.hint == SET_THE_CLOCK:
            ahead = -_skew(error.response, datetime.now(UTC))
            if ahead:
                way = "ahead" if ahead > timedelta() else "behind"
                minutes = max(1, round(abs(ahead) / timedelta(minutes=1)))
                words = f"{problem.words}: it is {minutes} min {way}"
                problem = replace(problem, words=words)
        if problem.kind is SourceDenied:
            self.close()
            secret = ""
        if asked != operation:  # of whoever has the credentials: STS, the sign-in
            return self.error("", replace(problem, words=f"{asked} {problem.words}"))
        return self.error(secret, problem)

    def _denied(self, operation: str, asked: str, secret: str, message: str) -> KeybrokerError:
        """Say who may not do what, and what would allow it."""
        who = self._identity()
        self.close()  # another policy may come with other credentials
        if asked.startswith("AssumeRole"):
            problem = Problem(
                SourceDenied,
                f"{who} may not assume the role",
                "see role_arn in ~/.aws/config, and whom the role trusts",
            )
            return self.error("", problem)
        if asked != operation:
            hint = "see sso_account_id and sso_role_name in ~/.aws/config"
            return self.error("", Problem(SourceDenied, "the sign-in has no such role", hint))
        if "KMS" in message:
            action = "kms:Decrypt" if operation.startswith("Get") else "kms:GenerateDataKey"
            words = f"{who} may not use the key that encrypts it"
            return self.error(secret, Problem(SourceDenied, words, f"allow it {action}"))
        words = f"{who} may not {operation}"
        hint = f"allow it secretsmanager:{operation}; see docs/aws.md"
        return self.error(secret, Problem(SourceDenied, words, hint))

    def _identity(self) -> str:
        """Return the ARN that AWS knows us by, for which no permission is needed."""
        try:
            client = self._core.create_client("sts", config=IDENTITY)
            arn = client.get_caller_identity().get("Arn")
        except (problems.BotoCoreError, problems.ClientError):
            return "this identity"
        return arn if isinstance(arn, str) and arn.startswith("arn:aws") else "this identity"

    def _for_us(self, problem: Problem) -> Problem:
        """Name the profile in what is to be typed, and a credential_process that is ourselves."""
        if problem.hint == SIGN_IN and self._place.profile is not None:
            return replace(problem, hint=f"{SIGN_IN} --profile {self._place.profile}")
        if problem.words == "who keeps its credentials failed" and self._asks_itself():
            hint = "its credential_process is keybroker, which would wait for itself"
            return replace(problem, hint=hint)
        return problem

    def _asks_itself(self) -> bool:
        with suppress(problems.BotoCoreError, ValueError):
            command = self._core.get_scoped_config().get("credential_process")
            words = shlex.split(command or "")
            return bool(words) and os.path.basename(words[0]).startswith("keybroker")
        return False


class _Kept(MutableMapping[str, Any]):
    """What botocore keeps of roles and sign-ins, as one session that the broker has."""

    def __init__(self, held: Held, name: str) -> None:
        self._held, self._name = held, name

    def __getitem__(self, key: str) -> Any:
        return self._read()[key]

    def __setitem__(self, key: str, value: Any) -> None:
        text = json.dumps({**self._alive(), key: value}, default=datetime.isoformat)
        try:
            secret = Secret(b64encode(text.encode()).decode())
        except ValueError:  # more roles than there is room for: the newest is what is needed
            text = json.dumps({key: value}, default=datetime.isoformat)
            secret = Secret(b64encode(text.encode()).decode())
        ends = max(map(_end, json.loads(text).values()))
        now = datetime.now(UTC)
        self._held.put(Session(self._name, secret=secret, issued_at=now, expires_at=ends))

    def __delitem__(self, key: str) -> None:
        raise AssertionError("botocore replaces, and forgets nothing")

    def __iter__(self) -> Iterator[str]:
        return iter(self._read())

    def __len__(self) -> int:
        return len(self._read())

    def _alive(self) -> dict[str, Any]:
        now = datetime.now(UTC)
        return {key: one for key, one in self._read().items() if _end(one) > now}

    def _read(self) -> dict[str, Any]:
        secret = self._held.get(self._name).secret
        if secret is None:
            return {}
        found = json.loads(b64decode(secret.reveal()))
        return found if isinstance(found, dict) else {}


def _end(kept: Mapping[str, Any]) -> datetime:
    """Return when credentials end that botocore keeps."""
    ends = kept["Credentials"]["Expiration"]
    text = ends.isoformat() if isinstance(ends, datetime) else str(ends)
    return datetime.fromisoformat(text.replace("UTC", "+00:00")).astimezone(UTC)


def _skew(response: Mapping[str, Any], asked_at: datetime) -> timedelta:
    """Say how far AWS's clock is ahead of ours, by its Date header."""
    headers = (response.get("ResponseMetadata") or {}).get("HTTPHeaders") or {}
    try:
        found = parsedate_to_datetime(str(headers.get("date"))) - asked_at
    except (ValueError, TypeError):
        return timedelta()
    return found if abs(found) > SKEW else timedelta()
