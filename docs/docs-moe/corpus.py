"""Collect the documentation of unpacked Debian packages into one corpus.

usage: corpus.py PACKAGES corpus.jsonl

PACKAGES is the folder that the packages were unpacked into with `dpkg -x`. A line of the corpus is one document:
{"domain": ..., "split": "train" or "valid", "text": ...}. The same packages give the same bytes.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from selectolax.lexbor import LexborHTMLParser

MIN_DOCUMENT = 400  # characters; shorter ones are mostly indices
MIN_REPEATED_PARAGRAPH = 60  # characters; longer paragraphs appear once in the corpus
VALIDATION_SHARE = 50  # one document in so many is held out

Reader = Callable[[Path], str]

# ---- readers: one a kind of file

NOT_CONTENT = "script, style, nav, head, .sidebar, .navheader, .navfooter, .sphinxsidebar, .footer, .related, #menu-bar, .menu"
BLOCKS = "p, div, li, pre, h1, h2, h3, h4, h5, tr, dt, dd, br, table"


def read_text(path: Path) -> str:
    """Sources that read well as they are: reStructuredText, AsciiDoc, POD."""
    return path.read_text(encoding="utf8", errors="ignore")


def html_reader(*content: str) -> Reader:
    """A reader of the first element that one of the CSS selectors `content` finds, or else of the whole body."""

    def read(path: Path) -> str:
        page = LexborHTMLParser(read_text(path))
        for element in page.css(NOT_CONTENT):
            element.decompose()
        root = next((found for selector in content if (found := page.css_first(selector))), page.body)
        if root is None:
            return ""
        for block in root.css(BLOCKS):
            block.insert_after("\n")
        return root.text(separator="")

    return read


HEADINGS = {"SH", "SS"}
PARAGRAPHS = {"PP", "P", "TP", "LP", "IP"}
FONTS = {"B", "I", "BR", "BI", "RB", "IR", "RI", "IB", "SM"}


def read_man(path: Path) -> str:
    """The text of a manual page; of its macros, headings, paragraphs and what is set in a font."""
    with gzip.open(path, "rt", encoding="utf8", errors="ignore") as file:
        source = file.read()
    if source.startswith(".so "):  # another name of a page
        return ""
    lines = []
    for line in source.splitlines():
        if line.startswith(('.\\"', "'\\\"")):
            continue
        request = re.match(r"\.([A-Za-z]+)\s*(.*)", line)
        if request is None:
            lines.append(line)
            continue
        macro, arguments = request.groups()
        if macro in HEADINGS:
            lines.append("\n" + arguments.strip('"'))
        elif macro in PARAGRAPHS:
            lines.append("\n")
        elif macro in FONTS:
            lines.append(arguments.replace('"', ""))
    text = "\n".join(lines)
    text = re.sub(r"\\f[A-Z]|\\f\[[A-Z]*\]", "", text)  # changes of font
    text = text.replace("\\-", "-")
    return re.sub(r"\\\(..|\\[&|/e~]", "", text)  # named characters and thin spaces


# ---- where the documents are


@dataclass(frozen=True)
class Source:
    domain: str
    pattern: str  # a glob below usr/share
    read: Reader


RUST_BOOKS = (
    "book",
    "reference",
    "nomicon",
    "rust-by-example",
    "rustc",
    "edition-guide",
    "embedded-book",
    "rustdoc",
    "cargo",
    "unstable-book",
)

# Of documents that share text the first in this order keeps it.
SOURCES = (
    Source("python", "doc/python3.11/html/_sources/**/*.txt", read_text),
    Source("sql", "doc/postgresql-doc-15/html/*.html", html_reader()),
    Source("sql", "doc/sqlite3/*.html", html_reader(".fancy")),
    Source("git", "doc/git-doc/**/*.txt", read_text),
    *(
        Source("rust", f"doc/rust-doc/html/{book}/**/*.html", html_reader("main", "#content"))
        for book in RUST_BOOKS
    ),
    Source("rust", "doc/rust-doc/html/std/**/*.html", html_reader("#main-content")),
    Source("perl", "perl/**/*.pod", read_text),
    Source("man", "man/man[1-8]/*.gz", read_man),
)


def documents(packages: Path) -> Iterator[tuple[Source, Path]]:
    for source in SOURCES:
        for path in sorted((packages / "usr/share").glob(source.pattern)):
            if path.name != "print.html":  # a whole book once more, for printing
                yield source, path


# ---- what becomes of their text


def tidy(text: str) -> str:
    """No blanks at the ends of lines, no runs of empty lines, no deep indentation."""
    text = re.sub(r"[ \t]+\n", "\n", text)
    text = re.sub(r"\n{3,}", "\n\n", text)
    return re.sub(r"[ \t]{9,}", " " * 8, text).strip()


def drop_repeated(text: str, seen: set[bytes]) -> str:
    """Without the paragraphs that are in `seen`, to which the others are added: boilerplate, generated pages."""
    kept = []
    for paragraph in text.split("\n\n"):
        digest = hashlib.md5(paragraph.strip().encode(), usedforsecurity=False).digest()
        if len(paragraph) <= MIN_REPEATED_PARAGRAPH or digest not in seen:
            seen.add(digest)
            kept.append(paragraph)
    return "\n\n".join(kept)


def split_of(file_name: str) -> str:
    """By a hash of the name, so that a document stays where it is whatever others come or go."""
    digest = hashlib.md5(file_name.encode(), usedforsecurity=False).hexdigest()
    return "valid" if int(digest, 16) % VALIDATION_SHARE == 0 else "train"


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Collect the documentation of unpacked packages into one corpus."
    )
    parser.add_argument("packages", type=Path, help="folder that the packages were unpacked into")
    parser.add_argument("corpus", type=Path, help="file to write, one JSON document a line")
    options = parser.parse_args()

    seen: set[bytes] = set()
    counts: Counter[tuple[str, str]] = Counter()
    characters: Counter[tuple[str, str]] = Counter()
    with options.corpus.open("w", encoding="utf8") as corpus:
        for source, path in documents(options.packages):
            text = tidy(source.read(path))
            if len(text) >= MIN_DOCUMENT:
                text = drop_repeated(text, seen)
            if len(text) < MIN_DOCUMENT:
                continue
            split = split_of(path.name)
            corpus.write(json.dumps({"domain": source.domain, "split": split, "text": text}) + "\n")
            counts[source.domain, split] += 1
            characters[source.domain, split] += len(text)
    for key in sorted(counts):
        print(*key, f"{counts[key]} documents", f"{characters[key]} characters")


if __name__ == "__main__":
    main()
