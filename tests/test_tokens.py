"""Keys that were pasted into settings and shells: found, told apart, taken out."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from keybroker.connect.tokens import Found, take_out, tokens
from keybroker.errors import ConfigError

TOKEN = "sk-token-0c6f2f1d8e4b4a7fa5b9d1c3"


@pytest.fixture
def user(tmp_path: Path) -> Path:
    home = tmp_path / "home"
    (home / ".claude").mkdir(parents=True)
    return home


def put(home: Path, name: str, text: str) -> Path:
    path = home / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode())
    return path


def found(home: Path, folder: Path | None = None) -> list[Found]:
    return tokens({"HOME": str(home)}, folder)


LINES = {
    # the line, and whether its value is known and it may be taken out
    f"export ANTHROPIC_AUTH_TOKEN={TOKEN}": True,
    f"ANTHROPIC_AUTH_TOKEN={TOKEN}": True,
    f"export ANTHROPIC_AUTH_TOKEN='{TOKEN}'": True,
    f'export ANTHROPIC_AUTH_TOKEN="{TOKEN}"': True,
    f"export ANTHROPIC_AUTH_TOKEN={TOKEN};": True,
    f"export ANTHROPIC_AUTH_TOKEN={TOKEN} # of the gateway": True,
    f"export ANTHROPIC_AUTH_TOKEN={TOKEN}  ": True,
    f"set -gx ANTHROPIC_AUTH_TOKEN {TOKEN}": True,
    f"set --global --export ANTHROPIC_AUTH_TOKEN '{TOKEN}'": True,
    f"$env:ANTHROPIC_AUTH_TOKEN = '{TOKEN}'": True,
    f"  export ANTHROPIC_AUTH_TOKEN={TOKEN}": False,
    f"export ANTHROPIC_AUTH_TOKEN={TOKEN} OTHER=1": False,
    f"export OTHER=1 ANTHROPIC_AUTH_TOKEN={TOKEN}": False,
    f"export ANTHROPIC_AUTH_TOKEN={TOKEN} && echo": False,
    f"ANTHROPIC_AUTH_TOKEN={TOKEN} claude": False,
    f"alias cl='ANTHROPIC_AUTH_TOKEN={TOKEN} claude'": False,
    "export ANTHROPIC_AUTH_TOKEN=$(pass show llm)": False,
    "export ANTHROPIC_AUTH_TOKEN=`pass`": False,
    'export ANTHROPIC_AUTH_TOKEN="$LLM_KEY"': False,
    "export ANTHROPIC_AUTH_TOKEN=~/key": False,
}


@pytest.mark.parametrize("line", LINES)
def test_a_line_that_sets_a_key_is_found(user: Path, line: str) -> None:
    """Its value is known, and it may go, only if it does nothing else."""
    path = put(user, ".bashrc", f"# before\n{line}\nafter=1\n")
    (one,) = found(user)
    assert (one.path, one.line, one.variable) == (path, 2, "ANTHROPIC_AUTH_TOKEN")
    assert one.alone is LINES[line]
    assert (one.secret is not None) is LINES[line]
    assert TOKEN not in f"{one} {one!r}"
    if one.secret is not None:
        assert one.secret.reveal() == TOKEN
        take_out(one)
        assert path.read_text() == "# before\nafter=1\n"
    else:
        with pytest.raises(ConfigError, match="does more") as caught:
            take_out(one)
        assert TOKEN not in str(caught.value)
        assert line in path.read_text()


@pytest.mark.parametrize(
    "line",
    [
        f"# export ANTHROPIC_AUTH_TOKEN={TOKEN}",
        "unset ANTHROPIC_AUTH_TOKEN",
        "export ANTHROPIC_AUTH_TOKEN=",
        "export ANTHROPIC_AUTH_TOKEN=''",
        "export MY_ANTHROPIC_AUTH_TOKEN=x",
        "echo $ANTHROPIC_AUTH_TOKEN",
        f"cat <<'END'\nexport ANTHROPIC_AUTH_TOKEN={TOKEN}\nEND",
    ],
)
def test_what_sets_no_key_is_not_found(user: Path, line: str) -> None:
    """Comments, other variables, texts."""
    put(user, ".bashrc", f"{line}\n")
    assert found(user) == []


@pytest.mark.parametrize(
    "before", ["if true; then", "while true; do", "f() {", "else", "test x &&", "echo \\", "a |"]
)
def test_a_line_inside_of_something_is_left(user: Path, before: str) -> None:
    """A block that has nothing else would be broken without it."""
    put(user, ".zshrc", f"{before}\n\nexport ANTHROPIC_AUTH_TOKEN={TOKEN}\n")
    (one,) = found(user)
    assert not one.alone


def test_a_line_that_may_go_leaves_a_valid_file(user: Path) -> None:
    """As the shell sees it: the variable is gone, all the rest is as before."""
    before = f"A=1\nexport ANTHROPIC_AUTH_TOKEN={TOKEN}\nif true; then\n  B=2\nfi\n"
    path = put(user, ".profile", before)
    take_out(found(user)[0])
    script = f'. {path}; echo "$A$B${{ANTHROPIC_AUTH_TOKEN-none}}"'
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True, env={})
    assert done.stdout == "12none\n"


def test_every_place_is_looked_at(user: Path, tmp_path: Path) -> None:
    """Settings first, then shells; those of the project too."""
    project = tmp_path / "project"
    line = f"export ANTHROPIC_API_KEY={TOKEN}\n"
    settings = f'{{"env": {{"ANTHROPIC_AUTH_TOKEN": "{TOKEN}"}}}}'
    expected = [
        put(user, ".claude/settings.json", settings),
        put(project, ".claude/settings.local.json", settings),
        put(project, ".claude/settings.json", settings),
    ]
    for name in (".bashrc", ".bash_profile", ".profile", ".zshrc", ".zshenv", ".zprofile"):
        expected.append(put(user, name, line))
    fish = f"set -gx ANTHROPIC_AUTH_TOKEN {TOKEN}\n"
    expected.append(put(user, ".config/fish/config.fish", fish))
    shell = f"$env:ANTHROPIC_AUTH_TOKEN = '{TOKEN}'\r\n"
    expected.append(put(user, ".config/powershell/profile.ps1", shell))
    expected.append(put(user, ".config/powershell/Microsoft.PowerShell_profile.ps1", shell))
    expected.append(put(project, ".envrc", line))
    assert [one.path for one in found(user, project)] == expected


def test_claude_code_may_have_another_folder(user: Path, tmp_path: Path) -> None:
    """CLAUDE_CONFIG_DIR moves its settings."""
    path = put(tmp_path, "other/settings.json", f'{{"env": {{"ANTHROPIC_AUTH_TOKEN": "{TOKEN}"}}}}')
    put(user, ".claude/settings.json", f'{{"env": {{"ANTHROPIC_AUTH_TOKEN": "{TOKEN}"}}}}')
    environment = {"HOME": str(user), "CLAUDE_CONFIG_DIR": str(path.parent)}
    assert [one.path for one in tokens(environment)] == [path]


def test_a_key_goes_out_of_settings_and_nothing_else(user: Path) -> None:
    """Comments, order, indents and ends of lines stay."""
    text = (
        '{\r\n  // mine\r\n  "model": "opus",\r\n  "env": {\r\n'
        f'    "ANTHROPIC_AUTH_TOKEN": "{TOKEN}",\r\n    "OTHER": "1"\r\n  }}\r\n}}\r\n'
    )
    path = put(user, ".claude/settings.json", text)
    (one,) = found(user)
    assert one.line == 5
    take_out(one)
    line = f'    "ANTHROPIC_AUTH_TOKEN": "{TOKEN}",\r\n'
    assert path.read_bytes().decode() == text.replace(line, "")


def test_what_changed_meanwhile_stays_changed(user: Path) -> None:
    """Somebody edits the file: the key is looked for anew, and their edit is kept."""
    path = put(user, ".bashrc", f"export ANTHROPIC_AUTH_TOKEN={TOKEN}\n")
    (one,) = found(user)
    put(user, ".bashrc", f"A=1\nexport ANTHROPIC_AUTH_TOKEN={TOKEN}\nB=2\n")
    take_out(one)
    assert path.read_text() == "A=1\nB=2\n"


def test_another_key_in_its_place_is_left(user: Path) -> None:
    """It is not the one that was meant; the message names the file, and no value."""
    path = put(user, ".bashrc", f"export ANTHROPIC_AUTH_TOKEN={TOKEN}\n")
    (one,) = found(user)
    put(user, ".bashrc", f"export ANTHROPIC_AUTH_TOKEN={TOKEN}x\n")
    with pytest.raises(ConfigError, match="was changed meanwhile") as caught:
        take_out(one)
    assert TOKEN not in f"{caught.value} {caught.value.hint}"
    assert TOKEN in path.read_text()


def test_several_keys_go_out_of_one_file(user: Path) -> None:
    """Those that were found before the first of them went."""
    line = f"export ANTHROPIC_AUTH_TOKEN={TOKEN}\n"
    path = put(user, ".bashrc", f"{line}A=1\n{line}export ANTHROPIC_API_KEY={TOKEN}\n")
    for one in found(user):
        take_out(one)
    assert path.read_text() == "A=1\n"


def test_mode_and_links_stay(user: Path) -> None:
    """A profile that is a link into a folder of dotfiles stays one."""
    target = put(user, "dotfiles/bashrc", f"A=1\nexport ANTHROPIC_AUTH_TOKEN={TOKEN}\n")
    target.chmod(0o644)
    (user / ".bashrc").symlink_to("dotfiles/bashrc")
    take_out(found(user)[0])
    assert (user / ".bashrc").is_symlink()
    assert target.read_text() == "A=1\n"
    assert stat.S_IMODE(target.stat().st_mode) == 0o644
    assert sorted(os.listdir(target.parent)) == ["bashrc"]


def test_what_is_no_text_of_ours_is_passed_over(user: Path) -> None:
    """Broken settings, folders, pipes and huge files have no key for us."""
    put(user, ".claude/settings.json", f'{{"env": {{"ANTHROPIC_AUTH_TOKEN": "{TOKEN}"')
    put(user, ".zshrc", "#" * (2 << 20))
    (user / ".bashrc").mkdir()
    os.mkfifo(user / ".profile")
    assert found(user) == []
    shutil.rmtree(user)
    assert found(user) == []
