"""What the synthetic encyclopedia is written with: words and sentence templates, as data.

A template's ``{slot}`` is a fact of its article, the same wherever the article names it; ``<class>`` draws a word anew;
``<np>`` draws a noun phrase and sets the number that ``[singular|plural]`` behind it follows; ``{year}`` moves the
article's clock on, ``{last}`` reads it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

ONSETS = ("b", "br", "d", "dr", "f", "g", "h", "k", "l", "m", "n", "p", "r", "s", "st", "t", "th", "v")
NUCLEI = ("a", "e", "i", "o", "u", "ai", "ea", "or")
CODAS = ("l", "n", "r", "s", "nd", "ck", "m", "th")
TOWN_ENDINGS = ("ton", "ford", "wick", "ham", "burg", "mouth")
FIRST_NAMES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "he": ("Adam", "Henry", "Karl", "Oscar", "Peter", "Simon", "Thomas", "Victor"),
        "she": ("Anna", "Clara", "Edith", "Helen", "Julia", "Maria", "Ruth", "Sofia"),
    }
)
POSSESSIVES: Mapping[str, str] = MappingProxyType({"he": "his", "she": "her"})


@dataclass(frozen=True)
class Topic:
    """Words that come together; an article draws most of its words from one topic, the likelier the earlier."""

    nouns: tuple[str, ...]
    adjectives: tuple[str, ...]
    verbs: tuple[str, ...]
    goods: tuple[str, ...]
    trade: str


TOPICS: Mapping[str, Topic] = MappingProxyType(
    {
        "river": Topic(
            ("boat", "bridge", "bank", "ferry", "mill", "lock", "flood", "island"),
            ("wide", "slow", "deep", "muddy", "green", "shallow"),
            ("crossed", "carried", "flooded", "followed", "drained", "widened"),
            ("fish", "timber", "reeds", "gravel"),
            "boatman",
        ),
        "war": Topic(
            ("soldier", "gun", "wall", "captain", "siege", "flag", "tower", "guard"),
            ("heavy", "armed", "royal", "brave", "ruined", "loyal"),
            ("attacked", "defended", "captured", "burned", "surrounded", "lost"),
            ("powder", "iron", "horses", "silver"),
            "soldier",
        ),
        "music": Topic(
            ("song", "choir", "concert", "album", "drum", "singer", "melody", "stage"),
            ("quiet", "loud", "famous", "sweet", "modern", "popular"),
            ("played", "recorded", "praised", "performed", "wrote", "released"),
            ("records", "tickets", "strings", "bells"),
            "singer",
        ),
        "farm": Topic(
            ("field", "farmer", "barn", "cow", "harvest", "orchard", "fence", "market"),
            ("rich", "dry", "golden", "fresh", "large", "poor"),
            ("planted", "sold", "ploughed", "gathered", "fed", "owned"),
            ("wheat", "apples", "wool", "milk"),
            "farmer",
        ),
        "rail": Topic(
            ("train", "station", "engine", "line", "tunnel", "signal", "driver", "platform"),
            ("fast", "electric", "local", "crowded", "narrow", "late"),
            ("opened", "served", "joined", "replaced", "repaired", "passed"),
            ("coal", "steel", "mail", "cement"),
            "engineer",
        ),
        "school": Topic(
            ("student", "teacher", "book", "library", "class", "lesson", "garden", "prize"),
            ("young", "careful", "clever", "public", "private", "early"),
            ("taught", "visited", "studied", "founded", "read", "printed"),
            ("paper", "maps", "ink", "desks"),
            "teacher",
        ),
        "sea": Topic(
            ("ship", "sailor", "harbour", "storm", "lighthouse", "anchor", "wave", "crew"),
            ("cold", "wooden", "grey", "foreign", "strong", "lonely"),
            ("sailed", "sank", "reached", "rescued", "loaded", "watched"),
            ("salt", "rope", "whale oil", "tea"),
            "sailor",
        ),
        "bird": Topic(
            ("bird", "nest", "egg", "forest", "feather", "branch", "owl", "flock"),
            ("small", "brown", "rare", "white", "wild", "bright"),
            ("built", "hunted", "guarded", "found", "counted", "left"),
            ("seeds", "berries", "insects", "grass"),
            "hunter",
        ),
    }
)
PREPOSITIONS = ("near", "behind", "beside", "above", "below")
DIRECTIONS = ("north", "south", "east", "west")
MONTHS = ("January", "March", "May", "June", "August", "October", "December")
COLORS = ("red", "blue", "black", "yellow", "white", "purple")
MATERIALS = ("stone", "brick", "oak", "iron", "clay")


@dataclass(frozen=True)
class Kind:
    """A kind of article: its heading, first sentences in order, and sections of sentences in any order."""

    title: str
    lead: tuple[str, ...]
    sections: Mapping[str, tuple[str, ...]]


_HISTORY = (
    "In {year} <np> [was|were] <verb> by {person} .",
    "By {year} <np> of {name} [was|were] no longer <adjective> .",
    "{person} returned to {name} in {year} , where {pro} <verb> <np> .",
    "In <month> {year} , {first} , {second} and {third} met in {town} .",
    "{first} , {second} and {third} left {town} in {year} .",
    "After {last} , the people of {region} <verb> <np> and sold {goods} .",
    'The words " {motto} " were written {prep} the {noun} in {year} .',
)
_GENERAL = (
    "<np> of {region} [is|are] <adjective> .",
    "<np> {prep} <np-any> [has|have] been <adjective> since {last} .",
    "Most of the {goods} in {region} [comes|come] from {town} .",
    "There <np-there> {prep} the {noun} .",
    'When the {noun} was <verb> , {person} said : " {motto} " .',
    "{person} and {poss} family lived in {town} .",
    "{last-name} was known for {poss} <adjective> {noun}s .",
    "It is {number} kilometres {direction} of {town} and {width} kilometres from {region} .",
)

KINDS: tuple[Kind, ...] = (
    Kind(
        "{name}",
        (
            "{name} is a <adjective> town in {region} , {number} kilometres {direction} of {town} .",
            "It was founded in {year} by {person} , a {trade} from {town} .",
            "In {year} the town of {name} had {population} people .",
        ),
        {
            "History": _HISTORY,
            "Geography": (
                "{name} lies on the {direction} side of the {river} River .",
                "The {river} River flows past {name} and {town} .",
                "The houses of {name} are built of {color} {material} .",
                *_GENERAL,
            ),
            "Economy": (
                "The town sells {goods} and {material} to {town} .",
                "With {population} people , {name} is the largest town in {region} .",
                *_GENERAL,
            ),
        },
    ),
    Kind(
        "{person}",
        (
            "{person} ( born <day> <month> {year} in {name} ) was a {trade} from {region} .",
            '{pro-start} is best known for {poss} {noun} " {motto} " .',
            "At the age of {age} , {pro} moved to {town} .",
        ),
        {
            "Early life": (
                "{last-name} was born in {name} , a <adjective> town in {region} .",
                "{pro-start} was the child of a {trade} .",
                "In {year} {pro} met {first} and {second} in {town} .",
                *_HISTORY,
            ),
            "Career": (
                "{last-name} <verb> <np> in {year} .",
                "{pro-start} <verb> the {noun} of {name} until {year} .",
                'The {noun} " {motto} " made {last-name} famous in {region} .',
                *_GENERAL,
            ),
        },
    ),
    Kind(
        "{name} {noun-title}",
        (
            "The {name} {noun-title} is a <adjective> {noun} in {town} , {region} .",
            "It was made of {color} {material} in {year} by {person} .",
            "The {noun} is {number} metres long and {width} metres wide .",
        ),
        {
            "Construction": (
                "The {noun} was <verb> in {year} , at a cost of {population} crowns .",
                "{person} used {color} {material} from {region} .",
                "A second {noun} was <verb> {prep} the {river} River in {year} .",
                *_HISTORY,
            ),
            "Today": (
                "In {year} the {name} {noun-title} was <verb> again .",
                "It cost {population} crowns and is painted {color} .",
                *_GENERAL,
            ),
        },
    ),
    Kind(
        "Battle of {name}",
        (
            "The Battle of {name} was fought on <day> <month> {year} {prep} the {river} River .",
            "{person} led {population} men against {second} of {town} .",
            "The {color} army lost {number} men and its <adjective> {noun} .",
        ),
        {
            "Background": (
                "Since {year} , {region} had sold {goods} to {town} .",
                "{second} of {town} wanted the {noun} at {name} .",
                *_HISTORY,
            ),
            "Aftermath": (
                "Of the {population} men of {last-name} , {number} were lost .",
                "The {color} army left {name} in {year} .",
                "A {noun} of {color} {material} stands {prep} the {river} River .",
                *_GENERAL,
            ),
        },
    ),
)
