"""A machine that signs in by itself: by a JWT that its platform gives it, or as a client.

The JWT is used as it is, or shown to a provider that gives a token for it.

See: RFC 6749, section 4.4 (client credentials); RFC 7523 (a JWT as a secret, or as a grant); RFC
8693 (token exchange); https://docs.github.com/en/actions/reference/security/oidc;
https://kubernetes.io/docs/concepts/storage/projected-volumes/#serviceaccounttoken
"""

import math
import time
from datetime import datetime, timedelta
from urllib.parse import quote

from keybroker.credential import Reference, Secret
from keybroker.errors import ConfigError, SourceDenied, SourceInvalid, SourceUnavailable
from keybroker.fields import GITHUB
from keybroker.login import jwt
from keybroker.login.oauth import Client, Granted, Refused
from keybroker.login.oidc import Oidc
from keybroker.login.provider import now, plain, said, unguessable
from keybroker.login.tokens import Tokens
from keybroker.login_types import BEARER, CLIENT, EXCHANGE, NONE
from keybroker.signin import GITHUB_VARIABLES
from keybroker.sources.http import Http
from keybroker.sources.reference import read_file, resolve
from keybroker.values import replace

GRANT = "urn:ietf:params:oauth:grant-type"
TOKEN = "urn:ietf:params:oauth:token-type"  # noqa: S105  # the beginning of its name
ASSERTION = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"
GRANTS = {CLIENT: CLIENT, BEARER: f"{GRANT}:jwt-bearer", EXCHANGE: f"{GRANT}:token-exchange"}
USABLE = (f"{TOKEN}:access_token", f"{TOKEN}:jwt")
LONGEST = timedelta(days=3650)
ASSERTED_SECONDS = 60  # how long what we sign is good
IN_A_JOB = "only a job of GitHub Actions with `permissions: id-token: write` has it"


