"""The page that a browser shows when a sign-in is over: nothing from outside, no secret in it."""

from html import escape

HEADERS = {
    "content-type": "text/html; charset=utf-8",
    "cache-control": "no-store",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "content-security-policy": (
        "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    ),
}
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title} · keybroker</title>
<style>
:root {{ --back: #f6f7f9; --card: #ffffff; --text: #1c2430; --soft: #5b6675; --line: #e2e6ec;
  --mark: {mark_light}; --wash: {wash_light}; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --back: #11151b; --card: #1a2029; --text: #e8ecf2; --soft: #9aa6b5; --line: #2b3340;
    --mark: {mark_dark}; --wash: {wash_dark}; }}
}}
* {{ box-sizing: border-box; }}
body {{ margin: 0; min-height: 100vh; display: grid; place-items: center; padding: 1.5rem;
  background: var(--back); color: var(--text);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }}
main {{ width: 100%; max-width: 27rem; background: var(--card); border: 1px solid var(--line);
  border-radius: 1rem; padding: 2.25rem 2rem 1.75rem; text-align: center;
  box-shadow: 0 1px 2px rgb(0 0 0 / .06), 0 12px 32px rgb(0 0 0 / .08); }}
.mark {{ width: 3.5rem; height: 3.5rem; margin: 0 auto 1.25rem; display: grid;
  place-items: center; border-radius: 50%; background: var(--wash); }}
.mark svg {{ width: 1.75rem; height: 1.75rem; fill: none; stroke: var(--mark); stroke-width: 2.5;
  stroke-linecap: round; stroke-linejoin: round; }}
h1 {{ margin: 0 0 .5rem; font-size: 1.375rem; line-height: 1.25; letter-spacing: -.01em; }}
h1, p {{ text-wrap: balance; }}
p {{ margin: 0 0 .75rem; color: var(--soft); overflow-wrap: anywhere; }}
p strong {{ color: var(--text); font-weight: 600; }}
footer {{ margin-top: 1.5rem; padding-top: 1rem; border-top: 1px solid var(--line);
  font-size: .8125rem; color: var(--soft); }}
code {{ display: block; width: fit-content; max-width: 100%; margin: .5rem auto 0; user-select: all;
  padding: .375rem .75rem; border: 1px solid var(--line); border-radius: .5rem;
  background: var(--back); color: var(--text);
  font: .875rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }}
</style>
</head>
<body>
<main>
<div class="mark" aria-hidden="true"><svg viewBox="0 0 24 24">{sign}</svg></div>
<h1>{title}</h1>
{body}
<footer>keybroker</footer>
</main>
</body>
</html>
"""
_GOOD = {
    "mark_light": "#12805c",
    "wash_light": "#e3f4ec",
    "mark_dark": "#4fd1a1",
    "wash_dark": "#173329",
    "sign": '<path d="M5 12.5l4.5 4.5L19 7.5"/>',
}
_BAD = {
    "mark_light": "#b3372f",
    "wash_light": "#fbe9e7",
    "mark_dark": "#ff8a80",
    "wash_dark": "#3a1f1f",
    "sign": '<path d="M12 4.5v9"/><path d="M12 19v.01"/>',
}


def success(login: str, who: str) -> str:
    """Return the page for a person who has signed in."""
    name = f" as <strong>{escape(who)}</strong>" if who else ""
    body = (
        f"<p>You are signed in to <strong>{escape(login)}</strong>{name}.</p>\n"
        "<p>You can close this window and go back to your terminal.</p>"
    )
    return _PAGE.format(title="Signed in", body=body, **_GOOD)


def failure(login: str, reason: str) -> str:
    """Return the page for one who has not, with the reason in words of ours."""
    body = (
        f"<p>{escape(reason)}</p>\n"
        "<p>To try again, type this in your terminal:"
        f"<code>keybroker login {escape(login)}</code></p>"
    )
    return _PAGE.format(title="Not signed in", body=body, **_BAD)
