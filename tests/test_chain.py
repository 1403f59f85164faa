"""Lines that each carry the hash of the line before: what was torn, and what was tampered with."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keybroker.chain import FORMAT, LONGEST_LINE, Chain
from keybroker.errors import JournalError
from keybroker.paths import Disk

VALUES: list[dict[str, Any]] = [{"a": 1}, {"b": "two\n\r\u2028"}, {"c": {"d": [None, True]}}]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Where a chain of three records stands."""
    chain = Chain(tmp_path / "j.jsonl", "journal")
    for values in VALUES:
        chain.append(values, sync=False)
    return tmp_path / "j.jsonl"


def read(file: Path) -> list[dict[str, Any]]:
    """Return the records without what chains them."""
    found = Chain(file, "journal").read()
    return [{k: v for k, v in record.items() if k not in ("n", "prev")} for record in found]


def refused(file: Path) -> str:
    with pytest.raises(JournalError) as error:
        Chain(file, "journal").read()
    return error.value.message


def change(file: Path, number: int, old: str, new: str) -> None:
    """Change one line, as another hand would."""
    lines = file.read_text().splitlines(keepends=True)
    assert old in lines[number - 1]
    lines[number - 1] = lines[number - 1].replace(old, new)
    file.write_text("".join(lines))


def test_nothing_is_an_empty_chain(tmp_path: Path) -> None:
    """Neither a file that is not there nor one of no bytes is damaged."""
    (tmp_path / "empty").touch()

    assert read(tmp_path / "absent") == []
    assert read(tmp_path / "empty") == []


def test_records_are_read_as_they_were_written(file: Path) -> None:
    """In their order, with odd characters in them; the file is its owner's alone."""
    assert read(file) == VALUES
    assert file.stat().st_mode & 0o777 == 0o600


def test_each_line_names_the_one_before(file: Path) -> None:
    """The first line names kind and format; `prev` is the start of a line's SHA-256."""
    lines = file.read_bytes().splitlines()
    records = [json.loads(line) for line in lines]

    assert records[0] == {"n": 0, "format": FORMAT, "kind": "journal", "prev": ""}
    assert [record["n"] for record in records] == [0, 1, 2, 3]
    assert [record["prev"] for record in records[1:]] == [
        sha256(line).hexdigest()[:16] for line in lines[:-1]
    ]


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_a_torn_last_line_is_dropped_and_cut_off(file: Path, cut: int) -> None:
    """Nothing was done on the strength of a line that never was whole."""
    file.write_bytes(file.read_bytes()[:-cut])

    torn = read(file)
    Chain(file, "journal").append({"e": 5}, sync=True)

    assert torn == VALUES[:2]
    assert read(file) == [*VALUES[:2], {"e": 5}]
    assert [json.loads(line)["n"] for line in file.read_bytes().splitlines()] == [0, 1, 2, 3]


def test_every_length_of_a_torn_file_can_go_on(file: Path) -> None:
    """Wherever the power went: what was whole is read, and the next record follows it."""
    whole = file.read_bytes()
    ends = [at + 1 for at, byte in enumerate(whole) if byte == 10]
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        kept = max(0, sum(end <= length for end in ends) - 1)

        assert read(file) == VALUES[:kept]
        Chain(file, "journal").append({"e": 5}, sync=False)
        assert read(file) == [*VALUES[:kept], {"e": 5}]


def test_a_damaged_line_is_named(file: Path) -> None:
    """What is not JSON, or no object, in the middle of a file is no torn line."""
    change(file, 2, '{"n":1', '["n",1')

    assert refused(file) == f"journal: {file}: line 2 is damaged"


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_line_that_was_changed_is_named_by_the_next(file: Path, number: int) -> None:
    """Its hash is in the line after it."""
    change(file, number, '"n":', '"n": ')

    assert refused(file) == f"journal: {file}: line {number + 1} does not follow the one before it"


def test_a_line_that_was_removed_is_missed(file: Path) -> None:
    """The line after it follows from another."""
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join([*lines[:2], *lines[3:]]))

    assert refused(file) == f"journal: {file}: line 3 does not follow the one before it"


