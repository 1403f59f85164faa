"""The ways to log in, each with what it is done with, which is read anew for each login."""

import json
from base64 import b64encode
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import quote

from keybroker.credential import Reference, Secret, sha256
from keybroker.errors import ConfigError, SourceUnavailable
from keybroker.sources.reference import Reader, resolve
from keybroker.vault import Vault

Material = Mapping[str, Secret]  # what a login is made with, by names of ours
Method = Callable[[Any, Mapping[str, Any], Material], Any]


def gather(vault: Vault, environment: Mapping[str, str], signed_in: Reader) -> Material:
    """
    Read what a login is made with.

    Args:
        signed_in: Returns the token of a `[logins.NAME]`.

    Raises:
        ConfigError, SourceDenied, SourceUnavailable: As `reference.resolve`.
    """
    projected = vault.method == "jwt"  # a token that a platform keeps in a file is open to others
    found = {
        name: resolve(one, environment, signed_in, open_to_others=projected)
        for name, one in vault.auth.items()
        if isinstance(one, Reference)
    }
    if vault.method == "kubernetes":
        place = Reference("file", vault.auth["token_path"])
        found["jwt"] = resolve(place, environment, open_to_others=True)
    if vault.method == "cert":
        found["certificate"] = _content(vault.client_cert)
    if vault.method == "aws":
        found.update(_of_aws())
    return found


def approle(client: Any, auth: Mapping[str, Any], found: Material) -> Any:
    role_id = found["role_id"].reveal() if "role_id" in found else auth["role_id"]
    secret_id = found["secret_id"].reveal() if "secret_id" in found else None
    return client.auth.approle.login(role_id, secret_id, use_token=False, mount_point=auth["mount"])


def jwt(client: Any, auth: Mapping[str, Any], found: Material) -> Any:
    token = found["jwt"].reveal()
    return client.auth.jwt.jwt_login(auth["role"], token, use_token=False, path=auth["mount"])


def kubernetes(client: Any, auth: Mapping[str, Any], found: Material) -> Any:
    return client.auth.kubernetes.login(
        auth["role"], found["jwt"].reveal(), use_token=False, mount_point=auth["mount"]
    )


def cert(client: Any, auth: Mapping[str, Any], found: Material) -> Any:
    del found  # it is shown when the connection is made; hvac would give it to `requests`
    return client.write_data(f"auth/{auth['mount']}/login", data={"name": auth["name"]})


def userpass(client: Any, auth: Mapping[str, Any], found: Material) -> Any:
    return client.auth.userpass.login(
        quote(auth["username"], safe=""),
        found["password"].reveal(),
        use_token=False,
        mount_point=auth["mount"],
    )


def ldap(client: Any, auth: Mapping[str, Any], found: Material) -> Any:
    return client.auth.ldap.login(
        auth["username"], found["password"].reveal(), use_token=False, mount_point=auth["mount"]
    )


def aws(client: Any, auth: Mapping[str, Any], found: Material) -> Any:
    """Sign a question that AWS answers with who asked; Vault sends it on."""
    from botocore.auth import SigV4Auth  # type: ignore[import-untyped]
    from botocore.awsrequest import AWSRequest  # type: ignore[import-untyped]
    from botocore.credentials import Credentials  # type: ignore[import-untyped]

    # hvac would always ask the host of us-east-1, whatever region it signs for
    region = auth["region"]
    host = "sts.amazonaws.com" if region == "us-east-1" else f"sts.{region}.amazonaws.com"
    url, body = f"https://{host}/", "Action=GetCallerIdentity&Version=2011-06-15"
    headers = {"Host": host, "Content-Type": "application/x-www-form-urlencoded; charset=utf-8"}
    if auth["server_id"] is not None:
        headers["X-Vault-AWS-IAM-Server-ID"] = auth["server_id"]
    asked = AWSRequest(method="POST", url=url, headers=headers, data=body)
    named = {name: secret.reveal() for name, secret in found.items()}
    SigV4Auth(Credentials(**named), "sts", region).add_auth(asked)
    signed = json.dumps({name: [value] for name, value in asked.headers.items()})
    return client.write_data(
        f"auth/{auth['mount']}/login",
        data={
            "role": auth["role"],
            "iam_http_request_method": "POST",
            "iam_request_url": _encoded(url),
            "iam_request_headers": _encoded(signed),
            "iam_request_body": _encoded(body),
        },
    )


METHODS: Mapping[str, Method] = {
    "approle": approle,
    "jwt": jwt,
    "kubernetes": kubernetes,
    "cert": cert,
    "userpass": userpass,
    "ldap": ldap,
    "aws": aws,
}


def _encoded(text: str) -> str:
    return b64encode(text.encode()).decode()


def _content(path: str | None) -> Secret:
    """Return what stands for a file's content: another one is another login."""
    assert path is not None, "the method cert has one"
    try:
        with open(path, "rb") as file:
            return Secret(sha256(file.read()))
    except OSError as error:
        raise ConfigError(f"vault: {path}: cannot be read ({error.strerror})") from None


def _of_aws() -> dict[str, Secret]:
    """
    Return the credentials that AWS's own programs would use.

    Raises:
        ConfigError: There are none, or what names them is wrong.
        SourceUnavailable: They are kept by somebody who did not answer.
    """
    import botocore.exceptions as problems  # type: ignore[import-untyped]
    import botocore.session  # type: ignore[import-untyped]

    wrong = (
        problems.ProfileNotFound,
        problems.ConfigParseError,
        problems.ConfigNotFound,
        problems.PartialCredentialsError,
        problems.InvalidConfigError,
        problems.UnknownCredentialError,
    )
    try:
        kept = botocore.session.Session().get_credentials()
        frozen = None if kept is None else kept.get_frozen_credentials()
    except wrong as error:
        raise ConfigError(
            f"aws: the credentials cannot be read ({type(error).__name__})",
            hint="see AWS_PROFILE and ~/.aws",
        ) from None
    except problems.BotoCoreError as error:
        raise SourceUnavailable(
            f"aws: the credentials could not be had ({type(error).__name__})",
            hint="try: aws sts get-caller-identity",
        ) from None
    if frozen is None:
        raise ConfigError(
            "aws: there are no credentials to log in to Vault with",
            hint="try: aws sts get-caller-identity",
        )
    named = {
        "access_key": frozen.access_key,
        "secret_key": frozen.secret_key,
        "token": frozen.token,
    }
    try:
        return {name: Secret(text) for name, text in named.items() if text}
    except ValueError as error:
        raise ConfigError(f"aws: one of the credentials is {error}") from None
