"""A synthetic encyclopedia in WikiText-2's raw form: articles with headings, and facts that stay the same within one.

What a reader can predict: word order and agreement, the words of a topic, years that only go on, and every fact that
was told before (names, numbers, mottos). What nobody can: the facts themselves when they first appear.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from random import Random
from types import MappingProxyType

from mqbench.harness.models.standin_text import grammar
from mqbench.harness.models.standin_text.grammar import KINDS, TOPICS, Topic

SPLIT_ARTICLES: Mapping[str, int] = MappingProxyType({"train": 560, "valid": 160, "test": 160})
"""Articles of the shipped files."""

_PART = re.compile(r"\{([a-z-]+)\}|<([a-z-]+)>|\[([^|\]]*)\|([^\]]*)\]")


def articles(split: str, seed: int = 0) -> Iterator[list[str]]:
    """Endless articles as lists of lines; no two splits share a random stream."""
    rng = Random(f"encyclopedia-{split}-{seed}")
    while True:
        yield Article(rng).lines()


def raw_text(split: str, count: int, seed: int = 0) -> str:
    """``count`` articles as the text of a WikiText-2 raw file: blank lines hold one space."""
    stream = articles(split, seed)
    return "".join(f"{line}\n" for _ in range(count) for line in next(stream))


def joined_text(raw: str) -> str:
    """A raw file's lines as the usual perplexity measurement joins them: blank ones empty, two newlines between."""
    lines = raw.removesuffix("\n").split("\n")
    return "\n\n".join(f"{line}\n" if line.strip() else "" for line in lines)


def write_corpus(directory: Path, seed: int = 0) -> dict[Path, int]:
    """Writes ``wiki.{train,valid,test}.raw``; returns the size of each in bytes."""
    directory.mkdir(parents=True, exist_ok=True)
    sizes = {}
    for split, count in SPLIT_ARTICLES.items():
        path = directory / f"wiki.{split}.raw"
        text = raw_text(f"file-{split}", count, seed)
        path.write_text(text, encoding="utf-8", newline="\n")
        sizes[path] = len(text.encode())
    return sizes


