"""One HTTP call with a size, a deadline and no redirects; httpx's errors become ours.

Proxy variables, SSL_CERT_FILE and the system's certificate store are honoured, and `ca` added.
"""

import json
import os
import socket
import ssl
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

# httpx loads its own command line as well where click is there, a third of the time that it takes;
# it does without one that cannot be imported.
sys.modules.setdefault("httpx._main", None)  # type: ignore[arg-type]
import httpx  # noqa: E402
import truststore  # noqa: E402

from keybroker import __version__  # noqa: E402
from keybroker.errors import ConfigError, SourceInvalid, SourceUnavailable  # noqa: E402

LARGEST_BODY = 4 << 20
CONNECT_SECONDS = 4.0
LONGEST_RETRY_AFTER = timedelta(hours=1)

# What an exception of httpx says of the call: (in words, whether it may have been committed).
# Only what fails before a request is sent cannot have been.
PROBLEMS: dict[type[Exception], tuple[str, bool]] = {
    httpx.ConnectTimeout: ("could not be reached in time", False),
    httpx.ConnectError: ("could not be reached", False),
    httpx.PoolTimeout: ("could not be reached in time", False),
    httpx.UnsupportedProtocol: ("has an address of an unknown kind", False),
    httpx.ProxyError: ("could not be reached through the proxy", False),
    httpx.InvalidURL: ("has an address that is not valid", False),
    httpx.LocalProtocolError: ("would need a request that HTTP does not allow", False),
    httpx.ReadTimeout: ("did not answer in time", True),
    httpx.WriteTimeout: ("did not take the request in time", True),
    httpx.ReadError: ("ended the connection without an answer", True),
    httpx.WriteError: ("ended the connection while it was asked", True),
    httpx.CloseError: ("ended the connection badly", True),
    httpx.RemoteProtocolError: ("broke off its answer, or speaks no HTTP", True),
    httpx.DecodingError: ("answered with something that cannot be unpacked", True),
    httpx.TooManyRedirects: ("redirects without end", True),
    httpx.HTTPError: ("failed", True),
    httpx.StreamError: ("failed", True),
    httpx.CookieConflict: ("failed", True),
}
# What OpenSSL's reason says, beside a certificate that is not trusted.
TLS = {
    "CERTIFICATE_REQUIRED": "wants a certificate of ours",
    "WRONG_VERSION_NUMBER": "speaks no TLS; its address may begin with http://",
    "RECORD_LAYER_FAILURE": "speaks no TLS; its address may begin with http://",
}
NO_NAME = "cannot be found by its name"
UNTRUSTED = "has a certificate that is not trusted here"
# Where systems keep the authorities that they trust, as one PEM file.
BUNDLES = (
    "/etc/ssl/certs/ca-certificates.crt",  # Debian, Arch
    "/etc/pki/tls/certs/ca-bundle.crt",  # Fedora
    "/etc/ssl/ca-bundle.pem",  # SUSE
    "/etc/ssl/cert.pem",  # Alpine, BSD; on macOS without what was added to a keychain
)


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer, whole. `value` is what its JSON says, None where it is none."""

    status: int
    headers: Mapping[str, str] = field(repr=False)
    value: Any = field(repr=False)  # may hold a key
    asked_at: datetime  # our clock, before the call
    data: bytes = field(default=b"", repr=False)

    @property
    def skew(self) -> timedelta:
        """How far the server's clock is ahead of ours, by its Date header; zero when close."""
        try:
            theirs = parsedate_to_datetime(self.headers.get("date", ""))
        except (ValueError, TypeError):
            return timedelta(0)
        if theirs.tzinfo is None:
            return timedelta(0)
        found = theirs - self.asked_at
        # The header counts whole seconds and the call took its time: that is no skew.
        return found if abs(found) > timedelta(seconds=30) else timedelta(0)

    @property
    def retry_after(self) -> timedelta | None:
        """What the server wishes, given as seconds or as a date."""
        text = self.headers.get("retry-after", "").strip()
        try:
            if text.isascii() and text.isdigit():
                wish = timedelta(seconds=int(text[:9]))
            else:
                until = parsedate_to_datetime(text)
                wish = until - (self.asked_at + self.skew)
        except (ValueError, TypeError, OverflowError):
            return None
        return min(max(wish, timedelta(0)), LONGEST_RETRY_AFTER)


