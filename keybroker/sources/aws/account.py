"""One account of AWS's: boto3 finds who we are and makes the calls, this says what came of them.

Nothing of the chain of credentials is written here. What it obtains and could use again, such as
an assumed role, is handed to the broker, which keeps it for the next worker.

See: https://docs.aws.amazon.com/sdkref/latest/guide/standardized-credentials.html
"""

import json
import os
import re
import shlex
import signal
import subprocess
from base64 import b64decode, b64encode
from collections.abc import Collection, Iterator, Mapping, MutableMapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from functools import partial
from typing import Any

import boto3  # type: ignore[import-untyped]
import botocore.config  # type: ignore[import-untyped]
import botocore.credentials  # type: ignore[import-untyped]
import botocore.exceptions as problems  # type: ignore[import-untyped]
import botocore.parsers  # type: ignore[import-untyped]
import botocore.session  # type: ignore[import-untyped]
import botocore.utils  # type: ignore[import-untyped]

from keybroker import __version__
from keybroker.aws import Account as Place
from keybroker.aws import read_sign_in, session_of
from keybroker.credential import Reference, Secret, Session
from keybroker.errors import (
    KeybrokerError,
    LoginNeeded,
    SourceDenied,
    SourceError,
    SourceInvalid,
)
from keybroker.signin import client_of, read_text
from keybroker.sources.aws.refusals import (
    ENDED,
    KMS,
    NO_ANSWER,
    NOT_KNOWN,
    SET_THE_CLOCK,
    SIGN_IN,
    UNUSABLE,
    WEB_IDENTITY,
    Problem,
    facts,
    is_about_the_call,
    is_denial,
    of_answer,
    of_exception,
)
from keybroker.sources.held import Held
from keybroker.sources.signed_in import read_reference
from keybroker.values import dataclass, field, replace

# Another try is the broker's to make, who knows when a key ends.
CALLS = botocore.config.Config(
    connect_timeout=3,
    read_timeout=5,
    retries={"total_max_attempts": 1},
    user_agent_extra=f"keybroker/{__version__}",
)
IDENTITY = botocore.config.Config(connect_timeout=1, read_timeout=1)
NO_PROFILE = {"profile": (None, None, None, None)}  # no variable names one
PROGRAM_SECONDS = 5.0  # the longest that a credential_process may take
MOST_AT_ONCE = 20  # secrets in one BatchGetSecretValue
FORESEEN_FOR = timedelta(seconds=10)  # then it is asked for anew
LONGEST_TEXT = 200
SKEW = timedelta(seconds=30)  # the header counts whole seconds and the call took its time
ARN = re.compile(r"arn:aws[a-z-]*:(?:iam|sts)::[0-9]{12}:[!-~]{1,256}")
# What botocore lets through where it was given something else than it expected.
STUMBLES = (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError)


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


class Program(subprocess.Popen[bytes]):
    """A credential_process: it has nobody to ask, and does not make us wait for ever."""

    def __init__(self, command: list[str], **given: Any) -> None:
        super().__init__(command, stdin=subprocess.DEVNULL, start_new_session=True, **given)

    def communicate(self, *_: Any, **__: Any) -> tuple[bytes, bytes]:
        """Return what it wrote."""
        try:
            return super().communicate(timeout=PROGRAM_SECONDS)
        except subprocess.TimeoutExpired:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)  # and all that it started
            self.wait()
            raise problems.CredentialRetrievalError(provider="late-process", error_msg="") from None


def no_code(_: str) -> str:
    """Stand in for who would ask at the terminal for a code of a second factor."""
    raise problems.RefreshWithMFAUnsupportedError()


# botocore looks these up when it makes a chain; as it has them, they wait without an end and ask.
_chain = botocore.credentials
_chain.ProcessProvider = partial(_chain.ProcessProvider, popen=Program)
_chain.AssumeRoleProvider = partial(_chain.AssumeRoleProvider, prompter=no_code)
botocore.utils.ContainerMetadataFetcher.RETRY_ATTEMPTS = 1


