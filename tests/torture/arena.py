"""Where a hostile file is met: a folder that may be written to, one that may not, and what must not have happened afterwards."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

from tiny import Tiny, files
from torture.boxed import Wrong, command

from vavae_fast.errors import BadInput

# What a page must show as text wherever it stands: in an element, an attribute, a style, a table of Markdown.
HOSTILE = "</style></title><script>alert(1)</script><img src=x onerror=alert(1)>\"' onload='x & <b> [x](javascript:alert(1)) | `x`"
FOLDER = "<img src=x onerror=alert(1)>"  # the same as the name of a folder, which has no slash


@dataclass(frozen=True)
class Arena:
    """tiny: the pipeline, read only. box: empty, for the payload and what is written. outside: where nothing may change."""

    tiny: Tiny
    box: Path
    outside: Path

    @property
    def marker(self) -> Path:
        """What a payload makes when it runs."""
        return self.outside / "it ran"

    def refused(self, *words: object) -> None:
        """A command that must be refused in one line."""
        try:
            command(list(map(str, words)))
        except BadInput as error:
            if not any(0 < len(str(word)) and Path(str(word)).name in str(error) for word in words):
                raise Wrong(f"the line names nothing that was given: {error}") from None
            return
        raise Wrong(f"{words[0]} took it")

    def refuses(self, read: Callable[[], object]) -> None:
        """A reader that must refuse in one line."""
        try:
            read()
        except BadInput:
            return
        raise Wrong("was taken")

    def done(self, *words: object) -> None:
        """A command that must be done: what is hostile in its input is text to it."""
        try:
            command(list(map(str, words)))
        except BadInput as error:
            raise Wrong(f"refused: {error}") from None


def canaries(outside: Path) -> dict[str, str]:
    """What lies outside, and what is in it."""
    return {name: (outside / name).read_text(errors="replace") if not (outside / name).is_symlink() else "a link" for name in files(outside)}


def meet(arena: Arena, payload: Callable[[Arena], None]) -> bool:
    """The payload; `Wrong` when it ran, or something outside changed, whatever the reader said of it."""
    before = canaries(arena.outside)
    os.chdir(arena.box)
    try:
        payload(arena)
    finally:
        if arena.marker.exists():
            arena.marker.unlink()
            raise Wrong("code of the file was run")
        if canaries(arena.outside) != before:
            raise Wrong("something was written outside")
    return True


class _Page(HTMLParser):
    """Elements and attributes of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("script", "iframe", "object", "embed", "link", "base", "form", "b"):
            self.found.append(f"<{tag}>")
        self.found += [f"{tag} {name}" for name, _ in attrs if name.startswith("on")]
        loaded = [(name, value or "") for name, value in attrs if name in ("src", "href")]
        self.found += [f"{tag} {name}={value[:60]}" for name, value in loaded if not value.startswith("data:image/png;")]


def only_text(path: Path) -> None:
    """`Wrong` when a page holds an element or an attribute that runs or loads anything, or does not show the hostile text at all."""
    text = path.read_text(encoding="utf-8")
    page = _Page()
    page.feed(text)
    if page.found:
        raise Wrong(f"{path.name} holds {', '.join(page.found[:3])}")
    if "alert(1)" not in text:
        raise Wrong(f"{path.name} does not show what it was given: nothing was tried")
