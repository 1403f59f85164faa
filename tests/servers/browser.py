"""
A browser that signs somebody in: it follows redirects, keeps cookies, fills forms, runs no script.

    BROWSER="python tests/servers/browser.py --user ada %s"  makes `webbrowser.open` walk the pages

It knows nothing of a page but its forms: a name goes where one is asked for, a code where one is,
and of several buttons it presses the one that does not refuse.
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from html.parser import HTMLParser
from http.client import HTTPResponse
from http.cookiejar import CookieJar
from pathlib import Path
from urllib.parse import quote, unquote, urlencode, urljoin, urlsplit

MOST_STEPS = 30
SECONDS = 30
PASSWORD = "x"  # the providers of the tests take any
REFUSING = re.compile(r"deny|cancel|reject|abort|refuse|decline", re.I)
NAMES = ("login", "username", "email")


@dataclass(frozen=True, slots=True)
class Page:
    """Where a walk ended."""

    url: str = field(repr=False)
    status: int
    text: str = field(repr=False)


@dataclass(slots=True)
class Browser:
    """
    One browser, with its cookies; whoever opens a second address in it is signed in still.

    Args:
        user: Whose name is typed.
        code: What is typed where a code is asked for and none stands there.
        team: What is chosen where there is a choice; empty: the first.
        refuses: The beginning of the address of a page on which it refuses; empty: on none.
        before: Stops before a page whose address begins so; empty: goes to the end.
    """

    user: str = "ada"
    code: str = ""
    team: str = ""
    refuses: str = ""
    before: str = ""
    visited: list[str] = field(default_factory=list)
    _cookies: CookieJar = field(default_factory=CookieJar)

    def open(self, url: str) -> Page:
        """
        Walk from an address until there is nothing to press.

        Raises:
            OSError: A page does not answer, or the walk has no end.
        """
        form: dict[str, str] | None = None
        sent: set[tuple[str, str]] = set()
        refused = False
        for _ in range(MOST_STEPS):
            if self.before and url.startswith(self.before):
                return Page(url, 0, "")
            status, location, text = self._fetch(url, form)
            if location:
                if status not in (307, 308):
                    form = None
                url = urljoin(url, location)
                continue
            page = _Reader()
            page.feed(text)
            refuse = bool(self.refuses) and url.startswith(self.refuses)
            if refuse and page.way_out:
                url, form = urljoin(url, page.way_out), None
                continue
            if status >= 400 or page.form is None or refused:
                return Page(url, status, text)
            target = urljoin(url, page.form.action)
            form = self._filled(page.form, refuse=refuse)
            refused = refuse and any(REFUSING.search(one) for pair in form.items() for one in pair)
            if page.form.method == "get":
                target, form = f"{target.partition('?')[0]}?{urlencode(form)}", None
            once = (target, urlencode(form or {}))
            if once in sent:  # it did not like it, and would not the next time
                return Page(url, status, text)
            sent.add(once)
            url = target
        raise OSError(f"{MOST_STEPS} pages, and no end")

    def _fetch(self, url: str, form: dict[str, str] | None) -> tuple[int, str, str]:
        self.visited.append(url)
        data = None if form is None else urlencode(form).encode()
        request = urllib.request.Request(url, data=data)
        if form is not None:
            place = urlsplit(url)
            request.add_header("origin", f"{place.scheme}://{place.netloc}")
            request.add_header("sec-fetch-site", "same-origin")
        opener = urllib.request.build_opener(
            urllib.request.ProxyHandler({}),
            urllib.request.HTTPCookieProcessor(self._cookies),
            _AsItIs(),
        )
        try:
            answer: HTTPResponse = opener.open(request, timeout=SECONDS)
        except urllib.error.HTTPError as error:
            answer = error  # type: ignore[assignment]  # it is one as well
        with answer:
            text = answer.read().decode("utf-8", "replace")
        return answer.status, answer.headers.get("location") or "", text

    def _filled(self, form: _Form, *, refuse: bool) -> dict[str, str]:
        """Return what is sent."""
        sent = dict(form.values)
        for name in form.values:
            if name in NAMES:
                sent[name] = self.user
            elif name == "password":
                sent[name] = PASSWORD
            elif name == "user_code" and not form.values[name]:
                sent[name] = self.code
        for name, options in form.choices.items():
            sent[name] = self.team if self.team in options else options[0]
        for name, value in form.buttons:
            if bool(REFUSING.search(f"{name} {value}")) == refuse:
                sent[name] = value
                break
        return sent


@dataclass(slots=True)
class _Form:
    action: str
    method: str
    values: dict[str, str] = field(default_factory=dict)
    choices: dict[str, list[str]] = field(default_factory=dict)
    buttons: list[tuple[str, str]] = field(default_factory=list)


class _Reader(HTMLParser):
    """The first form of a page, and where a link leads that refuses."""

    def __init__(self) -> None:
        super().__init__()
        self.form: _Form | None = None
        self.way_out = ""
        self._open = False
        self._choice: list[str] | None = None
        self._link = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        at = {name: value or "" for name, value in attrs}
        name, kind = at.get("name", ""), at.get("type", "")
        if tag == "a":
            self._link = at.get("href", "")
        elif tag == "form" and self.form is None:
            self.form = _Form(at.get("action", ""), at.get("method", "get").lower())
            self._open = True
        if self.form is None or not (self._open or "form" in at):  # a button may be outside of it
            return
        if tag == "button" or (tag == "input" and kind == "submit"):
            if name:
                self.form.buttons.append((name, at.get("value", "")))
        elif tag == "input" and name and (kind != "checkbox" or "checked" in at):
            self.form.values[name] = at.get("value", "")
        elif tag == "select" and name:
            self._choice = self.form.choices.setdefault(name, [])
        elif tag == "option" and self._choice is not None:
            self._choice.append(at.get("value", ""))

    def handle_data(self, data: str) -> None:
        if self._link and REFUSING.search(data):
            self.way_out = self._link

    def handle_endtag(self, tag: str) -> None:
        if tag == "form":
            self._open = False
        elif tag == "select":
            self._choice = None
        elif tag == "a":
            self._link = ""


class _AsItIs(urllib.request.HTTPRedirectHandler):
    """Follows nothing: each page is looked at."""

    def redirect_request(self, *_: object) -> None:
        return None


def command(user: str = "ada", code: str = "", refuses: str = "") -> str:
    """Return a value of BROWSER that walks the pages as somebody."""
    words = [sys.executable, "-I", str(Path(__file__).resolve()), "--user", user]
    words += ["--code", code] if code else []
    # BROWSER holds several, with a colon between them
    words += ["--refuses", quote(refuses, safe="")] if refuses else []
    return f"{shlex.join(words)} %s"


def main() -> None:
    """Walk from the address that is named; the exit status says whether it ended well."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--user", default="ada")
    parser.add_argument("--code", default="")
    parser.add_argument("--refuses", default="")
    parser.add_argument("url")
    given = parser.parse_args()
    page = Browser(given.user, given.code, refuses=unquote(given.refuses)).open(given.url)
    sys.exit(0 if page.status < 400 else 1)


if __name__ == "__main__":
    main()
