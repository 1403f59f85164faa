"""Signing in, once, and what is had with it from then on.

One process at a time renews a token, with the file's lock in its hands; the new one is on the disk
before anybody uses it. A provider that lets a refresh token be used once would otherwise end the
sign-in of whoever comes second.
"""

from collections.abc import Mapping
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

from keybroker.credential import Secret
from keybroker.errors import CacheError, CacheUnreadable, LoginNeeded, SourceError
from keybroker.login.provider import HalfRenewedError, Provider, needed, now
from keybroker.login.tokens import Store, Tokens
from keybroker.signin import SIGNED_OUT, SignIn

APART = timedelta(seconds=10)  # of two renewals that are asked for though the token is good
BEHIND = timedelta(seconds=60)  # that a clock is set back by itself
MARGIN = timedelta(seconds=60)  # of a token's end that is not used: for the call, for two clocks


def provider_of(sign_in: SignIn, environment: Mapping[str, str]) -> Provider:
    """Return who signs in by a table. Its library is imported here and not before."""
    if sign_in.type == "gateway":
        from keybroker.login.gateway import Gateway

        return Gateway(sign_in, environment)
    if sign_in.type == "litellm":
        from keybroker.login.litellm import LiteLLM

        return LiteLLM(sign_in, environment)
    if sign_in.type == "workload":
        from keybroker.login.workload import Workload

        return Workload(sign_in, environment)
    if sign_in.type == "vault":
        from keybroker.login.vault import VaultLogin

        return VaultLogin(sign_in, environment)
    if sign_in.type == "aws-sso":
        from keybroker.login.aws import IdentityCenter

        return IdentityCenter(sign_in, environment)
    if sign_in.type == "openrouter":
        from keybroker.login.openrouter import OpenRouter

        return OpenRouter(sign_in, environment)
    from keybroker.login.oidc import Oidc

    return Oidc(sign_in, environment)


def store_of(sign_in: SignIn, sealed: Store, state: Path) -> Store:
    """Return where a sign-in is kept: sealed with all others, or where AWS's programs look."""
    if sign_in.at_aws is None:
        return sealed
    from keybroker.login.aws import AwsCache

    return AwsCache(state, sign_in)


def current(
    sign_in: SignIn,
    environment: Mapping[str, str],
    store: Store,
    *,
    least: timedelta | None = None,
    fresh: bool = False,
) -> Tokens:
    """
    Return a token that can be used, renewed where that is due.

    Args:
        least: What is to be left of its life; a third of it when absent.
        fresh: Somebody has reason to doubt it: have a new one, unless it is that.

    Raises:
        LoginNeeded: A person has to sign in.
        CacheError: The sign-in cannot be opened or kept now.
        SourceError, ConfigError: It is to be renewed, and the provider did not do so.
    """
    tokens = _known(sign_in, store)
    if tokens is not None and _good(tokens, least, fresh=fresh):
        return tokens
    with store.alone(sign_in.name):
        tokens = _known(sign_in, store)  # somebody else may have renewed it meanwhile
        if tokens is not None and _good(tokens, least, fresh=fresh):
            return tokens
        if sign_in.unattended:
            return _by_itself(sign_in, environment, store)
        assert tokens is not None, "who has to sign in has done so"
        if tokens.refresh is None:
            if tokens.left(now()) > 0:
                return tokens
            raise needed(sign_in, "the sign-in has ended")
        store.save(tokens)  # where nothing can be written, the old one is not to be used up
        provider = provider_of(sign_in, environment)
        provider.together()
        try:
            renewed = provider.refresh(tokens)
        except LoginNeeded as error:
            store.save(tokens.ended(error.message.partition(": ")[2]))
            raise
        except HalfRenewedError as half:
            store.save(half.tokens)
            raise half.error from None
        finally:
            provider.close()
        store.save(renewed)
    return renewed


def _by_itself(sign_in: SignIn, environment: Mapping[str, str], store: Store) -> Tokens:
    """Have a machine sign in; that its token can be kept is a help, and no more."""
    from keybroker.login.workload import Workload

    machine = Workload(sign_in, environment)
    machine.together()
    try:
        tokens = machine.refresh(None)
    finally:
        machine.close()
    with suppress(CacheError):
        store.save(tokens)
    return tokens


