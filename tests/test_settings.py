"""Other programs' JSON: whatever is in it, only our keys change, and each change can be undone.

Half of this is a corpus with what each text becomes, written out; the other half are random texts,
against a reader that shares nothing with ours: the comments and trailing commas that were written
into a text are left out again, and the standard library reads the rest.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from itertools import count
from time import monotonic
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from keybroker.settings import (
    DEEPEST,
    MISSING,
    Document,
    Named,
    Number,
    Path,
    SettingsInvalid,
    Splice,
    shown,
    undone,
)

NAME: Path = ("env", "NAME")
HELPER: Path = ("apiKeyHelper",)
ELEMENT: Path = ("vars", Named("X"), "value")
SPACE = " \t\r\n"
EOL = re.compile(r"\r\n|\r|\n")
STRING = r'"(?:\\.|[^"\\])*"'


# ---- a reader of its own -------------------------------------------------------------------------


def strict(text: str) -> str:
    """Return a text without comments and trailing commas."""
    comment = re.compile(rf"({STRING})|//[^\r\n]*|/\*.*?\*/", re.DOTALL)
    value = re.compile(  # its end at least, and a comma that nothing follows
        rf"({STRING}|[^{SPACE},:{{[\"])(?:([{SPACE}]*),(?=[{SPACE}]*[]}}]))?", re.DOTALL
    )
    text = comment.sub(lambda found: found[1] or " ", text.removeprefix("\ufeff"))
    return value.sub(r"\1\2", text)


def refuse(word: str) -> Any:
    raise ValueError(word)


def loaded(text: str) -> Any:
    """Return what the standard library reads, each number as it is written."""
    return json.loads(text, parse_int=Number, parse_float=Number, parse_constant=refuse)


def tokens(text: str) -> list[str]:
    """Return what is not space, comments too."""
    token = rf"{STRING}|//[^\r\n]*|/\*.*?\*/|[][{{}}:,]|[^][{{}}\s:,\"/]+"
    return re.findall(token, text, re.DOTALL)


def comments(text: str) -> list[str]:
    return [one for one in tokens(text) if one.startswith("/")]


def with_put(value: Any, path: Path, new: Any) -> Any:
    """Return a copy of a value in which one thing is set, as it would be in Python."""
    part, *rest = path
    if isinstance(part, str):
        old = value.get(part, [] if rest and isinstance(rest[0], Named) else {})
        return {**value, part: with_put(old, tuple(rest), new) if rest else new}
    places = [n for n, one in enumerate(value) if named(one, part)]
    old = value[places[-1]] if places and rest else {"name": part.name}
    made = with_put(old, tuple(rest), new) if rest else {"name": part.name, **new}
    return [*value[: places[-1]], made, *value[places[-1] + 1 :]] if places else [*value, made]


def without(value: Any, path: Path) -> Any:
    """Return a copy of a value from which one thing is taken, where it is there."""
    part, *rest = path
    if isinstance(part, str) and isinstance(value, dict) and part in value:
        if rest:
            return {**value, part: without(value[part], tuple(rest))}
        return {key: one for key, one in value.items() if key != part}
    if isinstance(part, Named) and isinstance(value, list):
        if not rest:
            return [one for one in value if not named(one, part)]
        places = [n for n, one in enumerate(value) if named(one, part)]
        return [
            without(one, tuple(rest)) if places and n == places[-1] else one
            for n, one in enumerate(value)
        ]
    return value


def named(value: Any, part: Named) -> bool:
    return isinstance(value, dict) and value.get("name") == part.name


def can_hold(value: Any, path: Path) -> bool:
    """Say whether everything on the way is of the kind that it has to be."""
    for part in path:
        if not isinstance(value, list if isinstance(part, Named) else dict):
            return False
        if isinstance(part, str):
            value = value.get(part, MISSING)
        else:
            value = next((one for one in reversed(value) if named(one, part)), MISSING)
        if value is MISSING:
            return True
    return True


# ---- the corpus ----------------------------------------------------------------------------------

SETTINGS = """{
  "$schema": "https://json.schemastore.org/claude-code-settings.json",
  "permissions": {
    "allow": ["Bash(ls:*)", "Read(~/.zshrc)"],
    "deny": []
  },
  "env": {
    "DISABLE_TELEMETRY": %s
  },
  "model": "opus"
}
"""
PUT_NAME = {  # what stands there before and after `env.NAME` is put
    "empty": ("{}", '{\n  "env": {\n    "NAME": "v"\n  }\n}'),
    "empty, with space": ("{ }\n", '{\n  "env": {\n    "NAME": "v"\n  }\n}\n'),
    "empty, on two lines": ("{\r\n}", '{\r\n  "env": {\r\n    "NAME": "v"\r\n  }\r\n}'),
    "empty but for a comment": (
        "{ // ours  \n}\n",
        '{ // ours  \n  "env": {\n    "NAME": "v"\n  }\n}\n',
    ),
    "empty but for a comment on the line": (
        "{ /* ours */ }",
        '{ /* ours */\n  "env": {\n    "NAME": "v"\n  }\n}',
    ),
    "empty but for comments on lines": (
        "{\n\t// a\n\t/* b\n\t*/\n}\n",
        '{\n\t// a\n\t/* b\n\t*/\n  "env": {\n    "NAME": "v"\n  }\n}\n',
    ),
    "env empty": (
        '{\n  "env": {}\n}\n',
        '{\n  "env": {\n    "NAME": "v"\n  }\n}\n',
    ),
    "env empty, on one line": ('{"env":{}}', '{"env":{"NAME": "v"}}'),
    "env empty, on one line, with space": ('{ "env": { } }', '{ "env": {"NAME": "v"} }'),
    "env empty but for a comment": (
        '{"env": {/* none */}}',
        '{"env": {/* none */\n  "NAME": "v"\n}}',
    ),
    "one line": ('{"a": 1}', '{"a": 1, "env": {"NAME": "v"}}'),
    "one line, trailing comma": ('{"a": 1,}', '{"a": 1, "env": {"NAME": "v"},}'),
    "one line, trailing comma and space": ('{"a": 1 , }', '{"a": 1 , "env": {"NAME": "v"}, }'),
    "one line, a comment": ('{"a": 1 /* c */}', '{"a": 1, /* c */ "env": {"NAME": "v"}}'),
    "one line, comments about the comma": (
        '{"a": 1 /* c */ , /* d */}',
        '{"a": 1 /* c */ , /* d */ "env": {"NAME": "v"},}',
    ),
    "one line, a comment to its end": (
        '{"a": 1 // c\n}',
        '{"a": 1, // c\n  "env": {\n    "NAME": "v"\n  }\n}',
    ),
    "lines": ('{\n  "a": 1\n}\n', '{\n  "a": 1,\n  "env": {\n    "NAME": "v"\n  }\n}\n'),
    "lines, trailing comma": (
        '{\n  "a": 1,\n}\n',
        '{\n  "a": 1,\n  "env": {\n    "NAME": "v"\n  },\n}\n',
    ),
    "lines, no line end at the end": (
        '{\n  "a": 1\n}',
        '{\n  "a": 1,\n  "env": {\n    "NAME": "v"\n  }\n}',
    ),
    "lines, brackets on those of others": (
        '{ "a": 1,\n  "b": 2 }',
        '{ "a": 1,\n  "b": 2,\n  "env": {\n    "NAME": "v"\n  } }',
    ),
    "lines, commas first": (
        '{ "a": 1\n, "b": 2 }',
        '{ "a": 1\n, "b": 2,\n"env": {\n  "NAME": "v"\n} }',
    ),
    "lines, several to each": (
        '{\n  "a": 1, "b": 2,\n  "c": 3, "d": 4\n}',
        '{\n  "a": 1, "b": 2,\n  "c": 3, "d": 4,\n  "env": {\n    "NAME": "v"\n  }\n}',
    ),
    "no indent": ('{\n"a": 1\n}', '{\n"a": 1,\n"env": {\n  "NAME": "v"\n}\n}'),
    "tabs": ('{\n\t"a": 1\n}', '{\n\t"a": 1,\n\t"env": {\n\t\t"NAME": "v"\n\t}\n}'),
    "tabs and CRLF": (
        '{\r\n\t"a": 1\r\n}\r\n',
        '{\r\n\t"a": 1,\r\n\t"env": {\r\n\t\t"NAME": "v"\r\n\t}\r\n}\r\n',
    ),
    "four spaces": (
        '{\n    "a": 1\n}',
        '{\n    "a": 1,\n    "env": {\n        "NAME": "v"\n    }\n}',
    ),
    "all of it indented": (
        '  {\n    "a": 1\n  }',
        '  {\n    "a": 1,\n    "env": {\n      "NAME": "v"\n    }\n  }',
    ),
    "CRLF": (
        '{\r\n  "a": 1\r\n}\r\n',
        '{\r\n  "a": 1,\r\n  "env": {\r\n    "NAME": "v"\r\n  }\r\n}\r\n',
    ),
    "CR alone": (
        '{\r  "a": 1 // c\r}\r',
        '{\r  "a": 1, // c\r  "env": {\r    "NAME": "v"\r  }\r}\r',
    ),
    "mixed line ends": (
        '{\r\n  "a": 1,\n  "b": 2\r}',
        '{\r\n  "a": 1,\n  "b": 2,\r\n  "env": {\r\n    "NAME": "v"\r\n  }\r}',
    ),
    "mark of order": (
        '\ufeff{\r\n  "env": {\r\n    "A": "1"\r\n  }\r\n}\r\n',
        '\ufeff{\r\n  "env": {\r\n    "A": "1",\r\n    "NAME": "v"\r\n  }\r\n}\r\n',
    ),
    "mark of order, empty": ("\ufeff{}", '\ufeff{\n  "env": {\n    "NAME": "v"\n  }\n}'),
    "mark of order, indented": (
        '\ufeff {\n   "a": 1\n }',
        '\ufeff {\n   "a": 1,\n   "env": {\n     "NAME": "v"\n   }\n }',
    ),
    "a comment beside the last": (
        '{\n  "a": 1 // why  \n}\n',
        '{\n  "a": 1, // why  \n  "env": {\n    "NAME": "v"\n  }\n}\n',
    ),
    "comments after the last": (
        '{\n  "a": 1, // why\n  // "b": 2,\n}\n',
        '{\n  "a": 1, // why\n  // "b": 2,\n  "env": {\n    "NAME": "v"\n  },\n}\n',
    ),
    "comments above and below": (
        '// above\n{\n  "a": 1\n}\n/* below */',
        '// above\n{\n  "a": 1,\n  "env": {\n    "NAME": "v"\n  }\n}\n/* below */',
    ),
    "what is no comment": (
        '{"a": "// no", "b": "/* no */", "env": {"U": "http://h"}}',
        '{"a": "// no", "b": "/* no */", "env": {"U": "http://h", "NAME": "v"}}',
    ),
    "what is no key": (
        '{"a": ["env", {"env": {"NAME": "no"}}], "env": {"B": "NAME"}}',
        '{"a": ["env", {"env": {"NAME": "no"}}], "env": {"B": "NAME", "NAME": "v"}}',
    ),
    "there": ('{"env": {"NAME": "old"}}', '{"env": {"NAME": "v"}}'),
    "there already": ('{"env" :\t{ "NAME"\n: "v"}}', '{"env" :\t{ "NAME"\n: "v"}}'),
    "there, with an escape": ('{"env": {"N": 1, "NAME": "\\u0076"}}',) * 2,
    "there, as a number": ('{"env": {"NAME": 60000, "B": 1}}', '{"env": {"NAME": "v", "B": 1}}'),
    "there, over lines": (
        '{"env": {"NAME": {\n"a": [1,\n2] // c\n}, "B": 1}}',
        '{"env": {"NAME": "v", "B": 1}}',
    ),
    "there, between comments": (
        '{"env": {"NAME"/* a */:/* b */"old"/* c */,// d\n}}',
        '{"env": {"NAME"/* a */:/* b */"v"/* c */,// d\n}}',
    ),
    "there, its key with an escape": (
        '{"e\\u006ev": {"N\\u0041ME": "old"}}',
        '{"e\\u006ev": {"N\\u0041ME": "v"}}',
    ),
    "twice there": (
        '{"env": {"NAME": "a", "NAME": "b"}}',
        '{"env": {"NAME": "a", "NAME": "v"}}',
    ),
    "env twice there": (
        '{"env": {"NAME": "a"}, "env": {"B": "b"}}',
        '{"env": {"NAME": "a"}, "env": {"B": "b", "NAME": "v"}}',
    ),
    "of other letters": (
        '{"Env": {}, "env ": {}, "ENV": {}}',
        '{"Env": {}, "env ": {}, "ENV": {}, "env": {"NAME": "v"}}',
    ),
    "empty keys": ('{"": {"": 1}}', '{"": {"": 1}, "env": {"NAME": "v"}}'),
    "keys that are a trap elsewhere": (
        '{"__proto__": {"env": 1}, "constructor": 2}',
        '{"__proto__": {"env": 1}, "constructor": 2, "env": {"NAME": "v"}}',
    ),
    "beyond ASCII": (
        '{"schlüssel": "größe", "🔑": "\\ud83d\\ude00"}',
        '{"schlüssel": "größe", "🔑": "\\ud83d\\ude00", "env": {"NAME": "v"}}',
    ),
    "lone surrogates": (
        '{"\\ud800": "\\udfff"}',
        '{"\\ud800": "\\udfff", "env": {"NAME": "v"}}',
    ),
    "separators that JSON does not have": (
        '{"a": "\u2028\u2029\x85\x0b\x7f"}'.replace("\x0b", "\\u000b"),
        '{"a": "\u2028\u2029\x85\x0b\x7f", "env": {"NAME": "v"}}'.replace("\x0b", "\\u000b"),
    ),
    "numbers": (
        '{"a": [-0, 0.10, 1E400, 1e-7, 123456789012345678901234567890]}',
        '{"a": [-0, 0.10, 1E400, 1e-7, 123456789012345678901234567890], "env": {"NAME": "v"}}',
    ),
    "escapes": (
        '{"a": "\\"\\\\\\/\\b\\f\\n\\r\\t\\u00Ff"}',
        '{"a": "\\"\\\\\\/\\b\\f\\n\\r\\t\\u00Ff", "env": {"NAME": "v"}}',
    ),
    "a helper of somebody else's": (
        '{\n  "apiKeyHelper": "pass show work/claude",\n  "env": {"A": "1"}\n}\n',
        '{\n  "apiKeyHelper": "pass show work/claude",\n  "env": {"A": "1", "NAME": "v"}\n}\n',
    ),
    "nothing between tokens": (
        '{"a":[1,{"b":null}],"env":{"A":"1"},"c":true}',
        '{"a":[1,{"b":null}],"env":{"A":"1", "NAME": "v"},"c":true}',
    ),
    "space between all tokens": (
        ' \n{ \t"env"\r:\n{\t"A" : "1"\r\n,\n}\n}\n ',
        ' \n{ \t"env"\r:\n{\t"A" : "1"\r\n,\n  "NAME": "v",\n}\n}\n ',
    ),
    "deep": (
        '{"a": ' + "[" * (DEEPEST - 1) + "]" * (DEEPEST - 1) + "}",
        '{"a": ' + "[" * (DEEPEST - 1) + "]" * (DEEPEST - 1) + ', "env": {"NAME": "v"}}',
    ),
    "huge": (
        '{\n "a": "' + "x" * 1_000_000 + '",\n "b": [' + "0, " * 9_999 + "0]\n}",
        '{\n "a": "' + "x" * 1_000_000 + '",\n "b": [' + "0, " * 9_999 + "0],\n"
        ' "env": {\n  "NAME": "v"\n }\n}',
    ),
    "a settings file": (
        SETTINGS % '"1"',
        SETTINGS % '"1",\n    "NAME": "v"',
    ),
}

PUT_ELEMENT = {  # the same for the value of the element named X of `vars`
    "no list": (
        '{\n  "a": 1\n}',
        '{\n  "a": 1,\n  "vars": [\n    {\n      "name": "X",\n      "value": "v"\n    }\n  ]\n}',
    ),
    "no list, on one line": ('{"a": 1}', '{"a": 1, "vars": [{"name": "X", "value": "v"}]}'),
    "an empty list": ('{"vars": []}', '{"vars": [{"name": "X", "value": "v"}]}'),
    "an empty list on lines": (
        '{\n\t"vars": [\n\t]\n}',
        '{\n\t"vars": [\n\t\t{\n\t\t\t"name": "X",\n\t\t\t"value": "v"\n\t\t}\n\t]\n}',
    ),
    "others": (
        '{"vars": [{"name": "Y", "value": "1"}, 2, null, {}]}',
        '{"vars": [{"name": "Y", "value": "1"}, 2, null, {}, {"name": "X", "value": "v"}]}',
    ),
    "a list of lists": (
        '{"vars": [[{"name": "X"}]]}',
        '{"vars": [[{"name": "X"}], {"name": "X", "value": "v"}]}',
    ),
    "itself": (
        '{"vars": [{"value": "1", "name": "X", "more": 2}, {"name": "Y"}]}',
        '{"vars": [{"value": "v", "name": "X", "more": 2}, {"name": "Y"}]}',
    ),
    "itself, without a value": (
        '{"vars": [{"name": "X"}]}',
        '{"vars": [{"name": "X", "value": "v"}]}',
    ),
    "itself twice": (
        '{"vars": [{"name": "X", "value": "1"}, {"name": "X", "value": "2"}]}',
        '{"vars": [{"name": "X", "value": "1"}, {"name": "X", "value": "v"}]}',
    ),
    "itself, renamed by a second key": (
        '{"vars": [{"name": "Y", "name": "X"}, {"name": "X", "name": "Y"}]}',
        '{"vars": [{"name": "Y", "name": "X", "value": "v"}, {"name": "X", "name": "Y"}]}',
    ),
}

REMOVED = {  # a text, what is taken out of it, and what is left
    "the only one": ('{"a": 1}', ("a",), "{}"),
    "the only one, with space": ('{ "a": 1 , }\n', ("a",), "{}\n"),
    "the only one, on lines": ('{\n  "b": {\n    "a": 1\n  }\n}', ("b", "a"), '{\n  "b": {}\n}'),
    "the only one, a comment before": ('{ /* c */ "a": 1}', ("a",), "{ /* c */}"),
    "the only one, a comment after": ('{"a": 1, // c\n}', ("a",), "{// c\n}"),
    "the first": ('{ "a": 1, "b": 2 }', ("a",), '{ "b": 2 }'),
    "the first, on lines": ('{\n  "a": 1,\n  "b": 2\n}', ("a",), '{\n  "b": 2\n}'),
    "the middle": ('{"b": 1, "a": [1, {}], "c": 3}', ("a",), '{"b": 1, "c": 3}'),
    "the middle, on lines": (
        '{\r\n\t"b": 1,\r\n\t"a": {\r\n\t},\r\n\t"c": 3\r\n}',
        ("a",),
        '{\r\n\t"b": 1,\r\n\t"c": 3\r\n}',
    ),
    "the last": ('{"b": 1, "a": 2}', ("a",), '{"b": 1}'),
    "the last, with space": ('{ "b": 1 , "a": 2 }', ("a",), '{ "b": 1 }'),
    "the last, on lines": ('{\n  "b": 1,\n  "a": 2\n}', ("a",), '{\n  "b": 1\n}'),
    "the last, trailing comma": ('{\n  "b": 1,\n  "a": 2,\n}', ("a",), '{\n  "b": 1,\n}'),
    "the last, CR alone": ('{\r "b": 1,\r "a": 2,\r}', ("a",), '{\r "b": 1,\r}'),
    "the last, bracket beside it": ('{\n  "b": 1,\n  "a": 2}', ("a",), '{\n  "b": 1}'),
    "commas first": ('{ "b": 1\n, "a": 2\n, "c": 3\n}', ("a",), '{ "b": 1\n, "c": 3\n}'),
    "a comma on the next line": ('{\n "a": 1\n ,"b": 2\n}', ("a",), '{\n "b": 2\n}'),
    "a comment before the comma": ('{"a": 1 /* c */ , "b": 2}', ("a",), '{/* c */  "b": 2}'),
    "a comment after the comma before": (
        '{\n  "b": 1, // c\n  "a": 2\n}',
        ("a",),
        '{\n  "b": 1 // c\n}',
    ),
    "comments of both kinds about it": (
        '{\n  "b": 1, // b\n  /* a */ "a": 2 // c\n  // d\n}',
        ("a",),
        '{\n  "b": 1 // b\n  /* a */ // c\n  // d\n}',
    ),
    "behind a comment to the end of the line": (
        '{ // c\n"a": 1, "b": 2}',
        ("a",),
        '{ // c\n"b": 2}',
    ),
    "its comment stays": (
        '{\n  "a": 1, // c\n  "b": 2\n}',
        ("a",),
        '{\n  // c\n  "b": 2\n}',
    ),
    "comments in it": ('{"b": 1, "a" /* c */: [ // d\n]}', ("a",), '{"b": 1}'),
    "as often as it is there": ('{"a": 1, "b": 2, "\\u0061": 3}', ("a",), '{"b": 2}'),
    "in the last of its name": (
        '{"b": {"a": 1}, "b": {"a": 2}}',
        ("b", "a"),
        '{"b": {"a": 1}, "b": {}}',
    ),
    "elements": (
        '{"vars": [{"name": "X"}, {"name": "Y"}, 1, {"name": "X"}]}',
        ("vars", Named("X")),
        '{"vars": [{"name": "Y"}, 1]}',
    ),
    "elements on lines": (
        '{\n  "vars": [\n    {\n      "name": "X"\n    },\n    {\n      "name": "Y"\n    }\n  ]\n}',
        ("vars", Named("X")),
        '{\n  "vars": [\n    {\n      "name": "Y"\n    }\n  ]\n}',
    ),
    "a key of an element": (
        '{"vars": [{"name": "X", "value": "1"}]}',
        ("vars", Named("X"), "value"),
        '{"vars": [{"name": "X"}]}',
    ),
    "what is not there": ('{"b": {"c": 1}}', ("b", "a"), '{"b": {"c": 1}}'),
    "below what is not there": ('{"b": 1}', ("a", "b"), '{"b": 1}'),
    "below what holds nothing": ('{"b": "a"}', ("b", "a"), '{"b": "a"}'),
    "a name in an object": (
        '{"b": {"name": "X", "x": {"name": "X"}}}',
        ("b", Named("X")),
        '{"b": {"name": "X", "x": {"name": "X"}}}',
    ),
}

ENDS_EARLY = "ends too early"
NOT_JSON = "not JSON"
VALUE = "expected a value"
KEY = "expected a key in quotes"
COLON = "expected a colon"
AFTER = "something after the end"
OBJECT = "expected an object, { … }"
ESCAPED = "a character that must be escaped"
NO_ESCAPE = "an escape that JSON does not have"
OPEN = "a text that does not end on its line"
OPEN_COMMENT = "a comment that does not end"
BROKEN = {  # where something is wrong, and what
    "": f"1:1: {ENDS_EARLY}",
    "\ufeff": f"1:1: {ENDS_EARLY}",
    " \n\r\n\r": f"4:1: {ENDS_EARLY}",
    "// c": f"1:5: {ENDS_EARLY}",
    "{": f"1:2: {ENDS_EARLY}",
    '{"a": [1, 2': f"1:12: {ENDS_EARLY}",
    '{\n  "a"': f"2:6: {ENDS_EARLY}",
    '{"a":': f"1:6: {ENDS_EARLY}",
    '{"a": 1,': f"1:9: {ENDS_EARLY}",
    "{]": f"1:2: {KEY}",
    "{,}": f"1:2: {KEY}",
    '{"a": 1,,}': f"1:9: {KEY}",
    "{1: 2}": f"1:2: {KEY}",
    "{true: 2}": f"1:2: {KEY}",
    "{a: 2}": f"1:2: {NOT_JSON}",
    "{'a': 2}": f"1:2: {NOT_JSON}",
    '{"a"}': f"1:5: {COLON}",
    '{"a" 1}': f"1:6: {COLON}",
    '{"a" = 1}': f"1:6: {NOT_JSON}",
    '{"a":}': f"1:6: {VALUE}",
    '{"a"::1}': f"1:6: {VALUE}",
    '{"a":,}': f"1:6: {VALUE}",
    '{"a": [,]}': f"1:8: {VALUE}",
    '{"a": [1,,2]}': f"1:10: {VALUE}",
    '{"a": [}]': f"1:8: {VALUE}",
    '{"a": [1}': "1:9: expected a comma or ]",
    '{"a": 1]': "1:8: expected a comma or }",
    '{"a": [1 2]}': "1:10: expected a comma or ]",
    '{"a": 1 "b": 2}': "1:9: expected a comma or }",
    '{\n  "a": 1\n  "b": 2\n}': "3:3: expected a comma or }",
    '{\r\n  "a": 1\r\n  "b": 2\r\n}': "3:3: expected a comma or }",
    '{\r  "a": 1\r  "b": 2\r}': "3:3: expected a comma or }",
    '\ufeff{"a": 1 "b": 2}': "1:9: expected a comma or }",
    '\ufeff{\n"a": 1 "b": 2}': "2:8: expected a comma or }",
    '{"ü😀": 1 "b": 2}': "1:10: expected a comma or }",
    '{"a": {"b": "c":': "1:16: expected a comma or }",
    "{}}": f"1:3: {AFTER}",
    "{} {}": f"1:4: {AFTER}",
    "{},": f"1:3: {AFTER}",
    "{} x": f"1:4: {NOT_JSON}",
    "x {}": f"1:1: {NOT_JSON}",
    ", {}": f"1:1: {VALUE}",
    "}": f"1:1: {VALUE}",
    "[1, 2]": f"1:1: {OBJECT}",
    " null": f"1:2: {OBJECT}",
    '"a"': f"1:1: {OBJECT}",
    "\n// c\n1": f"3:1: {OBJECT}",
    "{}\x00": f"1:3: {NOT_JSON}",
    "\x00" * 9: f"1:1: {NOT_JSON}",
    '{"a\x00b": 1}': f"1:4: {ESCAPED}",
    '{"a": "\t"}': f"1:8: {ESCAPED}",
    '{"a": "b\\x41"}': f"1:9: {NO_ESCAPE}",
    '{"a": "\\u12G4"}': f"1:8: {NO_ESCAPE}",
    '{"a": "\\': f"1:8: {NO_ESCAPE}",
    '{"a": "b': f"1:7: {OPEN}",
    '{"a": "b\n"}': f"1:7: {OPEN}",
    '{"a": "b\\"}': f"1:7: {OPEN}",
    '{"a": 1 /* b': f"1:9: {OPEN_COMMENT}",
    "{/*/}": f"1:2: {OPEN_COMMENT}",
    "{/}": f"1:2: {NOT_JSON}",
    "{# c\n}": f"1:2: {NOT_JSON}",
    "{\ufeff}": f"1:2: {NOT_JSON}",
    "{\xa0}": f"1:2: {NOT_JSON}",
    "{\x0c}": f"1:2: {NOT_JSON}",
    '{"a": 01}': f"1:7: {NOT_JSON}",
    '{"a": +1}': f"1:7: {NOT_JSON}",
    '{"a": .5}': f"1:7: {NOT_JSON}",
    '{"a": 5.}': f"1:7: {NOT_JSON}",
    '{"a": 1e}': f"1:7: {NOT_JSON}",
    '{"a": 0x1F}': f"1:7: {NOT_JSON}",
    '{"a": -}': f"1:7: {NOT_JSON}",
    '{"a": \u0661}': f"1:7: {NOT_JSON}",
    '{"a": NaN}': f"1:7: {NOT_JSON}",
    '{"a": -Infinity}': f"1:7: {NOT_JSON}",
    '{"a": True}': f"1:7: {NOT_JSON}",
    '{"a": nulls}': f"1:7: {NOT_JSON}",
    '{"a": ' + "[" * 100_000: f"1:{6 + DEEPEST}: nested more than {DEEPEST} deep",
    '{"a": ' * 100_000: f"1:{6 * DEEPEST + 1}: nested more than {DEEPEST} deep",
}

IN_THE_WAY = {  # what stands where something that holds our key has to be
    '{"env": null}': "1:9: env: expected an object, { … }",
    '{"env": "x", "vars": {}}': "1:9: env: expected an object, { … }",
    '{\n  "env": [{"NAME": 1}]\n}': "2:10: env: expected an object, { … }",
    '{"env": {}, "env": 1}': "1:20: env: expected an object, { … }",
    '{"env":\n\n  true}': "3:3: env: expected an object, { … }",
}

EVERY = [*PUT_NAME.values(), *PUT_ELEMENT.values()]


def refused(text: str) -> str:
    with pytest.raises(SettingsInvalid) as error:
        Document(text)
    return str(error.value)


def ids(cases: dict[str, Any]) -> Any:
    return pytest.mark.parametrize("case", cases.values(), ids=cases.keys())


def check_undone(document: Document, before: str) -> None:
    assert undone(document.text, document.splices) == before


@ids(PUT_NAME)
def test_a_variable_is_put(case: tuple[str, str]) -> None:
    """As the text around it is written; what else is there stays, byte for byte."""
    before, after = case
    document = Document(before)

    document.put(NAME, "v")

    assert document.text == after
    check_undone(document, before)


@ids(PUT_ELEMENT)
def test_an_element_of_a_list_is_put(case: tuple[str, str]) -> None:
    """It is found by its name, in any place, and is the last where nobody has it."""
    before, after = case
    document = Document(before)

    document.put(ELEMENT, "v")

    assert document.text == after
    check_undone(document, before)


@pytest.mark.parametrize("before", [before for before, _ in EVERY])
def test_every_text_takes_every_edit(before: str) -> None:
    """All three of ours, twice, and out again: no comment is lost, and no other value."""
    document = Document(before)
    old = loaded(strict(before))
    new = with_put(with_put(with_put(old, NAME, "a"), HELPER, "b"), ELEMENT, "c")

    assert document.value == old
    for path, value in [(NAME, "a"), (HELPER, "b"), (ELEMENT, "c")]:
        document.put(path, value)
        done = len(document.splices)
        assert document.put(path, value) == 0
        assert len(document.splices) == done
    assert loaded(strict(document.text)) == document.value == new
    document.remove(NAME)
    document.remove(HELPER)
    document.remove(("vars", Named("X")))
    left = without(without(without(new, NAME), HELPER), ("vars", Named("X")))
    assert loaded(strict(document.text)) == document.value == left
    check_undone(document, before)


@ids(REMOVED)
def test_a_key_is_removed(case: tuple[str, Path, str]) -> None:
    """With a comma, and with its line where it has one of its own; comments about it stay."""
    before, path, after = case
    document = Document(before)

    document.remove(path)

    assert document.text == after
    check_undone(document, before)


@pytest.mark.parametrize(("text", "message"), BROKEN.items(), ids=[m[:40] for m in BROKEN.values()])
def test_what_is_wrong_is_named_with_its_place(text: str, message: str) -> None:
    """Line and column count as an editor's do: any line end, and no mark of order."""
    assert refused(text) == message