def test_a_line_that_was_put_in_is_seen(file: Path) -> None:
    """Nothing follows from it."""
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join([*lines[:2], b'{"n":2,"prev":"0000"}\n', *lines[2:]]))

    assert refused(file) == f"journal: {file}: line 3 does not follow the one before it"


@pytest.mark.parametrize("line", ['{"n":4}', '{"n":4,"prev":null}', '{"n":4,"prev":""}'])
def test_a_line_without_its_link_is_seen(file: Path, line: str) -> None:
    """Even at the end of the file."""
    with file.open("a") as opened:
        opened.write(f"{line}\n")

    assert refused(file) == f"journal: {file}: line 5 does not follow the one before it"


@pytest.mark.parametrize("line", ["", "null", "[]", "7", '{"a":', "\x00\x00", "[" * 60_000])
def test_a_whole_line_of_rubbish_is_damage(file: Path, line: str) -> None:
    """A last line with its newline was written whole: it is not torn."""
    with file.open("a") as opened:
        opened.write(f"{line}\n")

    assert refused(file) == f"journal: {file}: line 5 is damaged"


@pytest.mark.parametrize(
    "line",
    ["{}", '{"kind":"audit","format":1}', '{"kind":"journal"}', '{"kind":"journal","format":"1"}'],
)
def test_a_file_of_another_kind_is_not_taken(tmp_path: Path, line: str) -> None:
    """Its first line says what it is."""
    file = tmp_path / "j.jsonl"
    file.write_text(f"{line}\n")

    assert refused(file) == f"journal: {file}: line 1 is not that of a keybroker file"


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    """It may say things that this version would not keep."""
    file = tmp_path / "j.jsonl"
    file.write_text('{"n":0,"format":2,"kind":"journal","prev":""}\n')

    with pytest.raises(JournalError) as error:
        Chain(file, "journal").read()

    assert error.value.message == f"journal: {file}: is of format 2; this keybroker knows 1"
    assert error.value.hint == "use the newer keybroker that wrote it"


@pytest.mark.parametrize("line", ['{"n":"x"}', '{"n":null}', "{}", '{"n":1', "rubbish", ""])
def test_nothing_is_added_to_what_cannot_be_read(tmp_path: Path, line: str) -> None:
    """A record behind damage would be a record that nobody reads."""
    file = tmp_path / "j.jsonl"
    file.write_text(f"{line}\n")

    with pytest.raises(JournalError):
        Chain(file, "journal").append({"a": 1}, sync=True)

    assert file.read_text() == f"{line}\n"


def test_a_record_too_long_is_not_written(file: Path) -> None:
    """It could not be found again from the end of the file."""
    before = file.read_bytes()

    with pytest.raises(JournalError, match="a record is too long to be written"):
        Chain(file, "journal").append({"a": "x" * LONGEST_LINE}, sync=True)

    assert file.read_bytes() == before


def test_a_record_as_long_as_may_be_is_followed(file: Path) -> None:
    """The next one finds its end."""
    overhead = len(json.dumps({"n": 4, "a": "", "prev": "x" * 16}, separators=(",", ":")))
    longest = {"a": "x" * (LONGEST_LINE - overhead - 1)}
    for values in (longest, longest, {"b": 1}):
        Chain(file, "journal").append(values, sync=False)

    assert read(file)[3:] == [longest, longest, {"b": 1}]


def test_a_rewritten_chain_is_a_chain(file: Path) -> None:
    """Numbers and links are made anew, and no draft is left."""
    chain = Chain(file, "journal")
    chain.rewrite(chain.read()[1:])
    chain.append({"e": 5}, sync=True)

    assert read(file) == [*VALUES[1:], {"e": 5}]
    assert [json.loads(line)["n"] for line in file.read_bytes().splitlines()] == [0, 1, 2, 3]
    assert sorted(path.name for path in file.parent.iterdir()) == ["j.jsonl", "j.jsonl.lock"]


