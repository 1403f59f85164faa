"""What the daemon says: lines for people, or JSON lines, each thing once."""

import json
import os
from datetime import UTC, datetime

LEVELS = {"error": 3, "warning": 4, "info": 6}  # syslog's, which systemd reads from `<4>`
LARGEST = 1 << 20  # bytes of a log that is a file
REMEMBERED = 8  # different things that were said about one


class Log:
    """
    Writes to a descriptor. No value of a message is ever a secret.

    Args:
        descriptor: Usually stderr.
        form: `text`, `json`, or `journal` for text with systemd's level before each line.
        file: What the descriptor is of, if that is to be set aside as `FILE.1` when it is large.
    """

    def __init__(self, descriptor: int, form: str, file: str | None = None) -> None:
        self._file = file
        self._descriptor = descriptor
        self.form = form
        self._said: dict[str, list[str]] = {}  # what was said about something, the newest last

    def say(self, level: str, text: str, profile: str = "") -> None:
        """Write a line."""
        now = datetime.now(UTC)
        if self.form == "json":
            values = {"at": now.isoformat(timespec="milliseconds").replace("+00:00", "Z")}
            values |= {"level": level, "text": text}
            if profile:
                values["profile"] = profile
            line = json.dumps(values)
        else:
            line = f"{profile}: {text}" if profile else text
            if self.form == "journal":
                line = f"<{LEVELS[level]}>{line}"
            else:
                line = f"{now.astimezone().strftime('%Y-%m-%d %H:%M:%S')} {level}: {line}"
        try:
            os.write(self._descriptor, line.encode("utf-8", "replace") + b"\n")
            if self._file is not None and os.fstat(self._descriptor).st_size > LARGEST:
                self._set_aside(self._file)
        except OSError:  # nobody reads it; keys are handed out all the same
            return

    def _set_aside(self, file: str) -> None:
        """Go on in a fresh file."""
        os.rename(file, f"{file}.1")
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        fresh = os.open(file, flags, 0o600)
        os.dup2(fresh, self._descriptor)
        os.close(fresh)

    def once(self, level: str, text: str, profile: str = "", *, about: str = "") -> None:
        """Write a line unless the same was said about this since it was over the last time."""
        said = self._said.setdefault(f"{profile} {about}", [])
        if text not in said:
            said.append(text)
            del said[:-REMEMBERED]
            self.say(level, text, profile)

    def over(self, text: str, profile: str = "", *, about: str = "") -> None:
        """Say that something is over, if it was said that it began."""
        if self._said.pop(f"{profile} {about}", None) is not None:
            self.say("info", text, profile)