@pytest.mark.parametrize(("text", "message"), IN_THE_WAY.items())
def test_what_is_no_object_is_left_alone(text: str, message: str) -> None:
    """A value that somebody wrote is not replaced by what ours would need there."""
    document = Document(text)

    with pytest.raises(SettingsInvalid) as error:
        document.put(NAME, "v")

    assert str(error.value) == message
    assert (document.text, document.splices) == (text, [])


def test_what_is_no_list_is_left_alone() -> None:
    """The same for what has a name: not even an object with names is a list."""
    for text in ('{"vars": {"X": {}}}', '{"vars": "X"}'):
        with pytest.raises(SettingsInvalid, match=r"^1:10: vars: expected a list, \[ … \]$"):
            Document(text).put(ELEMENT, "v")
    with pytest.raises(SettingsInvalid, match=r"^1:33: vars\.X\.value: expected an object"):
        Document('{"vars": [{"name":"X", "value": 1}]}').put((*ELEMENT, "a"), "v")


def test_what_was_made_is_counted() -> None:
    """So that who takes it back knows how much of the path is ours."""
    document = Document('{"a": {}}')

    assert document.put(("a", "b", "c"), "v") == 2
    assert document.put(("a", "b", "d"), "v") == 1
    assert document.put(("a", "b", "d"), "w") == 0
    assert document.put(ELEMENT, "v") == 3


