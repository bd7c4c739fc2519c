"""The files of the page: what is served, what its headers allow, and that the files keep to it without them."""

import asyncio
import re
from typing import Any, cast

import pytest
from starlette.responses import Response

from client.gateway import static

PATHS = {route.path: route for route in static.routes()}
FILES = {path.name: path.read_text() for path in static.FOLDER.iterdir()}
SCRIPTS = [name for name in FILES if name.endswith(".js")]


def served(path: str) -> Response:
    return cast(Response, asyncio.run(PATHS[path].endpoint(cast(Any, None))))


def test_every_file_is_served_and_nothing_else() -> None:
    assert set(PATHS) == {"/"} | {f"/page/{name}" for name in FILES if name != "index.html"}
    assert all(not route.path_regex.search("/page/../app.py") for route in PATHS.values())
    assert served("/").body == FILES["index.html"].encode()
    assert served("/page/main.js").headers["content-type"] == "text/javascript; charset=utf-8"


def test_the_policy_allows_this_gateway_only() -> None:
    for path in PATHS:
        policy = served(path).headers["content-security-policy"]
        rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
        assert rules.pop("default-src") == "'none'"
        assert rules.pop("require-trusted-types-for") == "'script'"
        assert all(rules[f"{kind}-src"] == "'self'" for kind in ("script", "style", "connect", "img"))
        assert all(rules[name] == "'none'" for name in ("base-uri", "form-action", "frame-ancestors"))
        assert not {word for value in rules.values() for word in value.split()} - {"'self'", "'none'"}
        assert served(path).headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("name", SCRIPTS)
def test_text_never_becomes_html_or_a_program(name: str) -> None:
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function|\.style\b", FILES[name]
    )


def test_no_file_names_another_host() -> None:
    for name, text in FILES.items():
        found = set(re.findall(r"\b\w+://[^\s\"'`<>)]*|(?<=[\"'(])//\w[^\s\"']*", text))
        assert found <= {"http://www.w3.org/2000/svg"}, name  # of a namespace, which nobody fetches


def test_the_markup_has_no_program_and_no_style_of_its_own() -> None:
    page = FILES["index.html"]
    assert not re.search(r"\son\w+=|\sstyle=|<style|javascript:", page)
    assert re.findall(r"<script[^>]*>(.*?)</script>", page) == [""]


def test_files_are_small() -> None:
    for name, text in FILES.items():
        assert len(text.splitlines()) <= 300, name


def test_what_scripts_look_for_is_there() -> None:
    ids = set(re.findall(r'\bid="([\w-]+)"', FILES["index.html"]))
    for name in SCRIPTS:
        assert set(re.findall(r'getElementById\("([\w-]+)"\)', FILES[name])) <= ids, name
