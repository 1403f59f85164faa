"""How to get into a Vault, and how to stay in: one login in the life of a token.

See: https://developer.hashicorp.com/vault/docs/auth
"""

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from keybroker import login
from keybroker.credential import Reference, Secret, Session, fingerprint
from keybroker.errors import (
    CLASSES,
    CacheError,
    ConfigError,
    KeybrokerError,
    LoginNeeded,
    SourceDenied,
    SourceError,
    SourceInvalid,
    SourceUnavailable,
)
from keybroker.signin import SignIn
from keybroker.sources.held import Held
from keybroker.sources.http import Reply
from keybroker.sources.signed_in import read_reference
from keybroker.sources.vault import methods
from keybroker.sources.vault.refusals import ended, refusal, signed_in
from keybroker.sources.vault.server import Call, Server, part, renewed, said, seconds
from keybroker.values import replace
from keybroker.vault import PASSWORDS, Vault

SHORTEST_BACKOFF = timedelta(seconds=1)
LONGEST_BACKOFF = timedelta(minutes=5)
LONGEST_REST = timedelta(hours=1)  # a server's own wish included
NEVER = timedelta(days=3650)
MOST_REFUSALS = 2  # of a password; a few more lock the user
LEAST_MARGIN = timedelta(seconds=1)
CLEARED: dict[str, Any] = {"failures": 0, "refusals": 0, "not_before": None, "trouble": None}