WRITER = """
import sys
from pathlib import Path
from keybroker.chain import Chain
chain = Chain(Path(sys.argv[1]), "journal")
print("ready", flush=True)
sys.stdin.readline()
for number in range(50):
    chain.append({"who": sys.argv[2], "number": number}, sync=False)
"""


def test_processes_that_write_at_once_keep_one_chain(tmp_path: Path) -> None:
    """Each record follows the one before it, whoever wrote that; from the first line on."""
    file = tmp_path / "j.jsonl"
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(file), who],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for who in ("a", "b", "c")
    ]
    for writer in writers:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        writer.communicate("go\n", timeout=30)

    records = read(file)

    assert [writer.returncode for writer in writers] == [0, 0, 0]
    for who in ("a", "b", "c"):
        assert [r["number"] for r in records if r["who"] == who] == list(range(50))
    assert len(records) == 150


class Failing(Disk):
    """A disk on which one operation does not work."""

    def __init__(self, operation: str, number: int) -> None:
        def fail(*_: object) -> None:
            raise OSError(number, os.strerror(number))

        setattr(self, operation, fail)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EIO])
@pytest.mark.parametrize("operation", ["read", "append", "sync", "lock"])
def test_a_disk_that_fails_is_said(file: Path, operation: str, number: int) -> None:
    """Whatever the system's reason, and that nothing is minted until it is mended."""
    with pytest.raises(JournalError) as error:
        Chain(file, "journal", Failing(operation, number)).append({"e": 5}, sync=True)

    said = os.strerror(number)
    assert error.value.message == f"journal: {file}: cannot be written ({said})"
    assert error.value.hint == "nothing is minted until this is mended; see docs/recovery.md"


def test_a_disk_that_cannot_be_read_or_replaced_is_said(file: Path) -> None:
    """Reading and rewriting fail in the same words."""
    with pytest.raises(JournalError, match=r"cannot be read \(Input/output error\)"):
        Chain(file, "journal", Failing("read", errno.EIO)).read()
    with pytest.raises(JournalError, match=r"cannot be written \(No space left on device\)"):
        Chain(file, "journal", Failing("replace", errno.ENOSPC)).rewrite([])

    assert read(file) == VALUES


FULL = """
import resource, sys
from pathlib import Path
from keybroker.chain import Chain
from keybroker.errors import JournalError
file = Path(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (file.stat().st_size + 10,) * 2)
try:
    Chain(file, "journal").append({"e": "x" * 100}, sync=True)
except JournalError as error:
    print(error.message)
"""


def test_a_disk_that_fills_up_in_the_middle_of_a_line_keeps_none_of_it(file: Path) -> None:
    """The kernel takes ten bytes of a record and no more: they are taken back."""
    before = file.read_bytes()

    done = subprocess.run(
        [sys.executable, "-c", FULL, str(file)], capture_output=True, text=True, check=False
    )

    assert done.stdout == f"journal: {file}: cannot be written (No space left on device)\n"
    assert file.read_bytes() == before


def test_a_link_in_the_file_s_place_is_not_followed(file: Path, tmp_path: Path) -> None:
    """Neither read nor written through."""
    link = tmp_path / "link.jsonl"
    link.symlink_to(file)
    before = file.read_bytes()

    assert "cannot be read" in refused(link)
    with pytest.raises(JournalError, match="cannot be written"):
        Chain(link, "journal").append({"e": 5}, sync=True)
    assert file.read_bytes() == before


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("chain") / "j.jsonl"


@given(st.binary(max_size=200), st.booleans())
def test_any_bytes_are_records_or_an_error(scratch: Path, data: bytes, headed: bool) -> None:
    """Reading and adding raise JournalError and nothing else."""
    first = b'{"n":0,"format":1,"kind":"journal","prev":""}\n' if headed else b""
    scratch.write_bytes(first + data)
    for act in (
        Chain(scratch, "journal").read,
        lambda: Chain(scratch, "journal").append({}, sync=False),
    ):
        try:
            act()
        except JournalError as error:
            assert error.message.startswith(f"journal: {scratch}: ")
