"""What AWS's refusals and botocore's exceptions mean, in words of ours.

Their texts are read for comparison only: they may hold what was sent.

See: https://docs.aws.amazon.com/secretsmanager/latest/apireference/CommonErrors.html
"""

import re
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import botocore.exceptions as problems  # type: ignore[import-untyped]

from keybroker.errors import (
    ConfigError,
    KeybrokerError,
    SourceDenied,
    SourceInvalid,
    SourceUnavailable,
)
from keybroker.values import dataclass

THROTTLED = timedelta(seconds=5)
SKEWED = re.compile(r"signature (?:expired|not yet current)|too skewed|not yet valid", re.I)
SIGN_IN = "type: aws sso login"  # and --profile, where there is one
LOG_IN = "type: aws login"
SET_THE_CLOCK = "set the clock"
WEB_IDENTITY = "see AWS_WEB_IDENTITY_TOKEN_FILE"


@dataclass(frozen=True, slots=True)
class Problem:
    """
    What an exception or a code means.

    Attributes:
        kind: The class of ours.
        words: What happened; they follow the name of who was asked.
        hint: What to type.
        unknown: The call may have taken effect all the same.
        withdrawn: Whoever keeps the key says that there is none.
    """

    kind: type[KeybrokerError]
    words: str
    hint: str | None = None
    unknown: bool = False
    withdrawn: bool = False
    retry_after: timedelta | None = None


_ENDPOINT = "see region, AWS_ENDPOINT_URL and the proxy variables"
_VALUE = "a value of its profile cannot be used"
_CONFIG = "see AWS_PROFILE and ~/.aws/config"
_CREDENTIALS = "try: aws sts get-caller-identity"
_NOT_AWS = "is a login page or a proxy in between?"