class Login:
    """
    Makes calls with a session: one that is held, renewed, or begun anew.

    Args:
        ends: They are to end what was made, which may be done while signing out as well.

    Attributes:
        used: What the last call was made with.
    """

    def __init__(
        self,
        vault: Vault,
        server: Server,
        environment: Mapping[str, str],
        held: Held,
        *,
        ends: bool = False,
    ) -> None:
        self._ends = ends
        self._vault = vault
        self._server = server
        self._environment = environment
        self._held = held
        self._who = f"vault: {server.host}"
        self.used = Session(vault.session)

    def ask(
        self,
        call: Call,
        path: str,
        capability: str,
        *,
        makes: bool = False,
        leases: bool = False,
    ) -> Reply:
        """
        Make a call with a token that is alive.

        Args:
            path: What it is about.
            capability: What a policy has to allow there.
            makes: It leaves something behind.
            leases: What it makes ends with the token, which should have most of its life left.

        Returns:
            What Vault answered, unless it is 401 or 403.

        Raises:
            SourceDenied: The policy forbids it, or no login is to be had.
            SourceError: As `Server.ask`, of the call or of a login; only what the call itself
                may have made is `unknown`.
        """
        for last in (False, True):
            self.used = session = self.session(leases=leases)
            reply = self._server.ask(call, session.secret, makes=makes)
            if reply.status not in (401, 403) and "missing client token" not in said(reply):
                return reply
            if (self._rests(session) and not session.failures) or self._lives(session):
                break
            if self._vault.method == "agent":
                raise SourceUnavailable(
                    f"{self._who}: the agent sends no token that is alive",
                    hint="see its log; it needs auto_auth, and api_proxy with "
                    "use_auto_auth_token = true",
                )
            if self._vault.method == "token":  # the same one is all that there is
                error = ended(self._vault, self._server.host)
                self._fail(replace(session, secret=None), error)
                if (sign_in := signed_in(self._vault)) is not None and session.secret is not None:
                    login.over(
                        sign_in, self._held.sign_ins, session.secret, "Vault has ended the token"
                    )
                raise error
            # Where the policy does not let a token look at itself, a new one says as little: it
            # is given a rest, so that not every call begins with a login.
            rest = datetime.now(UTC) + LONGEST_BACKOFF if last else None
            self._held.put(
                replace(session, secret=session.secret if last else None, not_before=rest)
            )
        raise SourceDenied(
            f"{self._who}: the token may not {capability} {path}"[:200],
            hint=_to_allow(path, capability),
        )

    def session(self, *, leases: bool = False) -> Session:
        """
        Return a session to ask with; the one of an agent has no token.

        Args:
            leases: As for `ask`.

        Raises:
            SourceError: A login failed, now or a while ago.
            ConfigError: What a login needs is not there.
        """
        if self._vault.method == "agent":
            return self._of_agent() if leases else Session(self._vault.session)
        session, now = self._held.get(self._vault.session), datetime.now(UTC)
        given = self._vault.method == "token"
        if not is_alive(session, now, to_its_end=given) or self._is_replaced(session):
            session = self._enter(session)
        if is_due(session, now) and not (self._rests(session) and session.failures):
            session = self._renew(session)
            if session.secret is None:
                return self._enter(session)
        if leases and self._vault.method != "token" and is_old(session, now):
            try:
                return self._enter(session)
            except KeybrokerError:  # for what is left of it, it does
                return self._held.get(session.key)
        return session

    def _is_replaced(self, session: Session) -> bool:
        """Tell whether somebody put another token in the place that ours is from, or took it."""
        if self._vault.method != "token":
            return False
        if self._vault.auth["token"].kind not in ("file", "login"):
            return False
        try:
            return self._mark(self._material()) != session.material
        except LoginNeeded:
            return True
        except (ConfigError, CacheError, SourceError):  # it is being replaced; ours is alive
            return False

    def _material(self) -> methods.Material:
        return methods.gather(
            self._vault,
            self._environment,
            lambda reference: read_reference(
                reference, self._environment, self._held, ends=self._ends
            ),
        )

    def _mark(self, material: methods.Material) -> str:
        """
        Return what tells what is logged in with from another.

        What a program prints, or AWS lends, is another each time, and no better for that.
        """
        words = []
        for name, one in material.items():
            named = self._vault.auth.get(name)
            lent = isinstance(named, Reference) and named.kind == "command"
            lent = lent or self._vault.method == "aws"
            words.append(f"{name} {named if lent else one.fingerprint}")
        return fingerprint(" ".join(words))

    def _rests(self, session: Session) -> bool:
        """Say whether a login is not to be tried yet; a rest by a clock that was wrong is none."""
        if session.not_before is None:
            return False
        left = session.not_before - datetime.now(UTC)
        return timedelta(0) < left <= LONGEST_REST or left > NEVER / 2

    def _enter(self, session: Session) -> Session:
        """Log in, unless that failed a while ago with the same material."""
        try:
            material = self._material()
        except LoginNeeded:
            if session.secret is not None:
                self._held.put(replace(session, secret=None))
            raise
        mark = self._mark(material)
        if session.material != mark:
            session = replace(session, kept=None, material=mark, **CLEARED)
        elif self._rests(session) and session.trouble is not None:
            raise _again(session)
        self._server.close()  # the files of its certificates may have been renewed
        try:
            if self._vault.auth.get("wrapped_by") is not None:
                session = self._unwrapped(session, material["secret_id"])
                assert session.kept is not None
                material = {**material, "secret_id": session.kept}
            if self._vault.method == "token":
                begun = self._adopted(material["token"])
            else:
                method = methods.METHODS[self._vault.method]
                reply = self._server.ask(
                    lambda client: method(client, self._vault.auth, material), makes=True
                )
                begun = self._begun(reply)
        except SourceError as error:
            error.unknown = error.over = False  # a login that was lost is no key that was
            self._fail(session, error)
            raise
        return self._held.put(replace(begun, material=mark, kept=session.kept))

    def _unwrapped(self, session: Session, wrapped: Secret) -> Session:
        """Have the secret_id unwrapped, once; whose it is is checked before."""
        if session.kept is not None:
            return session
        looked = self._server.ask(
            lambda client: client.write_data(
                "sys/wrapping/lookup", data={"token": wrapped.reveal()}
            )
        )
        made_at = part(self._opened(looked), "data").get("creation_path")
        if made_at != self._vault.auth["wrapped_by"].strip("/"):
            raise self._theft()
        reply = self._server.ask(lambda client: client.sys.unwrap(), wrapped, makes=True)
        found = part(self._opened(reply), "data").get("secret_id")
        try:
            secret = Secret(found if isinstance(found, str) else "")
        except ValueError as error:
            raise SourceInvalid(f"{self._who}: the secret_id that was wrapped is {error}") from None
        return self._held.put(replace(session, kept=secret))

    def _opened(self, reply: Reply) -> Reply:
        """Return an answer about a wrapping token, unless it says that there is none."""
        if reply.status in (400, 403):
            raise self._theft()
        if reply.status != 200:
            raise refusal(self._vault, self._server.host, reply)
        return reply

    def _theft(self) -> SourceDenied:
        return SourceDenied(
            f"{self._who}: the wrapped secret_id is not what it should be",
            hint="unwrapped before, expired or made elsewhere: find out who had it, wrap a new one",
        )

    def _begun(self, reply: Reply) -> Session:
        """Read what a login answered."""
        if reply.status != 200:
            raise refusal(self._vault, self._server.host, reply)
        auth = part(reply, "auth")
        life = seconds(auth.get("lease_duration"))
        token = auth.get("client_token")
        try:
            secret = Secret(token if isinstance(token, str) else "")
        except ValueError as error:
            raise SourceInvalid(
                f"{self._who}: logged in, but the token is {error}",
                hint="a second factor, should it want one, cannot be given",
            ) from None
        return Session(
            self._vault.session,
            secret=secret,
            issued_at=reply.asked_at,
            expires_at=None if life is None else reply.asked_at + life,
            renewable=life is not None and auth.get("renewable") is True,
        )

    def _adopted(self, token: Secret) -> Session:
        """Look at a token that somebody else made: how long it lives."""
        reply = self._server.ask(lambda client: client.auth.token.lookup_self(), token)
        if reply.status in (401, 403):  # dead, or not allowed to look: what it reads will tell
            return Session(self._vault.session, secret=token, issued_at=reply.asked_at)
        data = part(reply, "data")
        left = seconds(data.get("ttl"))
        if reply.status != 200:
            raise refusal(self._vault, self._server.host, reply)
        if left is None and data.get("expire_time"):  # this very second
            raise ended(self._vault, self._server.host)
        if left is None:  # a root token, or one that nobody has to renew
            return Session(self._vault.session, secret=token, issued_at=reply.asked_at)
        whole = seconds(data.get("period")) or seconds(data.get("creation_ttl")) or left
        return Session(
            self._vault.session,
            secret=token,
            issued_at=min(reply.asked_at, reply.asked_at + left - whole),
            expires_at=reply.asked_at + left,
            renewable=data.get("renewable") is True and self._vault.auth["renew"],
        )

    def _of_agent(self) -> Session:
        """Look at the token that an agent adds: what is leased with it ends with it."""
        reply = self._server.ask(lambda client: client.auth.token.lookup_self())
        data = part(reply, "data")
        left = seconds(data.get("ttl"))
        if reply.status != 200 or (left is None and data.get("expire_time")):
            raise SourceUnavailable(
                f"{self._who}: it cannot be told how long the agent's token lives",
                hint="a lease ends with it; its policy has to allow auth/token/lookup-self",
            )
        return Session(
            self._vault.session,
            issued_at=reply.asked_at,
            expires_at=None if left is None else reply.asked_at + left,
            renewable=data.get("renewable") is True,  # which is the agent's to do
            material=fingerprint(str(data.get("accessor"))),
        )

    def _renew(self, session: Session) -> Session:
        """Renew a token; it is returned as it was where that failed, without secret if dead."""
        if (sign_in := signed_in(self._vault)) is not None:
            return self._renew_signed_in(session, sign_in)
        asked = span(session)
        wish = f"{max(1, round(asked.total_seconds()))}s"
        try:
            reply = self._server.ask(
                lambda client: client.auth.token.renew_self(increment=wish), session.secret
            )
            if reply.status in (401, 403) and not self._lives(session):
                return replace(session, secret=None)
        except SourceUnavailable as error:
            return self._put_off(session, error)
        got, more = renewed(reply, asked)
        if got is None:
            return self._held.put(replace(session, renewable=False))
        ends, now = reply.asked_at + got, reply.asked_at
        return self._held.put(
            replace(session, expires_at=ends, renewed_at=now, renewable=more, **CLEARED)
        )

    def _renew_signed_in(self, session: Session, sign_in: SignIn) -> Session:
        """Renew a token where the sign-in is kept, so that its end is known there too."""
        try:
            tokens = login.current(sign_in, self._environment, self._held.sign_ins, fresh=True)
        except LoginNeeded:
            return replace(session, secret=None)
        except (SourceError, CacheError) as error:
            return self._put_off(session, error)
        if tokens.access != session.secret:
            return replace(session, secret=None)
        standing = tokens.standing
        return self._held.put(
            replace(
                session,
                expires_at=standing.access_ends,
                renewed_at=standing.refreshed_at,
                renewable=standing.renewable,
                **CLEARED,
            )
        )

    def _put_off(self, session: Session, error: KeybrokerError) -> Session:
        failures = session.failures + 1
        rest = datetime.now(UTC) + _backoff(failures, error)
        return self._held.put(replace(session, failures=failures, not_before=rest))

    def _lives(self, session: Session) -> bool:
        """Ask whether a token is alive: all 403 are alike but for this one."""
        reply = self._server.ask(lambda client: client.auth.token.lookup_self(), session.secret)
        return reply.status == 200

    def _fail(self, session: Session, error: SourceError) -> None:
        """Keep what a login said, and when the next one may be tried."""
        now = datetime.now(UTC)
        again = session.trouble is not None and session.trouble[0] == error.code
        failures = session.failures + 1 if again else 1
        refusals, wait = session.refusals, LONGEST_BACKOFF
        if isinstance(error, SourceUnavailable):
            wait = _backoff(failures, error)
        else:
            refusals += 1
        if refusals >= MOST_REFUSALS and self._vault.method in PASSWORDS:
            wait = NEVER
            error.hint = (
                f"{error.hint or 'see its log'}; so as not to lock the user, it is not tried "
                "again before that, or `keybroker reload`"
            )
        self._held.put(
            replace(
                session,
                secret=session.secret if is_alive(session, now) else None,
                failures=failures,
                refusals=refusals,
                not_before=now + wait,
                trouble=(error.code, error.message, error.hint or ""),
            )
        )


