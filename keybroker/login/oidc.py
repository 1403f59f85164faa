"""OpenID Connect: discovery, a browser or a code, ID tokens that joserfc checks.

See: OpenID Connect Core 1.0 and Discovery 1.0; RFC 7636 (PKCE), RFC 8252 (native apps), RFC 9207
(`iss` in the answer), RFC 8707 (resource).
"""

import warnings
from collections.abc import Mapping
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

from joserfc import jwt
from joserfc.errors import JoseError, SecurityWarning
from joserfc.jwk import Key, KeySet

from keybroker.credential import Secret
from keybroker.errors import SourceError, SourceInvalid
from keybroker.login.jwt import read_claims
from keybroker.login.oauth import Client, Granted, Refused, as_error, code_of
from keybroker.login.provider import (
    BROWSER,
    DEVICE,
    Base,
    Device,
    HalfRenewedError,
    Visit,
    plain,
    said,
    seconds,
    unguessable,
)
from keybroker.login.tokens import Tokens
from keybroker.signin import SignIn
from keybroker.sources.http import Http
from keybroker.sources.reference import resolve
from keybroker.values import replace

# Asymmetric ones alone: a public key must never serve as a shared secret, and "none" is none.
ALGORITHMS = (
    *("RS256", "RS384", "RS512", "PS256", "PS384", "PS512"),
    *("ES256", "ES384", "ES512", "EdDSA", "Ed25519"),
)
LEEWAY = 60  # seconds by which two clocks may differ
ENDED = frozenset({"invalid_grant", "interaction_required", "login_required", "consent_required"})
ID_TOKEN = "id_token"  # noqa: S105  # a name
SUBJECT, METHOD = "sub", "method"


