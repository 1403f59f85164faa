"""IAM Identity Center: a code that is typed on AWS's page. What it gives is kept as AWS's own
programs keep it, in their place, so that they and we go on with it; they also renew it.

See: https://docs.aws.amazon.com/singlesignon/latest/OIDCAPIReference/Welcome.html
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import botocore.config  # type: ignore[import-untyped]
import botocore.exceptions as problems  # type: ignore[import-untyped]
import botocore.parsers  # type: ignore[import-untyped]
import botocore.session  # type: ignore[import-untyped]
import botocore.utils  # type: ignore[import-untyped]
from botocore import UNSIGNED

from keybroker import __version__, aws
from keybroker.credential import Secret
from keybroker.errors import (
    CacheError,
    ConfigError,
    KeybrokerError,
    SourceDenied,
    SourceInvalid,
    SourceUnavailable,
)
from keybroker.login.provider import DEVICE, SLOWER, Base, Device, needed, now, said, seconds, word
from keybroker.login.tokens import Store, Tokens
from keybroker.signin import VERSION, SignIn, client_of, encode_standing, file_of, standing_of
from keybroker.sources.aws.refusals import facts, of_answer, of_exception
from keybroker.values import replace

DEVICE_GRANT = "urn:ietf:params:oauth:grant-type:device_code"
SCOPES = ("sso:account:access",)  # with which a sign-in is renewed
OURS = ("startUrl", "region", "clientId", "clientSecret", "registrationExpiresAt")
STUMBLES = (ValueError, TypeError, KeyError, AttributeError, OverflowError)


class IdentityCenter(Base):
    """AWS's sign-in for a company, by botocore, which knows its calls."""

    flows = (DEVICE,)

    def __init__(self, sign_in: SignIn, environment: Mapping[str, str]) -> None:
        super().__init__(sign_in, environment)
        self._core = botocore.session.Session()
        self._clients: list[Any] = []

    def device(self) -> Device:
        """Begin a sign-in with a code, as a client registered for it; see `Provider`."""
        with self._translated():
            start_url, region, scopes = self._place()
            client = self._client("sso-oidc", region)
            registered = client.register_client(
                clientName=f"keybroker-{self._sign_in.name}",
                clientType="public",
                scopes=list(scopes),
            )
            as_client = {name: registered[name] for name in ("clientId", "clientSecret")}
            until = datetime.fromtimestamp(registered["clientSecretExpiresAt"], UTC)
            asked = client.start_device_authorization(startUrl=start_url, **as_client)
            code, lasts = asked["deviceCode"], float(asked["expiresIn"])
            url, typed = str(asked["verificationUri"]), said(asked["userCode"])
        known = {"startUrl": start_url, "region": region, **as_client}
        known["registrationExpiresAt"] = _written(until)

        def poll(interval: float) -> Tokens | float:
            asked_at = now()
            wait = client.exceptions
            try:
                with self._translated():
                    given = client.create_token(
                        grantType=DEVICE_GRANT, deviceCode=code, **as_client
                    )
                    return self._tokens(given, asked_at, known)
            except wait.AuthorizationPendingException:
                return interval
            except wait.SlowDownException:
                return interval + SLOWER
            except SourceUnavailable:
                return min(60.0, 2 * interval)

        interval = float(asked.get("interval", 5))
        whole = str(asked.get("verificationUriComplete") or "")
        return Device(url, typed, interval, lasts, poll, whole)

    def refresh(self, tokens: Tokens) -> Tokens:
        """Never called: who asks AWS with it renews it."""
        raise needed(self._sign_in, "AWS's programs renew it")

    def revoke(self, tokens: Tokens) -> bool:
        """End a session there; False where AWS does not know its token any more."""
        with self._translated():
            client = self._client("sso", tokens.extra["region"])
            try:
                client.logout(accessToken=tokens.access.reveal())
            except client.exceptions.UnauthorizedException:
                return False
        return True

    def close(self) -> None:
        super().close()
        for client in self._clients:
            client.close()
        self._clients.clear()

    def _place(self) -> tuple[str, str, tuple[str, ...]]:
        """Return the start page, the region and what is asked for."""
        session, settings = self._settings["session"], self._settings
        known = {} if session is None else self._core.full_config.get("sso_sessions", {})
        known = known.get(session, {})
        start_url = settings["start_url"] or known.get("sso_start_url")
        region = settings["region"] or known.get("sso_region")
        if not start_url or not region:
            raise ConfigError(
                f"{self._who}: ~/.aws/config has no [sso-session {session}] with sso_start_url "
                "and sso_region",
                hint="type: aws configure sso-session; or set start_url and region in the login",
            )
        named = str(known.get("sso_registration_scopes", "")).split(",")
        scopes = settings["scopes"] or tuple(filter(None, map(str.strip, named))) or SCOPES
        return str(start_url), str(region), scopes

    def _client(self, service: str, region: str) -> Any:
        config = botocore.config.Config(
            signature_version=UNSIGNED,
            connect_timeout=3,
            read_timeout=self._settings["timeout"].total_seconds(),
            retries={"total_max_attempts": 1},
            user_agent_extra=f"keybroker/{__version__}",
        )
        client = self._core.create_client(
            service, region_name=region, config=config, verify=self._settings["ca"]
        )
        self._clients.append(client)
        return client

    def _tokens(
        self, given: Mapping[str, Any], asked_at: datetime, known: Mapping[str, str]
    ) -> Tokens:
        refresh = given.get("refreshToken")
        return self._made(
            self._secret(given.get("accessToken"), "token"),
            asked_at,
            seconds(given.get("expiresIn")) or timedelta(hours=1),
            refresh=None if refresh is None else self._secret(refresh, "refresh token"),
            extra=dict(known),
        )

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """Raise what botocore raises as ours, but for what says to wait."""
        who = f"{self._who}: IAM Identity Center"
        try:
            yield
        except problems.ClientError as error:
            code, status, message = facts(error.response)
            if code in ("AuthorizationPendingException", "SlowDownException"):
                if error.operation_name == "CreateToken":
                    raise
                raise SourceUnavailable(f"{who} asks to wait", hint="try again later") from None
            raise self._refusal(who, code, status, message) from None
        except problems.BotoCoreError as error:
            problem = of_exception(error)
            raise problem.kind(f"{who} {problem.words}"[:200], hint=problem.hint) from None
        except (botocore.parsers.ResponseParserError, *STUMBLES):
            raise SourceUnavailable(f"{who} answers, but not as AWS does") from None

    def _refusal(self, who: str, code: str, status: int, message: str) -> KeybrokerError:
        hint = f"run: keybroker login {self._sign_in.name}"
        if code == "ExpiredTokenException":
            return SourceDenied(f"{self._who}: the sign-in took longer than its code", hint=hint)
        if code == "AccessDeniedException":
            return SourceDenied(f"{self._who}: the sign-in was refused", hint=hint)
        if status in (400, 401, 403) and not code.isdigit() and code:
            return SourceInvalid(
                f"{who} does not let anybody sign in so ({word(code)})",
                hint="see start_url and region: in the login, or in ~/.aws/config",
            )
        problem = of_answer(code, status, message)
        return problem.kind(f"{who} {problem.words}", hint=problem.hint)