class Article:
    """One article: facts drawn once, a clock of years, and sentences that use both."""

    def __init__(self, rng: Random) -> None:
        self.rng = rng
        self.kind = rng.choice(KINDS)
        self.topic = TOPICS[rng.choice(tuple(TOPICS))]
        self.year = rng.randint(1700, 1890)
        self.plural = False
        self.facts = self._draw_facts()

    def lines(self) -> list[str]:
        """Heading, lead paragraph and sections, each followed by a blank line."""
        lead = " ".join(self._sentence(template) for template in self.kind.lead)
        made = [f" = {self._fill(self.kind.title)} = ", f" {lead} "]
        for heading, templates in self.kind.sections.items():
            made += [f" = = {heading} = = ", f" {self._paragraph(templates)} "]
            if self.rng.random() < 0.4:
                made.append(f" {self._paragraph(templates)} ")
        return [line for text in made for line in (" ", text)] + [" "]

    def _paragraph(self, templates: Sequence[str]) -> str:
        count = min(self.rng.randint(3, 6), len(templates))
        return " ".join(self._sentence(template) for template in self.rng.sample(templates, count))

    def _sentence(self, template: str) -> str:
        text = self._fill(template)
        return text[0].upper() + text[1:]

    def _fill(self, template: str) -> str:
        return _PART.sub(self._part, template)

    def _part(self, match: re.Match[str]) -> str:
        slot, word_class, singular, plural = match.groups()
        if slot is not None:
            return self._fact(slot)
        return self._word(word_class) if word_class is not None else (plural if self.plural else singular)

    def _fact(self, slot: str) -> str:
        if slot == "year":
            self.year += self.rng.randint(1, 9)
            return str(self.year)
        if slot == "last":
            return str(self.year)
        if slot == "goods":  # a mass noun in some topics: agreement must follow it
            self.plural = self.facts["goods"].endswith("s") and self.facts["goods"] != "grass"
        return self.facts[slot]

    def _word(self, word_class: str) -> str:
        makers: Mapping[str, Callable[[], str]] = {
            "np": self._noun_phrase,
            "np-any": lambda: self._noun_phrase(decides=False),
            "np-there": self._there,
            "adjective": lambda: self._choose("adjectives"),
            "verb": lambda: self._choose("verbs"),
            "month": lambda: self.rng.choice(grammar.MONTHS),
            "day": lambda: str(self.rng.randint(1, 28)),
        }
        return makers[word_class]()

    def _noun_phrase(self, decides: bool = True) -> str:
        plural = self.rng.random() < 0.4
        if decides:
            self.plural = plural
        adjective = f"{self._choose('adjectives')} " if self.rng.random() < 0.5 else ""
        return f"the {adjective}{_numbered(self._choose('nouns'), plural)}"

    def _there(self) -> str:
        count = self.rng.randint(1, 9)
        noun = _numbered(self._choose("nouns"), count > 1)
        return f"are {count} {noun}" if count > 1 else f"is one {noun}"

    def _choose(self, words: str) -> str:
        """Mostly a word of the article's topic, the first ones most often; now and then one of another topic."""
        stray = self.rng.random() < 0.1
        topic: Topic = TOPICS[self.rng.choice(tuple(TOPICS))] if stray else self.topic
        choices: tuple[str, ...] = getattr(topic, words)
        return self.rng.choices(choices, [1 / (rank + 2) for rank in range(len(choices))])[0]

    def _draw_facts(self) -> dict[str, str]:
        rng, topic = self.rng, self.topic
        pronoun = rng.choice(tuple(grammar.FIRST_NAMES))
        last_name = _name(rng, 2)
        noun = self._choose("nouns")
        motto = (self._choose("adjectives"), self._choose("nouns"), "and", self._choose("adjectives"))
        return {
            "name": _name(rng, 1) + rng.choice(grammar.TOWN_ENDINGS),
            "town": _name(rng, 1) + rng.choice(grammar.TOWN_ENDINGS),
            "region": f"{_name(rng, 1)}ia",
            "river": _name(rng, 1),
            "person": f"{rng.choice(grammar.FIRST_NAMES[pronoun])} {last_name}",
            "last-name": last_name,
            "pro": pronoun,
            "pro-start": pronoun.title(),
            "poss": grammar.POSSESSIVES[pronoun],
            "first": _name(rng, 2),
            "second": _name(rng, 2),
            "third": _name(rng, 2),
            "trade": topic.trade,
            "noun": noun,
            "noun-title": noun.title(),
            "goods": rng.choice(topic.goods),
            "motto": " ".join((*motto, rng.choice(topic.goods))),
            "color": rng.choice(grammar.COLORS),
            "material": rng.choice(grammar.MATERIALS),
            "prep": rng.choice(grammar.PREPOSITIONS),
            "direction": rng.choice(grammar.DIRECTIONS),
            "number": str(rng.randint(11, 99)),
            "width": str(rng.randint(11, 99)),
            "age": str(rng.randint(12, 40)),
            "population": f"{rng.randint(1, 9)} @,@ {rng.randint(100, 999)}",
        }


def _name(rng: Random, syllables: int) -> str:
    parts = [rng.choice(grammar.ONSETS) + rng.choice(grammar.NUCLEI) for _ in range(syllables)]
    return ("".join(parts) + rng.choice(grammar.CODAS)).title()


def _numbered(noun: str, plural: bool) -> str:
    if not plural:
        return noun
    if noun.endswith(("s", "sh", "ch")):
        return f"{noun}es"
    return f"{noun[:-1]}ies" if noun.endswith("y") and noun[-2] not in "aeiou" else f"{noun}s"