class Oidc(Base):
    """A provider that describes itself at `/.well-known/openid-configuration`."""

    def __init__(self, sign_in: SignIn, environment: Mapping[str, str]) -> None:
        super().__init__(sign_in, environment)
        self._issuer: str = self._settings["issuer"]
        self._known: dict[str, Any] = {}
        self._keys: KeySet | None = None
        self._as: Client | None = None

    @property
    def flows(self) -> tuple[str, ...]:
        known = self._described()
        found = [BROWSER] if "authorization_endpoint" in known else []
        return (*found, *([DEVICE] if "device_authorization_endpoint" in known else []))

    @property
    def redirect(self) -> tuple[str, int, str]:
        registered = urlsplit(self._settings["redirect"])
        return str(registered.hostname), super().redirect[1], registered.path

    def browser(self, redirect: str) -> Visit:
        """Begin a sign-in by code and PKCE; see `Provider`."""
        state, nonce, verifier = unguessable(), unguessable(), unguessable()
        wishes = self._wishes() | self._settings["parameters"]
        if "offline_access" in self._settings["scopes"]:
            wishes = {"prompt": "consent"} | wishes  # OpenID Connect Core, section 11
        url = self._client().address(
            self._endpoint("authorization_endpoint"),
            redirect,
            state=state,
            verifier=verifier,
            scopes=self._settings["scopes"],
            nonce=nonce,
            **wishes,
        )

        def redeem(answer: Mapping[str, str]) -> Tokens:
            code = self._answered(answer)
            http, path = self._at("token_endpoint")
            try:
                granted = self._client().redeem(
                    http, path, code, redirect, verifier, **self._resource()
                )
            except Refused as refused:
                raise as_error(refused, self._who, http.host, "sign in", person=True) from None
            return self._tokens(granted, nonce)

        return Visit(url, state, redeem)

    def device(self) -> Device:
        """Begin a sign-in by device code; see `Provider`."""
        return self._client().device(
            self._at("device_authorization_endpoint"),
            self._at("token_endpoint"),
            lambda granted: self._tokens(granted, None),
            self._settings["scopes"],
            **self._wishes(),
        )

    def refresh(self, tokens: Tokens) -> Tokens:
        """Have a new token; see `Provider`."""
        assert tokens.refresh is not None, "who has none does not ask"
        http, path = self._at("token_endpoint")
        try:
            client = self._client(tokens.extra.get(METHOD, ""))
            granted = client.refresh(http, path, tokens.refresh, **self._resource())
        except Refused as refused:
            if refused.error in ENDED:
                raise self._needed(f"{http.host} has ended the sign-in") from None
            raise as_error(refused, self._who, http.host, "renew the token") from None
        kept = replace(tokens, refresh=granted.refresh or tokens.refresh)
        try:
            return self._renewed(tokens, granted)
        except SourceError as error:
            raise HalfRenewedError(kept, error) from None

    def revoke(self, tokens: Tokens) -> bool:
        """End the sign-in at the provider; see `Provider`."""
        if "revocation_endpoint" not in self._described():
            return False
        http, path = self._at("revocation_endpoint")
        token, kind = tokens.refresh, "refresh_token"
        client = self._client(tokens.extra.get(METHOD, ""))
        used = token or tokens.access
        return client.revoke(http, path, used, kind if token else "access_token")

    # reading

    def _tokens(self, granted: Granted, nonce: str | None) -> Tokens:
        """Return what a sign-in gave; its ID token says who, and is checked."""
        text = granted.values.get(ID_TOKEN)
        claims: Mapping[str, Any] = {}
        if isinstance(text, str):
            claims = self._checked(text, nonce)
        elif self._id_is_used or "openid" in self._settings["scopes"]:
            raise SourceInvalid(
                f"{self._who}: the provider gave no ID token", hint='scopes has to name "openid"'
            )
        who = claims.get("email") or claims.get("preferred_username") or claims.get(SUBJECT)
        access, life = self._used(granted, text, claims)
        return self._made(
            access,
            granted.asked_at,
            life,
            who=said(who),
            refresh=granted.refresh,
            lasts=seconds(granted.values.get("refresh_expires_in")),
            extra={METHOD: self._client().method, **({SUBJECT: claims[SUBJECT]} if claims else {})},
        )

    def _renewed(self, before: Tokens, granted: Granted) -> Tokens:
        """Return what a renewal gave."""
        text = granted.values.get(ID_TOKEN)
        claims: Mapping[str, Any] = {}
        if self._id_is_used:  # else it need not come
            if not isinstance(text, str):
                raise SourceInvalid(
                    f"{self._who}: the provider renews no ID tokens", hint='set token = "access"'
                )
            claims = self._checked(text, None)
            if claims[SUBJECT] != before.extra.get(SUBJECT):
                raise self._wrong_id(SUBJECT)
        access, life = self._used(granted, text, claims)
        return self._again(
            before,
            access,
            granted.asked_at,
            life,
            refresh=granted.refresh,
            lasts=seconds(granted.values.get("refresh_expires_in")),
        )

    def _used(
        self, granted: Granted, text: Any, claims: Mapping[str, Any]
    ) -> tuple[Secret, timedelta | None]:
        """Return the token that is used, and for how long it is good."""
        if not self._id_is_used:
            return granted.access, granted.life or _life(granted.values["access_token"])
        life = seconds(claims["exp"] - claims["iat"])  # by their clock alone: ours may be wrong
        if life is None:
            raise self._wrong_id("exp")
        return self._secret(text, "ID token"), life

    @property
    def _id_is_used(self) -> bool:
        return bool(self._settings["token"] == "id")  # noqa: S105  # a word of the configuration

    def _checked(self, text: str, nonce: str | None) -> Mapping[str, Any]:
        """Check an ID token: who signed it, for whom, when, and that it answers us."""
        for again in (False, True):
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", SecurityWarning)  # of a name: EdDSA
                    token = jwt.decode(text, self._key_set(anew=again), algorithms=list(ALGORITHMS))
                break
            except (JoseError, ValueError, KeyError, TypeError) as error:
                if again:  # the provider's keys may have been replaced
                    raise self._wrong_id(type(error).__name__) from None
        claims: Mapping[str, Any] = token.claims
        client = self._settings["client_id"]
        wanted: dict[str, Any] = {
            "iss": {"essential": True, "value": self._described()["issuer"]},
            "aud": {"essential": True, "value": client},
            "exp": {"essential": True},
            "iat": {"essential": True},
            "sub": {"essential": True},
        }
        if nonce is not None:
            wanted["nonce"] = {"essential": True, "value": nonce}
        try:
            jwt.JWTClaimsRegistry(leeway=LEEWAY, **wanted).validate(dict(claims))
        except (JoseError, ValueError, TypeError) as error:
            claim = getattr(error, "claim", None)
            raise self._wrong_id(str(claim or type(error).__name__)) from None
        several = isinstance(claims["aud"], list) and len(claims["aud"]) > 1
        if (several or "azp" in claims) and claims.get("azp") != client:
            raise self._wrong_id("azp")
        return claims

    def _wrong_id(self, what: str) -> SourceInvalid:
        return SourceInvalid(
            f"{self._who}: the ID token is not what it should be ({what})",
            hint="see issuer and client_id; is this machine's clock right?",
        )

    def _answered(self, answer: Mapping[str, str]) -> str:
        """Return an answer's code; refuse one that is another provider's, or says no."""
        known = self._described()
        supported = known.get("authorization_response_iss_parameter_supported") is True
        if answer.get("iss", known["issuer"] if not supported else "") != known["issuer"]:
            raise SourceInvalid(f"{self._who}: the answer is of another provider")
        return code_of(answer, self._who, urlsplit(self._issuer).netloc)

    # the provider

    def _wishes(self) -> dict[str, str]:
        named = {name: self._settings[name] for name in ("resource", "audience")}
        return {name: value for name, value in named.items() if value is not None}

    def _resource(self) -> dict[str, str]:
        resource = self._settings["resource"]
        return {} if resource is None else {"resource": resource}

    def _client(self, method: str = "") -> Client:
        """Return the client that we are; `method`: how its secret was sent the last time."""
        if self._as is None:
            known = self._described().get("token_endpoint_auth_methods_supported")
            methods = [method] if method else known if isinstance(known, list) else ()
            secret = self._client_secret()
            self._as = Client(self._who, self._settings["client_id"], secret, methods)
        return self._as

    def _client_secret(self) -> Secret | None:
        reference = self._settings["client_secret"]
        return None if reference is None else resolve(reference, self._environment)

    def _described(self) -> Mapping[str, Any]:
        """Return what the provider says of itself, which must be of itself."""
        if not self._known:
            http = self._http(self._issuer)
            reply = http.call("GET", "/.well-known/openid-configuration")
            found = plain(reply.value)
            if reply.status != 200 or not isinstance(found.get("issuer"), str):
                if reply.status in (200, 404):
                    raise SourceInvalid(
                        f"{self._who}: {http.host} does not describe itself ({reply.status})",
                        hint="see issuer: /.well-known/openid-configuration is looked for below it",
                    )
                raise self._trouble(reply, http.host, "describe itself")
            if found["issuer"].rstrip("/") != self._issuer:
                raise SourceInvalid(
                    f"{self._who}: {http.host} calls itself something else than issuer",
                    hint="write issuer exactly as the provider does",
                )
            self._known = found
        return self._known

    def _endpoint(self, name: str) -> str:
        url = self._described().get(name)
        if not isinstance(url, str) or not url.startswith(("https://", "http://")):
            raise SourceInvalid(f"{self._who}: the provider names no {name}")
        if url.startswith("http://") and self._issuer.startswith("https://"):
            raise SourceInvalid(f"{self._who}: {name} is without TLS")
        return url

    def _at(self, name: str) -> tuple[Http, str]:
        return self._http(self._endpoint(name)), ""

    def _key_set(self, *, anew: bool) -> KeySet:
        if self._keys is None or anew:
            http, path = self._at("jwks_uri")
            reply = http.call("GET", path)
            if reply.status != 200:
                raise self._trouble(reply, http.host, "give its keys")
            self._keys = KeySet([key for one in reply.value["keys"] for key in _known_keys(one)])
        return self._keys


def _known_keys(found: Any) -> list[Key]:
    """Read a key of a set; one of a kind that nobody here knows is none (RFC 7517, section 5)."""
    try:
        return KeySet.import_key_set({"keys": [found]}).keys
    except (JoseError, ValueError, KeyError, TypeError):
        return []


def _life(token: str) -> timedelta | None:
    """Return for how long a token is good that says so itself, where the answer did not."""
    claims = read_claims(token) or {}
    try:
        return seconds(claims["exp"] - claims["iat"])
    except (KeyError, TypeError):
        return None
