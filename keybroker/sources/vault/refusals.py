"""What a login that was refused means, in words of our own: an answer may repeat a secret."""

import re

from keybroker.credential import Reference
from keybroker.errors import (
    LoginNeeded,
    SourceDenied,
    SourceError,
    SourceInvalid,
    SourceUnavailable,
)
from keybroker.signin import SignIn, read_text
from keybroker.sources.http import Reply
from keybroker.sources.vault.server import said
from keybroker.vault import Vault

ANY = frozenset[str]()
JWT = frozenset({"jwt", "kubernetes", "oidc"})
OIDC = frozenset({"oidc"})
UNREACHED = r"connection refused|no such host|timed? ?out|\beof\b"  # in Go's words
# By method and by what Vault says: the class, our words, the hint. The first that fits counts.
# Some are about somebody else who is down: those pass.
ROWS: tuple[tuple[frozenset[str], str, type[SourceError], str, str], ...] = (
    (
        frozenset({"approle"}),
        r"missing secret_id",
        SourceDenied,
        "wants a secret_id",
        'set it in the auth table: secret_id = {{ file = "…" }}',
    ),
    (
        frozenset({"approle"}),
        r"invalid (role|secret).?id|invalid role or secret id",
        SourceDenied,
        "refused role_id or secret_id",
        "wrong, expired or used up: put a new secret_id into {where}",
    ),
    (
        ANY,
        r"\bcidr\b",
        SourceDenied,
        "does not let this address log in",
        "see the CIDR limits of the role",
    ),
    (
        frozenset({"ldap"}),
        r"error connecting|connection refused|network error|timed? ?out|no such host",
        SourceUnavailable,
        "cannot reach its LDAP server",
        "",
    ),
    (
        frozenset({"userpass", "ldap"}),
        r"invalid username or password|failed to bind|invalid credentials|empty password",
        SourceDenied,
        "refused the name or the password",
        "put the right password into {where}",
    ),
    (
        OIDC,
        r"access_denied",
        SourceDenied,
        "heard from the provider that it was refused",
        "",
    ),
    (
        OIDC,
        r"oauth state|expired_token",
        SourceDenied,
        "does not know this sign-in: it took too long, or was done before",
        "begin anew",
    ),
    (
        OIDC,
        rf"exchang(?!.*({UNREACHED}))",
        SourceDenied,
        "could not redeem the code at the provider",
        "see oidc_client_id and oidc_client_secret in auth/{mount}/config",
    ),
    (
        JWT,
        rf"fetching keys|get keys failed|discovery|{UNREACHED}",
        SourceUnavailable,
        "cannot ask who made the token",
        "",
    ),
    (
        JWT,
        r"not valid yet|not yet valid|before its|issued in the future",
        SourceUnavailable,
        "finds the token not valid yet",
        "do the clocks agree?",
    ),
    (
        JWT,
        r"expired",
        SourceDenied,
        "finds the token expired",
        "put a newer one into {where}",
    ),
    (
        JWT,
        r"audience",
        SourceDenied,
        "does not take the token's audience",
        "see bound_audiences of the role, and for whom the token was made",
    ),
    (
        ANY,
        r"\brole\b.*(not be found|not found|unknown|invalid)|(missing|invalid|unknown) role",
        SourceDenied,
        "has no such role",
        "see role, and the method's own list: bao list auth/{mount}/role",
    ),
    (
        JWT,
        r"signature|verif|no known key|parse|malformed|compact",
        SourceDenied,
        "cannot verify the token",
        "it was made by another, or is none: see {where}",
    ),
    (
        JWT,
        r"claim|subject|bound|issuer|namespace not authorized|service account",
        SourceDenied,
        "does not take what the token says",
        "see the bound claims of the role",
    ),
    (
        frozenset({"cert"}),
        r"certificate|constraint|tls|chain",
        SourceDenied,
        "refused our certificate",
        "see client_cert, and the limits of the role",
    ),
    (
        frozenset({"aws"}),
        r"code 403|invalidclienttoken|signature|expired ?token|accessdenied",
        SourceDenied,
        "heard from AWS that the signature is not valid",
        "try: aws sts get-caller-identity; and see region",
    ),
    (
        frozenset({"aws"}),
        r"upstream|connection|timed? ?out",
        SourceUnavailable,
        "cannot ask AWS",
        "",
    ),
    (
        frozenset({"aws"}),
        r"server.?id|header",
        SourceDenied,
        "wants another server_id",
        "see server_id, and iam_server_id_header_value in auth/{mount}/config/client",
    ),
    (
        frozenset({"aws"}),
        r"principal|\barn\b|does not (belong|match)",
        SourceDenied,
        "does not take this identity of AWS's for the role",
        "see bound_iam_principal_arn of the role",
    ),
)


def refusal(vault: Vault, host: str, reply: Reply) -> SourceError:
    """Return the error for a login that was answered with anything but 200."""
    text, method = said(reply), vault.method
    mount = vault.auth.get("mount", "token")
    where = _where(vault)
    who = f"vault: {host}:"
    for known, pattern, kind, words, hint in ROWS:
        if (method in known or not known) and re.search(pattern, text):
            return kind(f"{who} {words}", hint=hint.format(where=where, mount=mount) or None)
    if method == "token" and reply.status in (401, 403):
        return ended(vault, host)
    if method == "kubernetes" and reply.status == 403:
        return SourceUnavailable(
            f"{who} refused the login, or cannot ask Kubernetes",
            hint="if it stays so: is the role bound to this service account, in this namespace?",
        )
    if reply.status in (401, 403):
        return SourceDenied(
            f"{who} lets nobody in: the user is locked, or nothing is mounted at auth/{mount}",
            hint="wait for a quarter of an hour, or see: bao auth list",
        )
    if reply.status == 404:
        if "namespace not found" in text:
            there = "such namespace" if vault.namespace is None else f"namespace {vault.namespace}"
            return SourceInvalid(f"{who} has no {there}", hint="see namespace")
        namespace = "" if vault.namespace is None else f" in the namespace {vault.namespace}"
        return SourceInvalid(
            f"{who} has nothing mounted at auth/{mount}{namespace}",
            hint="see auth.mount and namespace; bao auth list shows what there is",
        )
    by_hand = f"bao login -method=oidc -path={mount}" if method == "oidc" else ""
    return SourceInvalid(
        f"{who} does not take a login by {method} ({reply.status})",
        hint=f"try it by hand: {by_hand or f'bao write auth/{mount}/login …'}",
    )


def ended(vault: Vault, host: str) -> SourceDenied:
    """Return the error for a token that is no more."""
    if (sign_in := signed_in(vault)) is not None:
        return LoginNeeded(
            f"vault: {host}: has ended the token of the sign-in",
            hint=f"run: keybroker login {sign_in.name}",
        )
    return SourceDenied(
        f"vault: {host}: refused the token: it has ended, or never was one",
        hint=f"put a new one into {_where(vault)}",
    )


def signed_in(vault: Vault) -> SignIn | None:
    """Return the sign-in whose token it is that a Vault is asked with."""
    token = vault.auth.get("token")
    if isinstance(token, Reference) and token.kind == "login":
        return read_text(str(token.value))
    return None


def _where(vault: Vault) -> str:
    """Name where what was refused is kept."""
    for name in ("secret_id", "password", "jwt", "token"):
        if isinstance(one := vault.auth.get(name), Reference):
            return str(one)
    return str(vault.auth.get("token_path", "the [vault] table"))