def test_values_are_read_with_what_they_are_written_as() -> None:
    """Numbers keep their digits; what is missing is no null."""
    document = Document('{"a": [1.50, "\\u0062"], "b": null, "c": true, "c": false}')

    assert document.value == {"a": [Number("1.50"), "b"], "b": None, "c": False}
    assert document.get(("a",)) == [Number("1.50"), "b"]
    assert document.get(("b",)) is None
    assert document.get(("b", "d")) is MISSING
    assert document.get(("a", Named("x"))) is MISSING
    assert document.raw(("a",)) == '[1.50, "\\u0062"]'
    assert document.raw(("b",)) == "null"
    assert document.raw(("d",)) is None


def test_a_value_is_put_back_as_it_was_written() -> None:
    """Number, escapes, comments and all; nothing happens where it is gone."""
    document = Document('{"a": {"b": "ours"}, "c": 1}')
    raw = '[1.50, // why\n"\\u0062"]'

    document.put_raw(("a", "b"), raw)
    document.put_raw(("a", "b"), raw)
    document.put_raw(("x", "b"), raw)

    assert document.text == '{"a": {"b": ' + raw + '}, "c": 1}'
    assert document.splices == [Splice(12, '"ours"', raw)]


@pytest.mark.parametrize("raw", ['1, "x": 2', "1 // c", " 1", "1 ", "", "}", "[", "\ufeff1"])
def test_only_one_value_is_put_back(raw: str) -> None:
    """What was kept of it may have been changed; it takes nothing else with it."""
    document = Document('{"a": 0, "b": 1\n}')

    with pytest.raises(SettingsInvalid):
        document.put_raw(("a",), raw)

    assert (document.text, document.splices) == ('{"a": 0, "b": 1\n}', [])


