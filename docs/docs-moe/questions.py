"""Make questions and answers from the one-line descriptions in a corpus.

usage: questions.py corpus.jsonl questions.jsonl

Manual pages and their like open with a name and what it does in a line. Both are put into a few fixed forms:
{"question": "What does git bisect do?", "answer": "Use binary search to find the commit that introduced a bug."}
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

MAX_DETAILS = 400  # characters


@dataclass(frozen=True)
class Patterns:
    summary: str  # groups: name, description
    details: str  # group: a longer text


PATTERNS = {
    "man": Patterns(r"(?s)\bNAME\n(.{2,200}?) - (.{5,200}?)\n", r"(?s)DESCRIPTION\n+(.{40,900}?)\n\n"),
    "git": Patterns(r"NAME\n-+\n([\w-]+) - (.{5,200}?)\n", r"(?s)DESCRIPTION\n-+\n+(.{40,900}?)\n\n"),
    "perl": Patterns(
        r"=head1 NAME\s+([\w:]+) -+ (.{5,160}?)\n", r"(?s)=head1 DESCRIPTION\s+([A-Z].{40,900}?)\n\n"
    ),
    "python": Patterns(r":mod:`!?([\w.]+)` --- (.{5,160}?)\n", r"(?s)\n\n((?:The|This) :?mod.{40,700}?)\n\n"),
    "sql": Patterns(r"\n([A-Z][A-Z ]{3,40}) — ([a-z].{5,160}?)\n", r"(?s)Description\n+(.{40,900}?)\n\n"),
}
HAS_COMMANDS = {"man", "git", "sql"}  # where a description says what one can do: "list directory contents"


@dataclass(frozen=True)
class Fact:
    domain: str
    name: str
    description: str  # without a full stop
    details: str  # empty if there are none


def one_line(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()


def names_of(domain: str, title: str) -> list[str]:
    """What people call the subject of a page."""
    match domain:
        case "man":
            return re.split(r",\s*", title)[:4]
        case "git":
            return [re.sub(r"^git-", "git ", title)]
        case "python":
            return [f"the {title} module"]
        case _:
            return [title]


def first_sentences(text: str) -> str:
    text = re.sub(r":\w+:`!?~?([^`<]+)[^`]*`", r"\1", text)  # reStructuredText's roles
    return " ".join(re.split(r"(?<=[.!?]) (?=[A-Z])", one_line(text))[:2])[:MAX_DETAILS]


def facts_of(domain: str, text: str) -> Iterator[Fact]:
    patterns = PATTERNS.get(domain)
    summary = patterns and re.search(patterns.summary, text)
    if not patterns or not summary:
        return
    description = one_line(summary[2]).rstrip(".")
    details = re.search(patterns.details, text)
    for found in names_of(domain, one_line(summary[1]).rstrip(".")):
        name = re.sub(r"[`*\\]", "", found).strip()
        if 1 < len(name) < 50 and 8 < len(description) < 200:
            yield Fact(domain, name, description, first_sentences(details[1]) if details else "")


def questions_about(fact: Fact, rng: random.Random) -> Iterator[tuple[str, str]]:
    name, description = fact.name, fact.description
    questions = [
        f"What does {name} do?",
        f"What is {name}?",
        f"{name}?",
        f"Describe {name} in one sentence.",
        f"What is {name} for?",
    ]
    for question in rng.sample(questions, 3):
        named = rng.random() < 0.5
        yield question, f"{name} - {description}." if named else f"{description[0].upper()}{description[1:]}."
    if fact.details:
        yield rng.choice([f"Explain {name}.", f"Tell me more about {name}."]), fact.details
    if fact.domain in HAS_COMMANDS:
        purpose = description[0].lower() + description[1:]
        yield rng.choice([f"How do I {purpose}?", f"What can I use to {purpose}?"]), f"Use {name}."


def make_questions(documents: Iterable[dict[str, str]], rng: random.Random) -> list[tuple[str, str]]:
    facts: dict[str, Fact] = {}
    for document in documents:
        for fact in facts_of(document["domain"], document["text"]):
            facts.setdefault(fact.name, fact)
    pairs = [pair for fact in facts.values() for pair in questions_about(fact, rng)]
    rng.shuffle(pairs)
    print(f"{len(facts)} facts, {len(pairs)} questions")
    return pairs


def main() -> None:
    parser = argparse.ArgumentParser(description="Make questions and answers from one-line descriptions.")
    parser.add_argument("corpus", type=Path, help="the file that corpus.py wrote")
    parser.add_argument("questions", type=Path, help="file to write, one JSON question a line")
    parser.add_argument("--seed", type=int, default=7, help="(default: %(default)s)")
    options = parser.parse_args()
    with options.corpus.open(encoding="utf8") as lines:
        pairs = make_questions(map(json.loads, lines), random.Random(options.seed))
    with options.questions.open("w", encoding="utf8") as file:
        for question, answer in pairs:
            file.write(json.dumps({"question": question, "answer": answer}) + "\n")


if __name__ == "__main__":
    main()