class Account:
    """
    Asks Secrets Manager as one account.

    Attributes:
        who: What messages call it: its profile and region.
    """

    def __init__(self, place: Place, held: Held) -> None:
        self._place = place
        self._held = held
        self.who = f"aws: {place}"
        self._kept = _Kept(held, session_of(place.text))
        self._core: Any = None
        self._client: Any = None
        self._foreseen: dict[str, list[Answer | KeybrokerError]] = {}
        self._one_by_one = False  # who we are may not read several at once

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
        """
        Read several secrets with one call; who asks for one of them next has it from here.

        What keeps the call from being answered would keep each of them, and is not tried for each.
        """
        self._foreseen.clear()
        wanted = list(dict.fromkeys(secrets))
        for n in range(0, len(wanted), MOST_AT_ONCE):
            some = wanted[n : n + MOST_AT_ONCE]
            if self._one_by_one or len(some) < 2:
                return
            found = self._read_together(some)
            for name in some:
                if name in found:
                    self._foreseen[name] = [found[name]] * secrets.count(name)

    def foreseen(self, secret: str) -> Answer | None:
        """
        Return what was read of a secret together with others, once for each who asked.

        Raises:
            SourceError, ConfigError: They could not be read, nor could this one now.
        """
        waiting = self._foreseen.get(secret)
        if not waiting:
            return None
        found = waiting.pop()
        if isinstance(found, KeybrokerError):
            raise found
        return found if datetime.now(UTC) - found.asked_at < FORESEEN_FOR else None

    def _read_together(self, some: list[str]) -> dict[str, Answer | KeybrokerError]:
        """Return what is there of some secrets, by the names that they were asked for with."""
        operation, asked_at = "BatchGetSecretValue", datetime.now(UTC)
        try:
            with self._translated(operation, ""):
                try:
                    found = self._connected().batch_get_secret_value(SecretIdList=some)
                except problems.ClientError as error:
                    code, status, message = facts(error.response)
                    its_own = str(error.operation_name) == operation
                    if its_own and is_about_the_call(code, status, message):
                        self._one_by_one = True  # each is read by itself, and says what is wrong
                        return {}
                    raise
                values = found.get("SecretValues", found.get("Errors"))
                if not isinstance(values, list):
                    raise self.error("", NO_ANSWER)
                skew = _skew(found, asked_at)
                answers = [Answer(one, asked_at, skew) for one in found.get("SecretValues") or ()]
                return {str(one.value.get(n)): one for one in answers for n in ("ARN", "Name")}
        except KeybrokerError as error:
            return dict.fromkeys(some, error)

    def error(self, secret: str, problem: Problem) -> KeybrokerError:
        """Put a problem with a secret into words: who asked for what, and what came of it."""
        room = LONGEST_TEXT - len(f"{self.who}: : {problem.words}")
        name = secret.rpartition(":secret:")[2]
        if len(name) > room:
            name = f"…{name[1 - room :]}" if room > 1 else ""
        about = f"{name}: " if name else ""
        text = f"{self.who}: {about}{problem.words}"[:LONGEST_TEXT]
        hint = problem.hint
        if hint is not None and self._place.profile is not None:
            asks = "aws sts get-caller-identity"
            hint = hint.replace(asks, f"{asks} --profile {self._place.profile}")
        if not issubclass(problem.kind, SourceError):
            return problem.kind(text, hint=hint)
        return problem.kind(
            text,
            hint=hint,
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
        if self._place.login is not None and self._kept.is_of_another(_signed_in(self._place)):
            self.close()
        if self._client is not None:
            return self._client
        by_login = self._place.web_identity is not None
        self._core = core = botocore.session.Session(NO_PROFILE if by_login else None)
        core.set_default_client_config(CALLS)
        try:
            session = boto3.session.Session(
                botocore_session=core,
                profile_name=self._named_profile(),
                region_name=self._place.region,
            )
            self.who = f"aws: {replace(self._place, region=session.region_name)}"
            if self._place.web_identity is None:
                chain = botocore.credentials.create_credential_resolver(
                    core, cache=self._kept, region_name=session.region_name
                )
            else:
                chain = _chain.CredentialResolver([self._by_login(self._place.web_identity)])
            core.register_component("credential_provider", chain)
        except (*STUMBLES, OSError) as error:
            raise self._unusable(error) from None
        try:
            found = core.get_credentials()
            if found is None:
                raise problems.NoCredentialsError()
            found.get_frozen_credentials()
        except RuntimeError:  # they are refreshed, and have ended all the same
            raise self.error("", ENDED) from None
        except (*STUMBLES, OSError) as error:  # of a program, a file
            if isinstance(error, problems.BotoCoreError):
                raise
            raise problems.CredentialRetrievalError(provider=self._way(), error_msg="") from None
        try:
            self._client = session.client("secretsmanager")
        except (*STUMBLES, OSError) as error:
            raise self._unusable(error) from None
        return self._client

    def _by_login(self, login: Reference) -> Any:
        """Return what takes the role with the token of a login, read anew each time."""

        def token() -> str:
            return read_reference(login, os.environ, self._held).reveal()

        fetcher = _chain.AssumeRoleWithWebIdentityCredentialFetcher(
            client_creator=self._core.create_client,
            web_identity_token_loader=token,
            role_arn=self._place.role_arn,
            extra_args={"RoleSessionName": "keybroker"},
            cache=self._kept,
        )
        return _ByLogin(fetcher)

    def _unusable(self, error: Exception) -> Exception:
        """Return what to raise when botocore stumbles over a value that a file or variable has."""
        return error if isinstance(error, problems.BotoCoreError) else self.error("", UNUSABLE)

    def _named_profile(self) -> str | None:
        """
        Return the profile, if it was not a variable that named it.

        A profile that is named goes before keys in variables; one that a variable names does not.
        """
        environ = os.environ
        theirs = environ.get("AWS_DEFAULT_PROFILE") or environ.get("AWS_PROFILE")
        return None if self._place.profile == theirs else self._place.profile

    def _way(self) -> str:
        """Return botocore's word for how credentials are come by, as far as it has a file."""
        settings = self._settings()
        if "credential_process" in settings:
            return "custom-process"
        if "sso_session" in settings or "sso_start_url" in settings:
            return "sso"
        variable = "AWS_WEB_IDENTITY_TOKEN_FILE"
        if "web_identity_token_file" in settings or variable in os.environ:
            return "assume-role-with-web-identity"
        return ""

    def _settings(self) -> Mapping[str, Any]:
        """Return what ~/.aws/config says of the profile."""
        with suppress(problems.BotoCoreError, *STUMBLES):
            found = self._core.get_scoped_config()
            return found if isinstance(found, dict) else {}
        return {}

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
        except (botocore.parsers.ResponseParserError, *STUMBLES):
            raise self.error(secret, NO_ANSWER) from None
        except RuntimeError:
            raise self.error("", ENDED) from None

    def _refusal(self, operation: str, secret: str, error: Any) -> KeybrokerError:
        code, status, message = facts(error.response)
        asked = str(error.operation_name)
        if asked != operation:  # of whoever has the credentials: STS, the sign-in
            return self._no_credentials(asked, code, status, error)
        if is_denial(code, status) or code in KMS:
            return self._denied(operation, secret, code, message)
        problem = _with_clock(of_answer(code, status, message), error)
        if problem in NOT_KNOWN:
            self._kept.forget()
        if problem.kind is SourceDenied:
            self.close()
            secret = ""
        return self.error(secret, problem)

    def _denied(self, operation: str, secret: str, code: str, message: str) -> KeybrokerError:
        """Say who may not do what, and what would allow it."""
        who = self._identity()
        self.close()  # another policy may come with other credentials
        self._kept.forget()
        if code in KMS or "KMS" in message:
            action = "kms:Decrypt" if operation.startswith("Get") else "kms:GenerateDataKey"
            words = f"{who} may not use the key that encrypts it"
            hint = f"allow it {action}; aws kms describe-key says if the key is enabled"
            return self.error(secret, Problem(SourceDenied, words, hint))
        words = f"{who} may not {operation}"
        hint = f"if its name and region are right, allow it secretsmanager:{operation}"
        return self.error(secret, Problem(SourceDenied, words, hint))

    def _no_credentials(self, asked: str, code: str, status: int, error: Any) -> KeybrokerError:
        """Say why STS, or the sign-in, gave no credentials."""
        role = self._role()
        self.close()
        if is_denial(code, status) and self._place.web_identity is not None:
            words = f"the token of {self._place.web_identity} does not give {role}"
            hint = "see whom it is for, and the role's trust: the provider, audience and subject"
            return self.error("", Problem(SourceDenied, words, hint))
        if is_denial(code, status) and asked.startswith("AssumeRole"):
            words = f"its credentials may not assume {role}"
            hint = "allow it sts:AssumeRole, and have the role trust it; see ~/.aws/config"
            return self.error("", Problem(SourceDenied, words, hint))
        if is_denial(code, status):
            hint = "see sso_account_id and sso_role_name in ~/.aws/config"
            return self.error("", Problem(SourceDenied, "its sign-in has no such role", hint))
        problem = _with_clock(of_answer(code, status, facts(error.response)[2]), error)
        if self._place.web_identity is not None and problem.hint == WEB_IDENTITY:
            hint = f"see the token of {self._place.web_identity}: who made it, and for whom"
            problem = replace(problem, hint=hint)
        if problem.kind is SourceInvalid:
            problem = replace(problem, hint=f"see {role} and its settings in ~/.aws/config")
        if problem.kind is not SourceDenied:
            problem = replace(problem, words=f"{asked} {problem.words}")
        return self.error("", problem)

    def _role(self) -> str:
        """Return the role that is assumed, if it is plain which."""
        if self._place.role_arn is not None:
            return self._place.role_arn
        settings = self._settings()
        role = settings.get("role_arn") or os.environ.get("AWS_ROLE_ARN")
        first = settings.get("source_profile")
        with suppress(problems.BotoCoreError, *STUMBLES):
            profiles = self._core.full_config["profiles"]
            if first != self._place.profile and "role_arn" in profiles.get(first, {}):
                return "a role"  # of several in a row
        return role if isinstance(role, str) and role.startswith("arn:") else "the role"

    def _identity(self) -> str:
        """Return the ARN that AWS knows us by, for which no permission is needed."""
        try:
            client = self._core.create_client("sts", config=IDENTITY)
            try:
                arn = client.get_caller_identity().get("Arn")
            finally:
                client.close()
        except (problems.BotoCoreError, problems.ClientError, botocore.parsers.ResponseParserError):
            return "this identity"
        except (*STUMBLES, RuntimeError):
            return "this identity"
        return arn if isinstance(arn, str) and ARN.fullmatch(arn) else "this identity"

    def _for_us(self, problem: Problem) -> Problem:
        """Name the profile in what is to be typed, and a credential_process that is ourselves."""
        if problem.hint == SIGN_IN and self._place.login is not None:
            name = read_text(str(self._place.login.value)).name
            return replace(problem, kind=LoginNeeded, hint=f"run: keybroker login {name}")
        if problem.hint == SIGN_IN and self._place.profile is not None:
            return replace(problem, hint=f"{SIGN_IN} --profile {self._place.profile}")
        if "credential_process" in problem.words and self._asks_itself():
            hint = "it is keybroker, which would wait for itself; see ~/.aws/config"
            return replace(problem, hint=hint)
        return problem

    def _asks_itself(self) -> bool:
        with suppress(ValueError):
            words = shlex.split(str(self._settings().get("credential_process", "")))
            return any(os.path.basename(word).startswith("keybroker") for word in words)
        return False


class _ByLogin(botocore.credentials.CredentialProvider):  # type: ignore[misc]
    """The only link of a chain: whatever else is found here is not who we are."""

    METHOD = "assume-role-with-web-identity"

    def __init__(self, fetcher: Any) -> None:
        super().__init__()
        self._fetcher = fetcher

    def load(self) -> Any:
        """Return credentials that are fetched when they are needed."""
        return botocore.credentials.DeferredRefreshableCredentials(
            method=self.METHOD, refresh_using=self._fetcher.fetch_credentials
        )


def _signed_in(place: Place) -> str:
    """Tell the sign-in that there is at AWS from another; empty where nobody is signed in."""
    assert place.login is not None, "it is asked of such alone"
    found = read_sign_in(str(read_text(str(place.login.value)).at_aws))
    return "" if found is None else client_of(found)


class _Kept(MutableMapping[str, Any]):
    """What botocore keeps of roles and sign-ins, as one session that the broker has."""

    def __init__(self, held: Held, name: str) -> None:
        self._held, self._name = held, name
        self._of = ""  # whose sign-in it came of

    def is_of_another(self, sign_in: str) -> bool:
        """Go on with a sign-in; say whether what was kept came of another, which is let go."""
        self._of = sign_in
        known = self._held.get(self._name)
        if known.secret is None or known.material == sign_in:
            return False
        self.forget()
        return True

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
        self._held.put(
            Session(self._name, secret=secret, issued_at=now, expires_at=ends, material=self._of)
        )

    def forget(self) -> None:
        """Keep nothing: AWS does not take it any more."""
        if self._read():
            self._held.put(Session(self._name))

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
        try:
            found = json.loads(b64decode(secret.reveal()))
        except ValueError:  # of another version
            return {}
        return found if isinstance(found, dict) else {}


def _end(kept: Mapping[str, Any]) -> datetime:
    """Return when credentials end that botocore keeps; they have ended if nobody can tell."""
    try:
        ends = kept["Credentials"]["Expiration"]
        text = ends.isoformat() if isinstance(ends, datetime) else str(ends)
        return datetime.fromisoformat(text.replace("UTC", "+00:00")).astimezone(UTC)
    except STUMBLES:
        return datetime.min.replace(tzinfo=UTC)


def _with_clock(problem: Problem, error: Any) -> Problem:
    """Say how wrong the clock is, where it is the clock that is wrong."""
    ahead = -_skew(error.response, datetime.now(UTC))
    if problem.hint != SET_THE_CLOCK or not ahead:
        return problem
    way = "ahead" if ahead > timedelta() else "behind"
    minutes = max(1, round(abs(ahead) / timedelta(minutes=1)))
    return replace(problem, words=f"{problem.words}: it is {minutes} min {way}")


def _skew(response: Mapping[str, Any], asked_at: datetime) -> timedelta:
    """Say how far AWS's clock is ahead of ours, by its Date header."""
    headers = (response.get("ResponseMetadata") or {}).get("HTTPHeaders") or {}
    try:
        found = parsedate_to_datetime(str(headers.get("date"))) - asked_at
    except (ValueError, TypeError, OverflowError):
        return timedelta()
    return found if abs(found) > SKEW else timedelta()