# The first class of these that an exception is an instance of says what it means.
EXCEPTIONS: dict[type[Exception], Problem] = {
    problems.ConnectTimeoutError: Problem(
        SourceUnavailable, "could not be reached in time", _ENDPOINT
    ),
    problems.ReadTimeoutError: Problem(SourceUnavailable, "did not answer in time", unknown=True),
    problems.ConnectionClosedError: Problem(
        SourceUnavailable, "ended the connection without an answer", unknown=True
    ),
    problems.ProxyConnectionError: Problem(
        SourceUnavailable, "could not be reached through the proxy", "see HTTPS_PROXY, NO_PROXY"
    ),
    problems.SSLError: Problem(
        SourceUnavailable, "has a certificate that is not trusted", "see AWS_CA_BUNDLE"
    ),
    problems.EndpointConnectionError: Problem(SourceUnavailable, "could not be reached", _ENDPOINT),
    problems.ConnectionError: Problem(SourceUnavailable, "could not be reached", _ENDPOINT),
    problems.ResponseStreamingError: Problem(
        SourceUnavailable, "broke off its answer", unknown=True
    ),
    problems.IncompleteReadError: Problem(SourceUnavailable, "broke off its answer", unknown=True),
    problems.HTTPClientError: Problem(
        SourceUnavailable, "broke off its answer, or speaks no HTTP", unknown=True
    ),
    problems.NoRegionError: Problem(
        ConfigError, "no region is configured", 'set region in [aws], such as "eu-west-1"'
    ),
    problems.InvalidRegionError: Problem(ConfigError, "there is no such region", "see region"),
    problems.UnknownRegionError: Problem(ConfigError, "there is no such region", "see region"),
    problems.ProfileNotFound: Problem(
        ConfigError, "there is no such profile in ~/.aws/config", "see profile, or AWS_PROFILE"
    ),
    problems.ConfigParseError: Problem(ConfigError, "~/.aws/config cannot be read", _CONFIG),
    problems.ConfigNotFound: Problem(ConfigError, "~/.aws/config is not there", _CONFIG),
    problems.InfiniteLoopConfigError: Problem(
        ConfigError, "its profile leads back to itself", "see source_profile in ~/.aws/config"
    ),
    problems.PartialCredentialsError: Problem(
        ConfigError, "its credentials are not complete", _CONFIG
    ),
    problems.InvalidConfigError: Problem(ConfigError, "its profile is not valid", _CONFIG),
    problems.UnknownCredentialError: Problem(
        ConfigError, "its credential_source is unknown", _CONFIG
    ),
    problems.UnknownTokenProviderError: Problem(ConfigError, "its profile is not valid", _CONFIG),
    problems.RefreshWithMFAUnsupportedError: Problem(
        SourceDenied,
        "its role wants a code of a second factor",
        "use one that does not, or aws sso login",
    ),
    problems.NoCredentialsError: Problem(
        ConfigError, "there are no credentials", "try: aws sts get-caller-identity; see [aws]"
    ),
    problems.NoAuthTokenError: Problem(SourceDenied, "nobody is signed in", SIGN_IN),
    problems.TokenRetrievalError: Problem(SourceDenied, "its sign-in has ended", SIGN_IN),
    problems.SSOTokenLoadError: Problem(SourceDenied, "nobody is signed in", SIGN_IN),
    problems.UnauthorizedSSOTokenError: Problem(SourceDenied, "its sign-in has ended", SIGN_IN),
    problems.SSOError: Problem(SourceDenied, "its sign-in cannot be used", SIGN_IN),
    problems.LoginInsufficientPermissions: Problem(
        SourceDenied, "its sign-in lacks rights", "allow it signin:CreateOAuth2Token"
    ),
    problems.LoginError: Problem(SourceDenied, "its sign-in cannot be used", LOG_IN),
    problems.MissingDependencyException: Problem(
        ConfigError, "its sign-in needs botocore[crt]", "install it beside keybroker"
    ),
    problems.CredentialRetrievalError: Problem(  # see PROVIDERS
        SourceUnavailable, "who keeps its credentials failed", _CREDENTIALS
    ),
    problems.MetadataRetrievalError: Problem(
        SourceUnavailable, "who keeps its credentials failed", _CREDENTIALS
    ),
    problems.InvalidIMDSEndpointError: Problem(
        ConfigError, "the address of its metadata is not valid", "see AWS_EC2_METADATA_…"
    ),
    problems.InvalidIMDSEndpointModeError: Problem(
        ConfigError, "the address of its metadata is not valid", "see AWS_EC2_METADATA_…"
    ),
    problems.BaseEndpointResolverError: Problem(ConfigError, "has no endpoint there", _ENDPOINT),
    problems.EndpointProviderError: Problem(ConfigError, "has no endpoint there", _ENDPOINT),
    problems.InvalidEndpointConfigurationError: Problem(
        ConfigError, "has no endpoint there", _ENDPOINT
    ),
    # Of values that a file or a variable has.
    problems.InvalidDefaultsMode: Problem(ConfigError, _VALUE, "see defaults_mode"),
    problems.InvalidRetryConfigurationError: Problem(
        ConfigError, _VALUE, "see retry_mode and max_attempts"
    ),
    problems.InvalidProxiesConfigError: Problem(ConfigError, _VALUE, "see HTTPS_PROXY, NO_PROXY"),
    problems.InvalidChecksumConfigError: Problem(ConfigError, _VALUE, _CONFIG),
    problems.InvalidSTSRegionalEndpointsConfigError: Problem(
        ConfigError, _VALUE, "see sts_regional_endpoints"
    ),
    problems.InvalidEndpointDiscoveryConfigurationError: Problem(
        ConfigError, _VALUE, "see endpoint_discovery_enabled"
    ),
    problems.InvalidS3AddressingStyleError: Problem(ConfigError, _VALUE, _CONFIG),
    problems.InvalidS3UsEast1RegionalEndpointConfigError: Problem(ConfigError, _VALUE, _CONFIG),
    problems.UnknownSignatureVersionError: Problem(ConfigError, _VALUE, _CONFIG),
    problems.UnsupportedSignatureVersionError: Problem(ConfigError, _VALUE, _CONFIG),
    problems.ServiceNotInRegionError: Problem(ConfigError, "has no endpoint there", _ENDPOINT),
    problems.DataNotFoundError: Problem(
        ConfigError, "this boto3 does not know the service", "see data_path in ~/.aws/config"
    ),
    problems.ApiVersionNotFoundError: Problem(
        ConfigError, "this boto3 does not know the service", "see api_versions in ~/.aws/config"
    ),
    problems.UnsupportedServiceProtocolsError: Problem(
        ConfigError, "this boto3 does not know the service", "install another"
    ),
    problems.ParamValidationError: Problem(
        ConfigError, "its settings are not as AWS wants them", "see secret, and ~/.aws/config"
    ),
    problems.ValidationError: Problem(ConfigError, _VALUE, _CONFIG),
    problems.MissingParametersError: Problem(ConfigError, _VALUE, _CONFIG),
    problems.InvalidHostLabelError: Problem(ConfigError, "has no endpoint there", _ENDPOINT),
    problems.ChecksumError: Problem(SourceUnavailable, "broke off its answer", unknown=True),
    problems.FlexibleChecksumError: Problem(
        SourceUnavailable, "broke off its answer", unknown=True
    ),
    # Of what is not done here: paging, waiting, other services, tests. A bug, if it comes.
    problems.BotoCoreError: Problem(SourceUnavailable, "could not be asked", _CREDENTIALS),
}
# Who keeps credentials, in botocore's words.
PROVIDERS: dict[str, Problem] = {
    "custom-process": Problem(
        SourceUnavailable, "its credential_process failed", "try what ~/.aws/config names there"
    ),
    "late-process": Problem(
        SourceUnavailable,
        "its credential_process did not end in time",
        "it has 5 s, and nobody to ask",
    ),
    "container-role": Problem(
        SourceUnavailable,
        "the credentials of its container could not be had",
        "see AWS_CONTAINER_CREDENTIALS_FULL_URI",
    ),
    "sso": Problem(SourceDenied, "its sign-in cannot be used", SIGN_IN),
    "assume-role-with-web-identity": Problem(
        ConfigError, "its web identity token cannot be read", WEB_IDENTITY
    ),
}
UNUSABLE = Problem(
    ConfigError,
    "a value of its profile or of a variable cannot be used",
    "see AWS_ENDPOINT_URL, HTTPS_PROXY, ~/.aws/config",
)
ENDED = Problem(
    SourceUnavailable, "the credentials that it was given have ended", "is the clock right?"
)