class AwsCache(Store):
    """Where AWS's own programs keep a sign-in; how it began stands in a file of ours beside it."""

    def __init__(self, state: Path, sign_in: SignIn) -> None:
        super().__init__(state, None)
        self._sign_in = sign_in

    def load(self, sign_in: SignIn) -> Tokens | None:
        """Read what is kept, whoever began it."""
        standing = standing_of(self._state, sign_in)
        found = aws.read_sign_in(str(sign_in.at_aws))
        if standing is None or found is None:
            return None
        try:
            refresh = Secret(found["refreshToken"]) if found.get("refreshToken") else None
            extra = {name: str(found[name]) for name in OURS if name in found}
            return Tokens(standing, Secret(found["accessToken"]), refresh, extra)
        except (ValueError, TypeError):
            return None

    def save(self, tokens: Tokens) -> None:
        """Have AWS's own programs keep it; that one is signing out, they cannot know."""
        if tokens.standing.ended:
            return
        standing, session = tokens.standing, self._sign_in.settings["session"]
        token = {
            "startUrl": tokens.extra["startUrl"],
            "region": tokens.extra["region"],
            "accessToken": tokens.access.reveal(),
            "expiresAt": _written(standing.access_ends or standing.refreshed_at),
            **{name: tokens.extra[name] for name in OURS[2:]},
        }
        if tokens.refresh is not None:
            token["refreshToken"] = tokens.refresh.reveal()
        kept = {
            "version": VERSION,
            "standing": encode_standing(replace(standing, access_ends=None)),
            "client": client_of(token),
        }
        file = file_of(self._state, standing.name)
        try:
            self._disk.directory(file.parent)
            self._disk.replace(file, json.dumps(kept).encode())
            cache = botocore.utils.JSONFileCache(os.path.expanduser(aws.SIGN_INS))
            loader = botocore.utils.SSOTokenLoader(cache)
            loader.save_token(token["startUrl"], token, session_name=session)
        except OSError as error:
            raise CacheError(
                f"login {standing.name}: {aws.SIGN_INS}: cannot be written ({error.strerror})"
            ) from None

    def forget(self, name: str) -> None:
        """Remove it for AWS's own programs, too."""
        try:
            self._disk.remove(Path(aws.sign_in_file(str(self._sign_in.at_aws))))
        except OSError as error:
            raise CacheError(
                f"login {name}: {aws.SIGN_INS}: cannot be changed ({error.strerror})"
            ) from None
        super().forget(name)


def _written(moment: datetime) -> str:
    """Write a time as AWS's own programs do."""
    return f"{moment.astimezone(UTC):%Y-%m-%dT%H:%M:%SZ}"