def usable(
    sign_in: SignIn,
    environment: Mapping[str, str],
    store: Store,
    *,
    least: timedelta,
    ends: bool = False,
) -> Tokens:
    """
    Return a token to ask something else with; one that could not be renewed does to its end.

    Args:
        ends: It is to end what was made with it, which may be done while signing out as well.

    Raises:
        LoginNeeded, CacheError, SourceError, ConfigError: As `current`; there is none.
    """
    try:
        return current(sign_in, environment, store, least=least)
    except SourceError:
        tokens = rest(sign_in, store, ends=ends)
        if tokens is None:
            raise
        return tokens


def rest(sign_in: SignIn, store: Store, *, ends: bool = False) -> Tokens | None:
    """
    Return what is kept if it is alive, though nothing new is to be had; else None.

    Args:
        ends: As in `usable`.

    Raises:
        CacheError: It cannot be opened.
    """
    tokens = _opened(sign_in, store)
    if tokens is None or tokens.left(now()) <= 0:
        return None
    ended = tokens.standing.ended
    if ended == SIGNED_OUT and not ends:
        return None
    if ended not in ("", SIGNED_OUT) and tokens.access == tokens.refresh:
        return None  # it is the token itself that ended
    return tokens


def margin(life: timedelta) -> timedelta:
    """Return what is left of a token's life when it is not used any more."""
    return min(MARGIN, life / 5)


def _known(sign_in: SignIn, store: Store) -> Tokens | None:
    """Return what is kept; None where a machine is yet to sign in."""
    tokens = _opened(sign_in, store)
    if tokens is None and sign_in.unattended:
        return None
    if tokens is None or tokens.standing.ended == SIGNED_OUT:
        raise needed(sign_in, "nobody is signed in")
    if tokens.standing.ended:
        raise needed(sign_in, tokens.standing.ended)
    return tokens


def _opened(sign_in: SignIn, store: Store) -> Tokens | None:
    """Open what is kept; what a machine has lost so it has anew."""
    try:
        return store.load(sign_in)
    except CacheUnreadable:
        if not sign_in.unattended:
            raise
        return None


def _good(tokens: Tokens, least: timedelta | None, *, fresh: bool) -> bool:
    """Say whether a token does as it is."""
    standing, at = tokens.standing, now()
    since = at - standing.refreshed_at
    if standing.renewable and since < -BEHIND:
        return False  # the clock was set back: nobody knows how old it is
    if tokens.left(at) <= 0:
        return False
    if fresh:
        return not standing.renewable or since < APART
    if standing.access_ends is None:
        return True
    life = standing.access_ends - standing.refreshed_at
    enough = life / 3 if least is None else min(least, life / 3)
    return standing.access_ends - at > enough


def over(sign_in: SignIn, store: Store, token: Secret, why: str) -> None:
    """Take note that a token is no more, by the word of who was asked with it."""
    with store.alone(sign_in.name):
        tokens = _opened(sign_in, store)
        if tokens is None or tokens.access != token or tokens.standing.ended:
            return
        if tokens.refresh is not None:  # else it may be that the token cannot be looked at
            store.save(tokens.ended(why))


def leave(sign_in: SignIn, store: Store) -> None:
    """Begin to sign out: from now on the sign-in only ends what was made with it."""
    with store.alone(sign_in.name):
        tokens = _opened(sign_in, store)
        if tokens is not None and not tokens.standing.ended:
            store.save(tokens.ended(SIGNED_OUT))


def end(sign_in: SignIn, environment: Mapping[str, str], store: Store) -> bool:
    """
    Sign out: end it at the provider, then here.

    Returns:
        Whether the provider was told; False where it knows no way, or nobody was signed in.

    Raises:
        SourceError: The provider did not confirm it: nothing was changed.
    """
    with store.alone(sign_in.name):
        tokens = _opened(sign_in, store)
        told = False
        if tokens is not None and tokens.standing.ended in ("", SIGNED_OUT):
            provider = provider_of(sign_in, environment)
            provider.together()
            try:
                told = provider.revoke(tokens)
            finally:
                provider.close()
        store.forget(sign_in.name)
    return told