_EXPIRED = Problem(SourceDenied, "the credentials have ended", _CREDENTIALS)
_UNKNOWN = Problem(SourceDenied, "the credentials are not known", _CREDENTIALS)
_TOKEN = Problem(SourceDenied, "the web identity token was refused", WEB_IDENTITY)
_SIGNATURE = Problem(SourceDenied, "the secret access key is wrong", _CREDENTIALS)
_THROTTLED = Problem(SourceUnavailable, "asks to wait", retry_after=THROTTLED)
_FAILED = Problem(SourceUnavailable, "failed", unknown=True)
_WRONG = Problem(SourceInvalid, "does not take what was asked", "see secret and field")
NOT_KNOWN = (_EXPIRED, _UNKNOWN)  # another assumed role may do
KMS = ("DecryptionFailure", "EncryptionFailure")  # a denial, or a key that is switched off
# What Secrets Manager and STS answer, by code. A denial and a secret that is not there are put
# into words by who asked.
CODES: dict[str, Problem] = {
    "ExpiredToken": _EXPIRED,
    "ExpiredTokenException": _EXPIRED,  # of a web identity token too
    "RequestExpired": _EXPIRED,
    "TokenRefreshRequired": _EXPIRED,
    "InvalidClientTokenId": _UNKNOWN,
    "UnrecognizedClientException": _UNKNOWN,
    "MissingAuthenticationToken": _UNKNOWN,
    "NotAuthorized": _UNKNOWN,
    "InvalidSignatureException": _SIGNATURE,
    "SignatureDoesNotMatch": _SIGNATURE,
    "IncompleteSignature": _SIGNATURE,
    "OptInRequired": Problem(
        SourceDenied, "the account is not signed up for this service", "see region"
    ),
    "InvalidIdentityToken": _TOKEN,
    "IDPRejectedClaim": _TOKEN,
    "IDPCommunicationError": Problem(SourceUnavailable, "could not reach who issued the token"),
    "ThrottlingException": _THROTTLED,
    "Throttling": _THROTTLED,
    "TooManyRequestsException": _THROTTLED,
    "RequestLimitExceeded": _THROTTLED,
    "RequestThrottled": _THROTTLED,
    "InternalServiceError": _FAILED,
    "InternalFailure": _FAILED,
    "ServiceUnavailable": _FAILED,
    "ServiceUnavailableException": _FAILED,
    "InvalidParameterException": _WRONG,
    "InvalidRequestException": Problem(
        SourceInvalid, "cannot be read as it stands", "aws secretsmanager describe-secret …"
    ),
    "ValidationException": _WRONG,
    "ValidationError": _WRONG,
    "ResourceExistsException": Problem(SourceInvalid, "has that version, with another value"),
    "LimitExceededException": Problem(
        SourceUnavailable, "has all the versions that it may have", "it is tried again by itself"
    ),
    "PreconditionNotMetException": Problem(SourceUnavailable, "is not ready for that"),
    "PackedPolicyTooLarge": Problem(SourceInvalid, "has a session policy that is too large"),
    "RegionDisabledException": Problem(
        SourceDenied, "the account has not enabled this region for it", "see region"
    ),
}