def _to_allow(path: str, capability: str) -> str:
    rule = f'add to its policy: path "{path}" {{ capabilities = ["{capability}"] }}'
    if capability == "read" and "/data/" not in path and not path.startswith("sys/"):
        return f"a path of KV 2 has /data/ after its mount; else {rule}"
    return rule


def token_of(session: Session) -> str:
    """Return what tells its token from another: all that was leased with it ends with it."""
    return session.material if session.secret is None else session.secret.fingerprint


def span(session: Session) -> timedelta:
    """Return how long a token was last given."""
    since = session.renewed_at or session.issued_at
    if session.expires_at is None or since is None:
        return timedelta(0)
    return session.expires_at - since


def is_alive(session: Session, now: datetime, *, to_its_end: bool = False) -> bool:
    """
    Tell whether a token can still be used.

    Args:
        to_its_end: No other is to be had before it has ended; else with a margin for the call.
    """
    if session.secret is None or session.expires_at is None:
        return session.secret is not None
    if to_its_end:
        return now < session.expires_at
    life = span(session)
    return now < session.expires_at - min(max(LEAST_MARGIN, life / 10), life / 2)


def is_due(session: Session, now: datetime) -> bool:
    """Tell whether a token is to be renewed: half of what it was given is over."""
    if not session.renewable or session.expires_at is None:
        return False
    return now >= session.expires_at - span(session) / 2


def is_old(session: Session, now: datetime) -> bool:
    """Tell whether a token is too near its last end to lease anything with."""
    if session.renewable or session.expires_at is None or session.issued_at is None:
        return False
    return now >= session.issued_at + (session.expires_at - session.issued_at) / 2


def _backoff(failures: int, error: KeybrokerError) -> timedelta:
    wait = min(LONGEST_BACKOFF, SHORTEST_BACKOFF * float(2 ** min(failures - 1, 16)))
    wish = error.retry_after if isinstance(error, SourceError) else None
    return max(wait, wish or wait)


def _again(session: Session) -> KeybrokerError:
    """Return the error that a login ended with, a while ago."""
    assert session.trouble is not None
    assert session.not_before is not None
    code, message, hint = session.trouble
    error = CLASSES[code](message, hint=hint or None)
    if isinstance(error, SourceUnavailable):
        error.retry_after = max(timedelta(0), session.not_before - datetime.now(UTC))
    return error