def test_values_of_all_kinds_are_put() -> None:
    """Lists and objects are laid out as the document is."""
    value = {"on": True, "off": False, "none": None, "list": ["ü", '"', "\n"], "empty": {}}
    document = Document('{\r\n\t"a": 1, "b": 2\r\n}')

    document.put(("a",), value)
    document.put(("b",), ["x"])

    assert document.get(("a",)) == value
    assert document.text == (
        '{\r\n\t"a": {\r\n\t\t"on": true,\r\n\t\t"off": false,\r\n\t\t"none": null,\r\n'
        '\t\t"list": [\r\n\t\t\t"ü",\r\n\t\t\t"\\"",\r\n\t\t\t"\\n"\r\n\t\t],\r\n'
        '\t\t"empty": {}\r\n\t}, "b": [\r\n\t\t"x"\r\n\t]\r\n}'
    )


def test_an_element_is_put_whole() -> None:
    """Its name is part of it, whether the value says so or not."""
    document = Document('{"vars": [{"name": "X", "old": 1}]}')

    document.put(("vars", Named("X")), {"value": "v"})
    document.put(("vars", Named("Y")), {"name": "Y", "value": "w"})

    assert document.text == ('{"vars": [{"name": "X", "value": "v"}, {"name": "Y", "value": "w"}]}')


