"""
Signing in with a real browser, and our page as it is seen there.

The pictures are in docs/images, for people to look at; `make screenshots` takes them again.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import pytest

from keybroker.login import page
from keybroker.login.loopback import STRANGER
from tests.people import Person, address
from tests.resident import Resident
from tests.servers.chromium import Chromium
from tests.servers.oidc import Oidc

IMAGES = Path(__file__).parent.parent / "docs" / "images"
TAKE = "KEYBROKER_SCREENSHOTS"  # a folder for the pictures
REFUSED = "The sign-in was refused: End-User aborted interaction."
PAGES = {
    "success": page.success("corp", "ada@example.com"),
    "failure": page.failure("corp", REFUSED),
}
SCREENS = {"desktop": (900, 560), "phone": (360, 640)}
LEAST_CONTRAST = 4.5  # WCAG 2.1, AA


@pytest.fixture(scope="module")
def chromium() -> Iterator[Chromium]:
    with Chromium() as browser:
        yield browser


@pytest.fixture
def ada(resident: Resident, oidc: Oidc) -> Person:
    """Somebody whose browser is opened by hand."""
    person = Person(resident, oidc)
    resident.environment["BROWSER"] = "true %s"
    return person


def pictures(tmp_path: Path) -> Path:
    """Return where pictures go."""
    folder = Path(os.environ.get(TAKE) or tmp_path)
    folder.mkdir(exist_ok=True)
    return folder


def mark(name: str) -> str:
    """Return what tells a page from what it was before."""
    return sha256(PAGES[name].encode()).hexdigest()[:12]


def words(chromium: Chromium) -> str:
    """Return what a person reads, on one line."""
    return " ".join(chromium.text.split())


def look(chromium: Chromium, name: str, folder: Path) -> None:
    """Look at the page that is shown: on a desk and in a hand, by day and by night."""
    backgrounds = []
    for dark in (False, True):
        for screen, (width, height) in SCREENS.items():
            chromium.show(width=width, height=height, dark=dark)
            wide, inner = chromium.ask("return [document.documentElement.scrollWidth, innerWidth]")
            assert (wide, inner) == (width, width), "nobody scrolls sideways"
            texts = chromium.contrasts()
            assert {said for said, _, _ in texts} >= {"keybroker"}
            assert [one for one in texts if one[2] < LEAST_CONTRAST] == []
            assert min(size for _, size, _ in texts) >= 12
            file = folder / f"login-{name}-{screen}{'-dark' if dark else ''}.png"
            chromium.picture(file)
            assert file.read_bytes().startswith(b"\x89PNG")
        backgrounds.append(chromium.ask("return getComputedStyle(document.body).backgroundColor"))
    by_day, by_night = [int(one.split("(")[1].split(",")[0]) for one in backgrounds]
    assert by_day > 200
    assert by_night < 60


def is_ours_alone(chromium: Chromium, back: str) -> None:
    """See that our page asked for nothing, keeps nothing, and can do nothing."""
    assert chromium.url == f"{back}/signed-in"
    asked = [url for of, url in chromium.asked() if of.startswith(back)]
    assert {url for url in asked if not url.startswith(f"{back}?")} <= {
        f"{back}/signed-in",
        f"{back.removesuffix('/callback')}/favicon.ico",
    }
    assert chromium.ask("return [document.cookie, localStorage.length]") == ["", 0]
    entries = chromium.ask("return performance.getEntries().map((one) => one.name)")
    assert not [one for one in entries if "code=" in one]
    blocked = chromium.driver.execute_async_script(
        "const done = arguments[0];"
        "fetch('/callback/signed-in').then(() => done('fetched'), () => done('blocked'))"
    )
    assert blocked == "blocked"


def test_a_browser_signs_in(ada: Person, chromium: Chromium, tmp_path: Path) -> None:
    with ada.typing("login") as process:
        url = address(process)
        chromium.show(width=900, height=560)
        chromium.asked()
        chromium.sign_in(url, "ada", "You can close this window")
        assert process.wait(20) == 0
    assert "You are signed in to corp as ada@example.com." in words(chromium)
    is_ours_alone(chromium, chromium.url.removesuffix("/signed-in"))
    assert chromium.driver.page_source.count("ada@example.com") == 1
    look(chromium, "success", pictures(tmp_path))


def test_a_person_refuses(ada: Person, chromium: Chromium, tmp_path: Path) -> None:
    with ada.typing("login") as process:
        url = address(process)
        chromium.open(ada.provider.issuer)
        chromium.driver.delete_all_cookies()
        chromium.show(width=900, height=560)
        chromium.asked()
        chromium.sign_in(url, "ada", "Not signed in", refuse=True)
        assert process.wait(20) == 77
    assert REFUSED in words(chromium)
    assert "keybroker login corp" in chromium.text
    is_ours_alone(chromium, chromium.url.removesuffix("/signed-in"))
    look(chromium, "failure", pictures(tmp_path))


def test_a_code_is_confirmed_in_a_browser(ada: Person, chromium: Chromium) -> None:
    with ada.typing("login", "--device") as process:
        assert process.stderr is not None
        address(process)
        whole = process.stderr.readline().split()[-1]
        chromium.show(width=900, height=560)
        chromium.sign_in(whole, "bob", "Sign-in Success")
        assert process.wait(20) == 0
    assert ada.cli("whoami")[1] == "corp: bob@example.com; renewed by itself\n"


def test_an_older_page_is_told_that_it_is_one(ada: Person, chromium: Chromium) -> None:
    """It changes nothing: the right one is waited for."""
    with ada.typing("login") as process:
        url = address(process)
        old = url.partition("redirect_uri=")[2].partition("&")[0]
        back = old.replace("%3A", ":").replace("%2F", "/")
        chromium.open(f"{back}?state=old&code=old")
        assert STRANGER in words(chromium)
        assert process.poll() is None


def test_the_pictures_are_of_the_pages_as_they_are() -> None:
    """They are taken again with `make screenshots`, which writes down of which page they are."""
    found = (IMAGES / "pages.txt").read_text().split()
    assert found == [f"{name}:{mark(name)}" for name in PAGES]
    expected = {
        f"login-{name}-{screen}{scheme}.png"
        for name in PAGES
        for screen in SCREENS
        for scheme in ("", "-dark")
    }
    assert {one.name for one in IMAGES.glob("login-*")} == expected


def main() -> None:
    """Take the pictures."""
    environment = {**os.environ, TAKE: str(IMAGES)}
    tests = ["-n", "0", "-k", "signs_in or refuses", __file__]
    done = subprocess.run([sys.executable, "-m", "pytest", *tests], env=environment, check=False)
    if done.returncode == 0:
        (IMAGES / "pages.txt").write_text("".join(f"{one}:{mark(one)}\n" for one in PAGES))
    sys.exit(done.returncode)


if __name__ == "__main__":
    main()
