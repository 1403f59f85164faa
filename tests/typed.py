"""`keybroker login` as a person types it: what it says first, and how it ends."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from tests.resident import Resident, until

SECONDS = 30.0
PROGRAM = [sys.executable, "-c", "from keybroker.cli import main; main()"]


@dataclass
class Signing:
    """A `keybroker login` that runs, as a context; what it says is read as it comes."""

    resident: Resident
    arguments: tuple[str, ...]
    _said: list[str] = field(default_factory=list)

    def __enter__(self) -> Self:
        self.process = subprocess.Popen(
            [*PROGRAM, "login", *self.arguments],
            env=self.resident.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: object, trace: TracebackType | None
    ) -> None:
        self.process.kill()
        self.process.wait(SECONDS)
        self._reader.join(SECONDS)
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            if stream is not None:
                stream.close()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self._said.append(line)

    @property
    def said(self) -> str:
        """What it wrote for the person until now."""
        return "".join(self._said)

    def url(self) -> str:
        """Return the first address that it shows, as soon as it does."""
        return self._found(r"(https?://\S+)")

    def code(self) -> str:
        """Return the code that is to be typed."""
        return self._found(r"and type +(\S+)")

    def _found(self, pattern: str) -> str:
        def look() -> re.Match[str] | None:
            found = re.search(pattern + r"\s", self.said)
            assert found or self.process.poll() is None, self.said
            return found

        found = until(look)
        assert found is not None
        return found[1]

    def paste(self, address: str) -> None:
        """Type an address and Enter."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{address}\n")
        self.process.stdin.flush()

    def ended(self) -> tuple[int, str, str]:
        """Wait for its end; return status, stdout and stderr."""
        assert self.process.stdout is not None
        status = self.process.wait(SECONDS)
        self._reader.join(SECONDS)
        return status, self.process.stdout.read(), self.said