def test_what_utf_8_cannot_say_is_escaped() -> None:
    """A path may have bytes that are no text; the file can be written all the same."""
    document = Document("{}")

    document.put(HELPER, "/home/\udcff/helper")

    assert document.text.encode() == b'{\n  "apiKeyHelper": "/home/\\udcff/helper"\n}'


@pytest.mark.parametrize("start", [-1, 1, 3, 99])
@pytest.mark.parametrize("inserted", ["b", "bc"])
def test_only_what_was_inserted_is_undone(start: int, inserted: str) -> None:
    """Who edited the file since then keeps what they wrote."""
    with pytest.raises(ValueError, match=r"^not what was inserted$"):
        undone("abd", [Splice(start, "x", inserted if start != 1 else "d")])


@pytest.mark.parametrize("start", [-1, 3, 99])
def test_nothing_is_undone_beyond_the_text(start: int) -> None:
    """Of what only took something out, the place at least must be there."""
    with pytest.raises(ValueError, match=r"^not what was inserted$"):
        undone("ab", [Splice(start, "x", "")])


def test_large_texts_take_time_by_their_length() -> None:
    """Some megabytes of history are read and edited in seconds, whatever they are made of."""
    texts = [
        json.dumps({"history": [{"display": "x" * 200, "more": {}}] * 20_000}, indent=2),
        '{"a": "' + "\\n" * 2_500_000 + '"}',
        "{" + "// c\n" * 400_000 + "}",
        "{" + '"a": 1, ' * 100_000 + '"b": 1}',
        "{" + "\n" * 5_000_000 + "}",
    ]
    for text in texts:
        began = monotonic()
        document = Document(text)
        document.put(NAME, "v")
        assert shown(document.text, []).count("…") > 0
        assert monotonic() - began < 60, "quadratic would be hours"