def of_exception(error: Exception) -> Problem:
    """Say what an exception of botocore's means."""
    if isinstance(error, problems.CredentialRetrievalError):
        provider = str(getattr(error, "kwargs", {}).get("provider"))
        if provider in PROVIDERS:
            return PROVIDERS[provider]
    return next(one for kind, one in EXCEPTIONS.items() if isinstance(error, kind))


def is_denial(code: str, status: int) -> bool:
    """Tell a policy's no from all others; one without a code of AWS's is a proxy's."""
    return code in ("AccessDeniedException", "AccessDenied") or (
        status == 403 and code in ("ForbiddenException", "UnauthorizedException")
    )


def is_about_the_call(code: str, status: int, message: str) -> bool:
    """Tell an answer that says no to a call as such: what needs other calls may still be done."""
    if is_denial(code, status):
        return True
    known = of_answer(code, status, message)
    return known.kind is SourceInvalid


def of_answer(code: str, status: int, message: str) -> Problem:
    """Say what an answer means that is neither done nor a denial."""
    if SKEWED.search(message) or code == "RequestTimeTooSkewed":
        return Problem(SourceUnavailable, "refuses what this clock signs", SET_THE_CLOCK)
    if code in CODES:
        return CODES[code]
    if status == 429:
        return _THROTTLED
    if status >= 500:
        return _FAILED
    if code.isdigit() or not code:
        return Problem(SourceUnavailable, f"answers {status}, but not as AWS does", _NOT_AWS, True)
    return Problem(SourceInvalid, f"will not do that ({status})", _CREDENTIALS)


NO_ANSWER = Problem(
    SourceUnavailable, "answers 200, but not as Secrets Manager does", _NOT_AWS, True
)


def facts(response: Mapping[str, Any]) -> tuple[str, int, str]:
    """Return code, status and message of an answer that is an error."""
    error = response.get("Error") or {}
    status = (response.get("ResponseMetadata") or {}).get("HTTPStatusCode")
    return (
        str(error.get("Code") or ""),
        status if isinstance(status, int) else 0,
        str(error.get("Message") or ""),
    )