class Http:
    """
    Calls to one host for one speaker, whose name begins every message.

    Attributes:
        host: What messages call the other side.
        until: No call goes on beyond it, by `time.monotonic()`; None: each has its own time.
        only: PEM files of authorities that are trusted beside Mozilla's, as Node does it, and not
            beside the system's; None: as usual.
    """

    def __init__(
        self,
        speaker: str,
        url: str,
        *,
        host: str | None = None,
        ca: str | None = None,
        certificate: tuple[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        seconds: float = 8.0,
        setting: str = "base_url",
    ) -> None:
        """
        Say where calls go; nothing is opened before the first.

        Args:
            url: An address, or the path of a socket after unix:, to which no proxy leads.
            host: What messages call it, where that is not the host of the address.
            ca: A PEM file of authorities that are trusted beside the system's.
            certificate: PEM files of our certificate and of its key.
            setting: Where the configuration has the address.
        """
        self.speaker = speaker
        self.until: float | None = None
        self.only: Sequence[str] | None = None
        self.seconds = seconds
        self._socket = url.removeprefix("unix:") if url.startswith("unix:") else None
        self.url = "http://localhost" if self._socket else url
        self._setting = setting
        self.host = host or urlsplit(url).netloc or url
        self._headers = {"user-agent": f"keybroker/{__version__}", **(headers or {})}
        self._ca = ca
        self._certificate = certificate
        self._client: httpx.Client | None = None

    def call(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        body: Mapping[str, Any] | None = None,
        form: str | None = None,
        redirect_is_reply: bool = False,
    ) -> Reply:
        """
        Send one request, once. A redirect is never followed.

        Args:
            body: Sent as JSON.
            form: Sent as it is, as what a form of a page would.

        Raises:
            SourceUnavailable: No whole answer; `unknown` unless it was never sent.
            SourceInvalid: An endless body, or a redirect, unless that counts as a reply.
            ConfigError: The `ca` file or our certificate cannot be used.
        """
        asked_at = datetime.now(UTC)
        deadline = time.monotonic() + self.seconds
        if self.until is not None:
            deadline = min(deadline, self.until)
        seconds = max(0.05, deadline - time.monotonic())
        timeout = httpx.Timeout(seconds, connect=min(CONNECT_SECONDS, seconds))
        if form is not None:
            headers = {"content-type": "application/x-www-form-urlencoded", **(headers or {})}
        try:
            with self._opened().stream(
                method,
                f"{self.url}{path}",
                params=query,
                headers=headers,
                json=body,
                content=form,
                timeout=timeout,
            ) as response:
                data = self._body(response, deadline)
        except (httpx.HTTPError, httpx.StreamError, httpx.InvalidURL) as error:
            raise self._problem(error) from None
        if 300 <= response.status_code < 400 and not redirect_is_reply:
            raise SourceInvalid(
                f"{self.speaker}: {self.host} answers {response.status_code}, a redirect; "
                "credentials do not follow it",
                hint="use the address that it redirects to",
            )
        try:
            value = json.loads(data)
        except (ValueError, RecursionError):
            value = None
        return Reply(response.status_code, response.headers, value, asked_at, data)

    def close(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None

    def fresh(self) -> None:
        """Let the next calls open a new connection, and take no longer than one call together."""
        self.close()
        self.until = time.monotonic() + self.seconds

    @property
    def is_late(self) -> bool:
        """Whether the time for several calls together is over."""
        return self.until is not None and time.monotonic() >= self.until

    def _opened(self) -> httpx.Client:
        if self._client is None:
            if self._socket is not None:
                self._client = httpx.Client(
                    transport=httpx.HTTPTransport(uds=self._socket),
                    trust_env=False,
                    headers=self._headers,
                )
                return self._client
            try:
                self._client = httpx.Client(
                    verify=self._context(), follow_redirects=False, headers=self._headers
                )
            except (ValueError, httpx.InvalidURL):  # their texts repeat the proxy's password
                raise ConfigError(
                    f"{self.speaker}: a proxy variable of the environment cannot be used",
                    hint="see HTTP_PROXY, HTTPS_PROXY, ALL_PROXY and NO_PROXY",
                ) from None
        return self._client

    @staticmethod
    def system_bundles() -> list[str]:
        """Return the PEM files that may hold what the system trusts."""
        named = (os.environ.get(ssl.get_default_verify_paths().openssl_cafile_env, ""), *BUNDLES)
        return [one for one in dict.fromkeys(named) if one and os.path.isfile(one)]

    def _context(self) -> ssl.SSLContext:
        context: ssl.SSLContext
        if self.only is None:
            context = truststore.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            given = [] if self._ca is None else [self._ca]
        else:
            context = httpx.create_ssl_context(trust_env=False)
            given = list(self.only)
        for file in given:
            try:
                context.load_verify_locations(cafile=file)
            except (OSError, ssl.SSLError):
                raise ConfigError(f"ca: {file}: is not a readable PEM file") from None
        if self._certificate is not None:
            certificate, key = self._certificate
            try:  # with a password, so that nobody is asked for one on a terminal
                context.load_cert_chain(certificate, key, password="")
            except (OSError, ssl.SSLError):
                both = certificate if key == certificate else f"{certificate} and {key}"
                raise ConfigError(
                    f"{self.speaker}: not a certificate and its key: {both}"[:200],
                    hint="two PEM files that belong together, the key without a password",
                ) from None
        return context

    def _body(self, response: httpx.Response, deadline: float) -> bytes:
        data = b""
        for piece in response.iter_bytes():
            data += piece
            if len(data) > LARGEST_BODY:
                raise SourceInvalid(
                    f"{self.speaker}: {self.host} sent more than 4 MiB", unknown=True
                )
            if time.monotonic() > deadline:
                raise httpx.ReadTimeout("")
        return data

    def _problem(self, error: Exception) -> SourceUnavailable:
        known = next((k for k in type(error).__mro__ if k in PROBLEMS), httpx.HTTPError)
        words, committed = PROBLEMS[known]
        hint = None
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, ssl.SSLCertVerificationError):
                words = UNTRUSTED
                hint = 'name its authority: ca = "/path/to/authority.pem"'
            elif isinstance(cause, ssl.SSLError):
                words = next((w for r, w in TLS.items() if r in str(cause.reason)), words)
            elif isinstance(cause, socket.gaierror):
                words, hint = NO_NAME, f"see {self._setting}"
            cause = cause.__cause__ or cause.__context__
        if known in (httpx.ConnectError, httpx.ConnectTimeout) and words == PROBLEMS[known][0]:
            hint = f"is it running? see {self._setting}"
        return SourceUnavailable(
            f"{self.speaker}: {self.host} {words}", hint=hint, unknown=committed
        )