@pytest.mark.parametrize(
    "text",
    [
        '{"a": "' + "\\n" * 2_500_000,
        "{/*" + "*" * 5_000_000,
        '{"a": ' + "1" * 5_000_000 + "x}",
        "{" + "\n" * 5_000_000 + "x}",
        '{"a": "' + "x" * 5_000_000 + "\x00",
    ],
    ids=["string", "comment", "number", "lines", "control"],
)
def test_large_texts_that_are_broken_are_refused_soon(text: str) -> None:
    """A pattern that fails does not try each beginning again."""
    began = monotonic()

    refused(text)

    assert monotonic() - began < 60


# ---- what is shown -------------------------------------------------------------------------------

SHOWN = {
    '{"a": "secret", "b": ["plain", "x"]}': '{"a": "…", "b": ["plain", "…"]}',
    '{"plain" /* a */ : "secret"}': '{"plain" /* … */ : "…"}',
    '{"secret"\n: 1.5, "x": null}': '{"secret"\n: 1.5, "x": null}',
    '{"a": "pl\\u0061in"}': '{"a": "pl\\u0061in"}',
    "{// secret\r\n}//": "{// …\r\n}// …",
    "{/* secret\r * secret\r\n\n*/}": "{/* …\r…\r\n\n */}",
    "\ufeff{/**/}": "\ufeff{/*  */}",
}


