"""What the daemon says: lines for people, or JSON lines, each thing once."""

import json
import os
from datetime import UTC, datetime

LEVELS = {"error": 3, "warning": 4, "info": 6}  # syslog's, which systemd reads from `<4>`
REMEMBERED = 8  # different things that were said about one


class Log:
    """
    Writes to a descriptor. No value of a message is ever a secret.

    Args:
        descriptor: Usually stderr.
        form: `text`, `json`, or `journal` for text with systemd's level before each line.
    """

    def __init__(self, descriptor: int, form: str) -> None:
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
        except OSError:  # nobody reads it; keys are handed out all the same
            return

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