class Workload(Oidc):
    """Asks for a token whenever one is due; there is nobody who could have to sign in."""

    @property
    def flows(self) -> tuple[str, ...]:
        return ()

    def refresh(self, tokens: Tokens | None) -> Tokens:
        """Have a token; see `Provider`."""
        shown = None if self._settings["jwt"] is None else self._jwt()
        if self._settings["grant"] == NONE:
            assert shown is not None, "it would have nothing to use"
            return self._kept(shown, now(), None, shown)
        granted = self._granted(shown)
        return self._kept(granted.access, granted.asked_at, granted.life, shown)

    def revoke(self, tokens: Tokens) -> bool:
        """End the token where that can be done; see `Provider`."""
        grant = self._settings["grant"]
        if grant == NONE or self._settings["token_url"] is not None:
            return False
        if "revocation_endpoint" not in self._described():
            return False
        http, path = self._at("revocation_endpoint")
        proof = self._proof(self._jwt() if self._settings["jwt"] is not None else None)
        return self._client().revoke(http, path, tokens.access, "access_token", **proof)

    # the provider

    def _granted(self, shown: Secret | None) -> Granted:
        """Have the provider give a token."""
        grant = self._settings["grant"]
        more = {**self._wishes(), **self._proof(shown)}
        if grant == BEARER:
            more["assertion"] = _text(shown)
        if grant == EXCHANGE:
            more["subject_token"] = _text(shown)
            more["subject_token_type"] = f"{TOKEN}:{self._settings['jwt_type']}"
            more["requested_token_type"] = USABLE[0]
        http, path = self._at("token_endpoint")
        try:
            found = self._client().grant(
                http, path, GRANTS[grant], self._settings["scopes"], **more
            )
        except Refused as refused:
            about = f": {refused.description}" if refused.description else ""
            raise SourceDenied(
                f"{self._who}: {http.host} gives no token ({refused.error}{about})",
                hint=self._to_trust(shown),
            ) from None
        given = found.values.get("issued_token_type")
        if grant == EXCHANGE and given not in USABLE:
            raise SourceInvalid(
                f"{self._who}: {http.host} gave another kind of token ({said(given) or 'unnamed'})"
            )
        return found

    def _proof(self, shown: Secret | None) -> dict[str, str]:
        """Return what the client is known by, where that is a JWT."""
        if self._settings["private_key"] is not None:
            assertion = self._signed()
        elif self._settings["grant"] == CLIENT and shown is not None:
            assertion = shown.reveal()
        else:
            return {}
        return {"client_assertion_type": ASSERTION, "client_assertion": assertion}

    def _signed(self) -> str:
        client, file = self._settings["client_id"], self._settings["private_key"]
        at = int(time.time())
        claims = {
            "iss": client,
            "sub": client,
            "aud": self._settings["token_url"] or self._described()["issuer"],
            "iat": at,
            "exp": at + ASSERTED_SECONDS,
            "jti": unguessable(),
        }
        try:
            return jwt.sign(claims, read_file(file), self._settings["key_id"])
        except ValueError:
            raise ConfigError(
                f"{self._who}: {file} is no private key",
                hint="of RSA, or on a curve of NIST's: PEM without a password, or a JWK",
            ) from None

    def _client(self, method: str = "") -> Client:
        if self._settings["token_url"] is None:
            return super()._client(method)
        return Client(self._who, self._settings["client_id"], self._client_secret())

    def _at(self, name: str) -> tuple[Http, str]:
        url = self._settings["token_url"]
        return super()._at(name) if url is None else (self._http(url, "token_url"), "")

    def _to_trust(self, shown: Secret | None) -> str:
        """Say by what the provider had to know us: what it does not trust is in one of these."""
        claims = None if shown is None else jwt.read_claims(shown.reveal())
        if claims is None:
            return "see client_id, and what it is known by there"
        facts = {name: _listed(claims.get(name)) for name in ("iss", "sub", "aud")}
        return f"it was shown {', '.join(f'{name} {value}' for name, value in facts.items())}"

    # the machine

    def _jwt(self) -> Secret:
        """Return what says who this machine is; it is read anew each time."""
        where = self._settings["jwt"]
        if isinstance(where, Reference):  # a platform keeps it in a file that is open to others
            return resolve(where, self._environment, open_to_others=True)
        assert where == GITHUB, "the one word that there is"
        url, secret = (self._variable(name) for name in GITHUB_VARIABLES)
        base, _, query = url.partition("?")
        audience = self._settings["jwt_audience"]
        more = [f"audience={quote(audience, safe='')}"] if audience is not None else []
        http = self._http(base, GITHUB_VARIABLES[0])
        headers = {"authorization": f"Bearer {secret}", "accept": "application/json"}
        reply = http.call("GET", f"?{'&'.join([query, *more])}", headers=headers)
        if reply.status in (401, 403):
            problem = f"{self._who}: {http.host} will not say who this job is ({reply.status})"
            raise SourceDenied(problem, hint=IN_A_JOB)
        if reply.status != 200:
            raise self._trouble(reply, http.host, "say who this job is")
        return self._secret(plain(reply.value).get("value"), "job's JWT")

    def _variable(self, name: str) -> str:
        if not (value := self._environment.get(name, "").strip()):
            raise ConfigError(f"{self._who}: {name} is not set", hint=IN_A_JOB)
        return value

    # reading

    def _kept(
        self, access: Secret, at: datetime, life: timedelta | None, shown: Secret | None
    ) -> Tokens:
        """Return what was given, with what may be said of it."""
        claims = jwt.read_claims(access.reveal())
        if claims is None and access is shown:
            raise SourceInvalid(f"{self._who}: what says who this machine is, is no JWT")
        if life is None:
            life = _left(plain(claims).get("exp"), at)
        if life is not None and life <= timedelta(0):
            raise SourceUnavailable(
                f"{self._who}: the token has ended already",
                hint="is it replaced where it is from? is this machine's clock right?",
            )
        known = plain(claims) or plain(None if shown is None else jwt.read_claims(shown.reveal()))
        who = said(known.get("sub")) or self._settings["client_id"] or ""
        made = self._made(access, at, life or self._settings["lasts"], who=who)
        return replace(made, standing=replace(made.standing, renewable=True, ends_at=None))


def _text(shown: Secret | None) -> str:
    assert shown is not None, "such a login has a JWT to show"
    return shown.reveal()


def _left(ends: object, at: datetime) -> timedelta | None:
    """Return how long a token lives whose end is a number of seconds; None: it does not say."""
    if isinstance(ends, bool) or not isinstance(ends, int | float) or not math.isfinite(ends):
        return None
    return timedelta(seconds=min(max(ends - at.timestamp(), 0.0), LONGEST.total_seconds()))


def _listed(value: object) -> str:
    """Return a claim as it can be shown; `aud` may be several."""
    several = value if isinstance(value, list) else [value]
    return " and ".join(filter(None, map(said, several))) or "nothing"