@pytest.mark.parametrize(("text", "expected"), SHOWN.items())
def test_people_see_keys_and_what_is_ours(text: str, expected: str) -> None:
    """Of what else is there an ellipsis; lines stay where they are."""
    assert shown(text, ["plain", ": 1.5"]) == expected


# ---- random texts --------------------------------------------------------------------------------

KEYS = ["env", "NAME", "apiKeyHelper", "vars", "name", "value", "", "__proto__", "a"]
SPELLINGS = ['"apiKey\\u0048elper"', '"\\u0065nv"', '"N\\u0041ME"', '"n\\u0061me"', '"\\ud800"']
FRAGMENTS = [
    *("x", "é", "😀", "\u2028", "\x7f", "\x85", " ", "'", "//", "/*", "*/", "{", "}", "[", "]"),
    *(",", ":", '\\"', "\\\\", "\\/", "\\b\\f\\n\\r\\t", "\\u00e9", "\\uD83D\\uDE00", "\\udc00"),
    *("X", "NAME", "https://h/", "\ufeff", "\\u0000"),
]
STRINGS = st.lists(st.sampled_from(FRAGMENTS), max_size=4).map(lambda found: f'"{"".join(found)}"')
NUMBERS = st.sampled_from(["0", "-0", "1", "60000", "-1.50", "0.1e+10", "1E400", "2e-7"]) | (
    st.from_regex(r"-?(0|[1-9][0-9]{0,30})(\.[0-9]{1,9})?([eE][+-]?[0-9]{1,4})?", fullmatch=True)
)
WORDS = st.sampled_from(["true", "false", "null"])
SPACES = st.sampled_from(["", "", "", " ", "  ", "\t", "\n", "\r\n", "\r", "\n  ", "\r\n\t", " \n"])
COMMENT = st.text(st.sampled_from(list('x"/*{}[]:, \té…')), max_size=6)
BLOCK = st.text(st.sampled_from(list('x"/*{}[]:, \té…\r\n')), max_size=6)
EDITED: list[Path] = [
    NAME,
    HELPER,
    ELEMENT,
    ("vars", Named("X")),
    ("env",),
    ("vars",),
    ("a", "a", "a"),
    ("env", "vars", Named("X"), "name2"),
    ("",),
    ("__proto__", "a"),
]
VALUES: list[Any] = ["v", "", 'ü\n"\\\x00😀', True, False, ["a", {"b": []}], {}, {"a": {"b": "c"}}]


@dataclass
class Written:
    """A text by its pieces, so that what is no JSON can be left out again."""

    pieces: list[tuple[str, str]] = field(default_factory=list)  # kind, text

    @property
    def text(self) -> str:
        return "".join(text for _, text in self.pieces)

    @property
    def strict(self) -> str:
        return "".join(text for kind, text in self.pieces if kind not in ("comment", "extra"))

    def __repr__(self) -> str:
        return repr(self.text)


@st.composite
def documents(draw: Any, plain: bool = False, canaries: bool = False) -> Written:
    """
    Write some document.

    Args:
        plain: No comments and trailing commas, so that it is JSON.
        canaries: Have one in each string that is a value, and in each comment.
    """
    written = Written()
    numbers = count()

    def add(kind: str, text: str) -> None:
        written.pieces.append((kind, text))

    def canary() -> str:
        return f"canary{next(numbers)}" if canaries else ""

    def gap() -> None:
        add("space", draw(SPACES))
        if not plain:
            for _ in range(draw(st.sampled_from([0, 0, 0, 0, 1, 2]))):
                if draw(st.booleans()):
                    add("comment", f"//{canary()}{draw(COMMENT)}")
                    add("space", draw(st.sampled_from(["\n", "\r\n", "\r"])))
                else:
                    body = f"{canary()}{draw(BLOCK)} ".replace("*/", "* /")
                    add("comment", f"/*{body}*/")
                add("space", draw(SPACES))

    def string() -> str:
        text: str = draw(STRINGS)
        return f'"{canary()}{text[1:]}'

    def value(depth: int) -> None:
        kinds = ["string", "number", "word"] + ["object", "object", "list"] * (depth < 4)
        kind = draw(st.sampled_from(kinds))
        if kind == "string":
            add("string", string())
        elif kind == "number":
            add("number", draw(NUMBERS))
        elif kind == "word":
            add("word", draw(WORDS))
        else:
            holder(kind, depth)

    def holder(kind: str, depth: int) -> None:
        add("mark", "{" if kind == "object" else "[")
        size = draw(st.integers(0, 4))
        for number in range(size):
            gap()
            if kind == "object":
                known = st.sampled_from([json.dumps(one) for one in KEYS] + SPELLINGS)
                key = draw(known | STRINGS if not canaries else known)
                add("key", key)
                gap()
                add("mark", ":")
                gap()
                if json.loads(key) == "name" and draw(st.booleans()):
                    add("string", '"X"')
                elif json.loads(key) == "vars" and depth < 4:
                    holder("list", depth + 1)
                else:
                    value(depth + 1)
            else:
                value(depth + 1)
            gap()
            if number < size - 1:
                add("mark", ",")
            elif not plain and draw(st.booleans()):
                add("extra", ",")
        gap()
        add("mark", "}" if kind == "object" else "]")

    if not plain and draw(st.booleans()):
        add("extra", "\ufeff")
    gap()
    holder("object", 0)
    gap()
    if not plain and draw(st.booleans()):
        add("comment", f"//{canary()}")
    return written


