"""Pins that docs/troubleshooting.md quotes messages that exist, and all that are raised."""

import ast
import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
TERM = re.compile(r"^(`.*)\n: ", re.MULTILINE)
ANYTHING = "\0"
# What torch says, not this package.
FOREIGN = {
    "Connection closed by peer",
    "Connection reset by peer",
    "Gloo connectFullMesh failed ...",
    "Timed out waiting ...",
    "register_comm_hook or register_builtin_comm_hook can only be called once",
}
# Mistakes in calls of the checkpoint classes and the planner, whose messages say all there is.
SELF_EVIDENT = {
    "keep must be",
    "is no rate",
    "is no number above 0",
    "is not above 0",
    "is not 1 or more",
    "is no function",
}


def text_of(node: ast.AST | None) -> str | None:
    """A string expression's text, with a mark for every value that is put into it."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=parts):
            return "".join(text_of(part) or ANYTHING for part in parts)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return (text_of(left) or ANYTHING) + (text_of(right) or ANYTHING)
    return None


@functools.cache
def nodes() -> list[ast.AST]:
    sources = sorted((ROOT / "commhooks").rglob("*.py"))
    return [node for path in sources for node in ast.walk(ast.parse(path.read_text()))]


def raised() -> list[str]:
    """The texts of all errors that are raised with a text of their own."""
    found = []
    for node in nodes():
        match node:
            # Its first argument is the name of one; what it says is quoted as "... must be ...".
            case ast.Raise(exc=ast.Call(func=ast.Name(id="refusal"))):
                continue
            case ast.Raise(exc=ast.Call(args=[argument, *_])):
                text = text_of(argument)
                if text is not None and re.search("[a-z]", text):
                    found.append(text)
    return found


def pattern(quoted: str) -> re.Pattern[str]:
    parts = [re.escape(part.strip()) for part in quoted.split("...") if part.strip()]
    return re.compile(".*?".join(parts), re.DOTALL)


QUOTED = [quoted for term in TERM.findall(PAGE) for quoted in re.findall(r"`([^`]+)`", term)]


@pytest.mark.parametrize("quoted", sorted(set(QUOTED) - FOREIGN))
def test_quoted_messages_exist(quoted: str) -> None:
    texts = [text for node in nodes() if (text := text_of(node)) is not None]
    assert any(pattern(quoted).search(text) for text in texts), quoted


def test_raised_messages_are_quoted() -> None:
    patterns = [pattern(quoted) for quoted in QUOTED]
    missing = [
        text
        for text in raised()
        if not any(each.search(text) for each in patterns)
        and not any(words in text for words in SELF_EVIDENT)
    ]
    assert not missing
