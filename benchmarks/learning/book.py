"""The text of a book in pages of HTML, one for which no setting was chosen: ``book.py mainindex.htm book.txt``.

The book that results are reported on is of Debian's package cfi-en 3.0 and in the public domain; its pages lie in
``/usr/share/doc/cfi-en/html``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path

from maskpro_kernels.files import write_whole

# Inline elements; all others begin and end a paragraph
INLINE = {"a", "abbr", "b", "cite", "code", "em", "font", "i", "img", "small", "span", "strong", "sub", "sup"}
HIDDEN = {"script", "style", "title"}


class Page(HTMLParser):
    """Text of a page, and its links.

    Attributes:
        paragraphs: without those that are empty; white space is one space.
        links: addresses, in their order.
    """

    def __init__(self, source: str):
        super().__init__()
        self.links: list[str] = []
        self._texts = [""]
        self._hidden = 0
        self.feed(source)
        self.close()
        joined = (" ".join(text.split()) for text in self._texts)
        self.paragraphs = [text for text in joined if text]

    def handle_starttag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        self._hidden += tag in HIDDEN
        self.links += [value for name, value in attrs if tag == "a" and name == "href" and value]
        self._end_paragraph(tag)

    def handle_endtag(self, tag: str) -> None:
        self._hidden -= tag in HIDDEN
        self._end_paragraph(tag)

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self._texts[-1] += data

    def _end_paragraph(self, tag: str) -> None:
        if tag not in INLINE:
            self._texts.append("")


def book(contents: Path) -> str:
    """The text of the pages beside a table of contents that it leads to, in its order, a blank line between paragraphs.

    Raises:
        ValueError: if it leads to none.
    """

    def read(path: Path) -> Page:
        return Page(path.read_text(encoding="latin-1"))

    linked = dict.fromkeys(contents.parent / link for link in read(contents).links)
    pages = [read(path) for path in linked if path.suffix in (".htm", ".html") and path.is_file()]
    if not pages:
        raise ValueError(f"contents: expected links to pages beside {str(contents)!r}, got none")
    return "\n\n".join(text for page in pages for text in page.paragraphs) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="write the text of a book in pages of HTML", allow_abbrev=False)
    parser.add_argument("contents", type=Path, help="the page with the table of contents")
    parser.add_argument("output", type=Path)
    args = parser.parse_args(argv)
    try:
        text = book(args.contents)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    write_whole(args.output, text.encode())


if __name__ == "__main__":
    main()
