"""A few keys of one TOML table, set in the text of a file; every other byte stays."""

import re
from collections.abc import Mapping, Sequence

from keybroker.tables import toml, toml_key

_HEADING = re.compile(r"^[ \t]*\[", re.MULTILINE)


def with_keys(text: str, path: Sequence[str], values: Mapping[str, str]) -> str:
    """
    Return a text in which a table has these values; without such a table, one at the end.

    What it cannot find, such as a table within braces, it takes to be not there: whoever calls
    reads the outcome, and sees whether it says what it should.
    """
    newline = "\r\n" if "\r\n" in text else "\n"
    lines = {key: f"{toml_key(key)} = {toml(value)}" for key, value in values.items()}
    if text and not text.endswith("\n"):
        text += newline
    heading = _of(path).search(text)
    if heading is None:
        named = f"[{'.'.join(map(toml_key, path))}]"
        return text + newline * bool(text) + newline.join([named, *lines.values()]) + newline
    begin = heading.end()
    following = _HEADING.search(text, begin)
    end = len(text) if following is None else following.start()
    table = text[begin:end]
    for key, line in reversed(lines.items()):
        known = re.compile(rf"^[ \t]*(?:{key}|\"{key}\"|'{key}')[ \t]*=[^\r\n]*", re.MULTILINE)
        if (found := known.search(table)) is not None:
            table = table[: found.start()] + line + table[found.end() :]
        else:
            table = f"{line}{newline}{table}"
    return text[:begin] + table + text[end:]


def _of(path: Sequence[str]) -> re.Pattern[str]:
    """Find a table's heading, to the end of its line."""
    parts = [rf"(?:{re.escape(one)}|\"{re.escape(one)}\"|'{re.escape(one)}')" for one in path]
    dotted = r"[ \t]*\.[ \t]*".join(parts)
    return re.compile(rf"^[ \t]*\[[ \t]*{dotted}[ \t]*\][ \t]*(?:#[^\r\n]*)?\r?\n", re.MULTILINE)
