"""What went wrong, by what to do next.

A message is made of things we chose (a status, a path, a profile), never of a response body or a
foreign exception's text: either may contain a key. The hint is what to type.
"""

from datetime import timedelta

# What to type where nothing seals a secret.
CANNOT_KEEP = 'unlock the keyring, or set key = "file" in a table [cache]; see docs/cache.md'


class KeybrokerError(Exception):
    """Anything that keybroker says on stderr; docs/exit-status.md lists each `exit_status`."""

    code = "internal"
    exit_status = 70

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class ConfigError(KeybrokerError):
    """Someone must edit a file."""

    code = "config"
    exit_status = 78


class SourceError(KeybrokerError):
    """
    A source did not do what it was asked.

    `unknown` says that the call may have taken effect all the same: a time-out is not a failure.
    `over` says of such a call that it was answered, with an error: it cannot take effect later.
    `withdrawn` says that whoever keeps the key told so: there is none any more.
    `retry_after` is the server's own wish, where it gave one.
    """

    def __init__(
        self,
        message: str,
        *,
        hint: str | None = None,
        unknown: bool = False,
        over: bool = False,
        withdrawn: bool = False,
        retry_after: timedelta | None = None,
    ) -> None:
        super().__init__(message, hint=hint)
        self.unknown = unknown
        self.over = over
        self.withdrawn = withdrawn
        self.retry_after = retry_after


class SourceUnavailable(SourceError):
    """No answer, 5xx, throttled: try again."""

    code = "unavailable"
    exit_status = 75


class SourceDenied(SourceError):
    """401 or 403 for the admin credential: trying again is no use until something changes."""

    code = "denied"
    exit_status = 77


class LoginNeeded(SourceDenied):
    """A sign-in has ended, or there was none: a person has to sign in."""

    code = "login"


class SourceInvalid(SourceError):
    """An answer, but not a usable credential."""

    code = "invalid"
    exit_status = 77


class CacheError(KeybrokerError):
    """The sealed copy cannot be used; it may be lost, at the price of one more issue."""

    code = "cache"
    exit_status = 69


class CacheLocked(CacheError):
    """The keyring is locked or absent."""

    code = "cache-locked"


class CacheUnreadable(CacheError):
    """The file cannot be decrypted or parsed."""

    code = "cache-unreadable"


class JournalError(KeybrokerError):
    """The journal cannot be read or written: nothing new may be minted."""

    code = "journal"
    exit_status = 69


class NotReady(KeybrokerError):
    """No valid credential for this profile now."""

    code = "not-ready"
    exit_status = 75


class NobodyAnswers(KeybrokerError):
    """Nobody who could answer is there, and we may not take their place."""

    code = "nobody"
    exit_status = 69


class OutputLost(KeybrokerError):
    """What was asked for could not be written to stdout."""

    code = "output"
    exit_status = 74


CLASSES: dict[str, type[KeybrokerError]] = {
    kind.code: kind
    for kind in (
        ConfigError,
        SourceUnavailable,
        SourceDenied,
        LoginNeeded,
        SourceInvalid,
        CacheError,
        CacheLocked,
        CacheUnreadable,
        JournalError,
        NotReady,
        NobodyAnswers,
        OutputLost,
        KeybrokerError,
    )
}


def place(error: BaseException) -> str:
    """Name the file and line where an error came from, without any value: it may be a secret."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return "?"
    name = trace.tb_frame.f_code.co_filename.rpartition("/")[2]
    return f"{name}:{trace.tb_lineno}"