EDITS = st.lists(st.tuples(st.sampled_from(EDITED), st.sampled_from([*VALUES, None])), max_size=5)
slow = settings(suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


@slow
@given(documents())
def test_random_texts_are_read_as_they_were_written(written: Written) -> None:
    """Comments and trailing commas mean nothing, and numbers and double keys what they should."""
    assert Document(written.text).value == loaded(written.strict)
    assert loaded(strict(written.text)) == loaded(written.strict), "nor to the tests' own reader"


def put(document: Document, path: Path, value: Any) -> None:
    """Put a value and check that it is all that happened."""
    text, old, raw, done = document.text, document.value, document.raw(path), len(document.splices)
    if isinstance(path[-1], Named) and not isinstance(value, dict):
        value = {"value": value}
    if not can_hold(old, path):
        with pytest.raises(SettingsInvalid):
            document.put(path, value)
        assert (document.text, len(document.splices)) == (text, done)
        return

    made = document.put(path, value)

    assert document.value == loaded(strict(document.text)) == with_put(old, path, value)
    new = document.splices[done:]
    assert undone(document.text, new) == text
    assert (made > 0) is (raw is None)
    if made:
        assert [one.removed.strip(SPACE) for one in new] == [""] * len(new)
        assert comments(document.text) == comments(text)
    else:
        assert [one.removed for one in new] == ([raw] if new else [])
    ends = set(EOL.findall(text)) or {"\n"}
    assert set(EOL.findall("".join(one.inserted for one in new))) <= ends
    assert document.put(path, value) == 0
    assert len(document.splices) == done + len(new)


def remove(document: Document, path: Path) -> None:
    """Remove a key and check that it is all that happened."""
    text, old, done = document.text, document.value, len(document.splices)

    document.remove(path)

    assert document.value == loaded(strict(document.text)) == without(old, path)
    new = document.splices[done:]
    assert undone(document.text, new) == text
    assert [one.inserted for one in new] == [""] * len(new)
    kept = comments(document.text)
    for one in new:
        taken = one.removed.strip(SPACE + ",")
        assert not taken.startswith("/"), "a comment before the key is not part of it"
        found = comments(taken)
        assert not taken or not found or not taken.endswith(found[-1])
        kept += found
        if taken and isinstance(path[-1], str):
            assert json.loads(tokens(taken)[0]) == path[-1]
    assert sorted(kept) == sorted(comments(text))
    assert old != document.value or text == document.text


@slow
@given(documents(), EDITS)
def test_random_edits_change_nothing_else(written: Written, edits: list[tuple[Path, Any]]) -> None:
    """In any order, on any text; and all of them can be taken back."""
    text = written.text
    document = Document(text)

    for path, value in edits:
        if value is None:
            remove(document, path)
        else:
            put(document, path, value)

    assert undone(document.text, document.splices) == text


@slow
@given(documents(), st.sampled_from(EDITED))
def test_what_was_made_can_be_removed(written: Written, path: Path) -> None:
    """What `put` says that it made is what has to go for all to be as before."""
    document = Document(written.text)
    old = document.value
    assume(can_hold(old, path) and document.get(path) is MISSING)

    made = document.put(path, {} if isinstance(path[-1], Named) else "v")
    document.remove(path[: len(path) - made + 1])

    assert document.value == old
    assert comments(document.text) == comments(written.text)


@slow
@given(documents(plain=True), EDITS)
def test_json_stays_json(written: Written, edits: list[tuple[Path, Any]]) -> None:
    """Who reads the file with a strict reader still can."""
    document = Document(written.text)

    for path, value in edits:
        if value is None:
            document.remove(path)
        elif can_hold(document.value, path):
            document.put(path, {} if isinstance(path[-1], Named) else value)

    assert loaded(document.text) == document.value


def agree(text: str) -> None:
    """Check that ours reads what the standard library does, and refuses what it refuses."""
    try:
        expected = loaded(strict(text))
    except ValueError:
        refused(text)
        return
    if isinstance(expected, dict):
        assert Document(text).value == expected
    else:
        assert refused(text).endswith(OBJECT)


@slow
@given(documents(), st.data())
def test_random_damage_is_seen(written: Written, data: st.DataObject) -> None:
    """One character more, less or other: it is refused just where others refuse it."""
    text = written.text
    place = data.draw(st.integers(0, len(text)))
    new = data.draw(st.sampled_from(["", *'{}[]:,"\\/* \n\r\tx01-.eu\x00\ufeff\xa0', "//", "null"]))

    agree(text[:place] + new + text[place + data.draw(st.integers(0, 1)) :])


SCRAPS = [
    *'{}[]:,"\\ \n\t',
    *('"a"', '"a":', "0", "1", "-", "01", "1.", "1.5", "1e5", "1e", ".5", "+1", "true", "tru"),
    *(
        "nulls",
        "NaN",
        "-Infinity",
        "'a'",
        "\x00",
        "\xa0",
        "\x0c",
        "\u0663",
        '"\\x"',
        '"\\u12"',
        "/",
    ),
]


@example('{"a": 1 /**/ 2}')
@example('{"a": 1,/**/}')
@example('{"a": [,]}')
@given(
    st.lists(st.sampled_from(SCRAPS), max_size=6).map("".join)
    | st.lists(st.sampled_from(SCRAPS), max_size=6).map(lambda some: f'{{"k": {"".join(some)}}}')
    | st.lists(st.sampled_from(SCRAPS), max_size=6).map(lambda some: f'{{"k": [{"".join(some)}]}}')
)
def test_random_scraps_are_refused_as_by_others(text: str) -> None:
    """There is no text that is JSON to one reader and not to the other."""
    agree(text)


def elided(value: Any, plain: list[str]) -> Any:
    """Return a value as people are shown it."""
    if isinstance(value, str):
        return value if value in plain else "…"
    if isinstance(value, list):
        return [elided(one, plain) for one in value]
    if isinstance(value, dict):
        return {key: elided(one, plain) for key, one in value.items()}
    return value


@slow
@given(documents(canaries=True), EDITS)
def test_nothing_of_somebody_s_is_shown(written: Written, edits: list[tuple[Path, Any]]) -> None:
    """No string and no comment, wherever it is; keys, our own values and all lines are."""
    document = Document(written.text)
    plain = ["v", "X"]
    for path, _ in edits:
        if can_hold(document.value, path) and not isinstance(path[-1], Named):
            document.put(path, "v")

    seen = shown(document.text, plain)

    assert "canary" not in seen
    assert EOL.findall(seen) == EOL.findall(document.text)
    assert Document(seen).value == elided(document.value, plain)
