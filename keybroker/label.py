"""Our name for one issue: what a key is found by after a crash.

    kb-50337698-work-01m7zeppq60nxge04zbh7s1w6p

The installation, the profile, and a ULID in lower case: unique, and sorted by time.
See: https://github.com/ulid/spec
"""

import os
import re
from collections.abc import Callable
from datetime import datetime

LETTERS = "0123456789abcdefghjkmnpqrstvwxyz"
LABEL = re.compile(r"kb-[0-9a-z]{8}-[a-z0-9][a-z0-9_-]{0,31}-[0-9a-z]{26}")
# A profile that was made for one program of another: `work-run-3f9a1c`. No file has such a name.
RUN, ENV = "run", "env"
MADE = re.compile(rf"[a-z0-9][a-z0-9_-]{{0,20}}-(?:{RUN}|{ENV})-[0-9a-f]{{6}}")


def new_label(
    instance: str, profile: str, now: datetime, chance: Callable[[int], bytes] = os.urandom
) -> str:
    """Return a label that was never used."""
    number = int(now.timestamp() * 1000) << 80 | int.from_bytes(chance(10), "big")
    ulid = "".join(LETTERS[number >> shift & 31] for shift in range(125, -1, -5))
    return f"{prefix(instance)}{profile}-{ulid}"


def prefix(instance: str) -> str:
    """Return how all labels of one installation begin."""
    return f"kb-{instance}-"


def made_name(profile: str, what: str = RUN, chance: Callable[[int], bytes] = os.urandom) -> str:
    """Return a name for what is made of a profile for one program."""
    return f"{profile[:21]}-{what}-{chance(3).hex()}"


def is_made(name: str) -> bool:
    """Say whether a profile's name is one of those, which end with a program or with their key."""
    return MADE.fullmatch(name) is not None


def made_of(name: str) -> str:
    """Return how the name of the profile begins that one for a program was made of."""
    return name[:-11] if is_made(name) else name


def is_run(name: str) -> bool:
    """Say whether it is one that lasts as long as somebody is connected for it."""
    return is_made(name) and name[-10:-7] == RUN


def is_label(text: str) -> bool:
    """Say whether a gateway's text is one of ours, which it prints as it is."""
    return LABEL.fullmatch(text) is not None
