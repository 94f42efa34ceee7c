"""Recipe options: each module declares those that its steps read, a method lists them, and a recipe is checked."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mqbench.harness.errors import RequestError, UnknownNameError

if TYPE_CHECKING:
    from mqbench.harness.quant.scheme import Recipe

KIND_NAMES: Mapping[type, str] = {bool: "true or false", int: "a whole number", float: "a number", str: "a word"}


@dataclass(frozen=True)
class Option:
    """One key of ``Recipe.options``.

    Attributes:
        name: The key.
        default: What holds when a recipe does not say; None for an option that does not take None means that other
            options decide, as ``help`` says.
        choices: The values it takes; None: any of ``kind``.
        kind: bool, int, float (whole numbers too) or str. Unused where there are choices.
        help: One line for ``mqbench methods --options``.
        minimum: Smallest number, included.
        maximum: Largest number, included.
    """

    name: str
    default: Any
    choices: tuple[Any, ...] | None = None
    kind: type = str
    help: str = ""
    minimum: float | None = None
    maximum: float | None = None

    @property
    def has_default(self) -> bool:
        """Whether ``default`` is a value of its own, not a stand-in for "other options decide"."""
        return self.accepts(self.default)

    @property
    def default_text(self) -> str:
        """The default, for people; ``-`` where other options decide."""
        return _text(self.default) if self.has_default else "-"

    @property
    def values(self) -> str:
        """The values it takes, for people."""
        if self.choices is not None:
            return " | ".join(map(_text, self.choices))
        low = "" if self.minimum is None else f" from {self.minimum:g}"
        high = "" if self.maximum is None else f" up to {self.maximum:g}"
        return f"{KIND_NAMES[self.kind]}{low}{high}"

    def accepts(self, value: Any) -> bool:
        """Whether a recipe may hold this value."""
        if self.choices is not None:
            return any(value == choice and _is_bool(value) == _is_bool(choice) for choice in self.choices)
        if self.kind not in (int, float):
            return isinstance(value, self.kind)
        if _is_bool(value) or not isinstance(value, (int, self.kind)) or not math.isfinite(value):
            return False
        return (self.minimum is None or value >= self.minimum) and (self.maximum is None or value <= self.maximum)

    def check(self, value: Any) -> None:
        """Refuses a value that the option does not take.

        Raises:
            UnknownNameError: it is none of the choices.
            RequestError: it is of the wrong kind, or out of range.
        """
        if self.accepts(value):
            return
        if self.choices is not None:
            raise UnknownNameError(self.name, _text(value), map(_text, self.choices))
        raise RequestError(f"option '{self.name}' takes {self.values}, not {_text(value)}")


def check_options(method: object, recipe: Recipe) -> None:
    """Refuses a recipe whose options the method does not have.

    Args:
        method: A ``Quantizer``. Without an attribute ``options`` (a foreign plug-in) it accepts anything.
        recipe: Its ``options`` are checked.

    Raises:
        UnknownNameError: an option is unknown to the method, or its value is none of the choices.
        RequestError: a value is of the wrong kind, or out of range.
    """
    options: tuple[Option, ...] | None = getattr(method, "options", None)
    if options is None:
        return
    known = {option.name: option for option in options}
    for name, value in recipe.options.items():
        if name not in known:
            no_options = None if known else "this method has no options; leave it out"
            raise UnknownNameError(f"option of method '{recipe.method}':", name, known, no_options)
        known[name].check(value)


def merge_options(*groups: tuple[Option, ...]) -> tuple[Option, ...]:
    """The options of several steps as one list; of two declarations with one name the first counts."""
    merged: dict[str, Option] = {}
    for option in (option for group in groups for option in group):
        merged.setdefault(option.name, option)
    return tuple(merged.values())


def declared_defaults(options: tuple[Option, ...]) -> dict[str, Any]:
    """The defaults of a method by option name; options without one of their own are left out."""
    return {option.name: option.default for option in options if option.has_default}


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)
