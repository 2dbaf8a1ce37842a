"""What an answer asserts that can be told without a model: numbers, dates, quoted words, addresses,
code identifiers and names. An answer that asserts what neither the prompt nor the teacher's answer
says has drifted from them (docs/likeness.md says what this cannot see).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial

KINDS = ("address", "date", "code", "quote", "number", "name")  # in the order they are looked for
# A check that compares such an answer whole leaves nothing to be asserted beside it.
WHOLE = {
    "label": "a label is one of a few words",
    "sql-execution": "a query asserts nothing by itself",
    "number": "the check compares the number itself",
}
_MONTHS = (
    "january", "february", "march", "april", "may", "june", "july", "august", "september",
    "october", "november", "december",
)  # fmt: skip
_MONTH = rf"(?:{'|'.join(f'{m[:3]}(?:{m[3:]})?' if m[3:] else m for m in _MONTHS)})\.?"
_UNITS = {  # spellings of one unit
    "%": ("percent", "per cent", "pct"), "$": ("usd", "dollar", "dollars"),
    "€": ("eur", "euro", "euros"), "£": ("gbp", "pound", "pounds"),
    "ms": ("millisecond", "milliseconds"), "s": ("sec", "secs", "second", "seconds"),
    "min": ("mins", "minute", "minutes"), "h": ("hr", "hrs", "hour", "hours"),
    "d": ("day", "days"), "week": ("weeks",), "month": ("months",), "year": ("years",),
    "b": ("byte", "bytes"), "kb": ("kilobyte", "kilobytes"), "mb": ("megabyte", "megabytes"),
    "gb": ("gigabyte", "gigabytes"), "tb": ("terabyte", "terabytes"),
    "g": ("gram", "grams"), "kg": ("kilogram", "kilograms"), "m": ("metre", "metres", "meters"),
    "km": ("kilometre", "kilometres", "kilometers"), "cm": (), "mm": (), "l": ("litre", "litres"),
    "°c": (), "°f": (), "thousand": (), "million": ("mio",), "billion": (),
}  # fmt: skip
_UNIT = {spelt: unit for unit, others in _UNITS.items() for spelt in (unit, *others)}
_BEFORE = "$€£"
_UNIT_PATTERN = "|".join(re.escape(u) for u in sorted(_UNIT, key=len, reverse=True))
# Each begins where a run of its characters does, or is bounded: time must not grow with the square
# of a text that somebody else wrote.
_FOUND = {
    "address": re.compile(
        r"https?://[^\s<>\"')\]]+|www\.[^\s<>\"')\]]+|"
        r"(?<![\w.+-])[\w.+-]{1,64}@[\w-]{1,63}\.[\w.-]{1,190}\w"
    ),
    "date": re.compile(
        rf"\b(?P<y>\d{{4}})[-/](?P<m>\d{{1,2}})(?:[-/](?P<d>\d{{1,2}}))?\b"
        rf"|\b(?P<d2>\d{{1,2}})(?:st|nd|rd|th)?\s+(?:of\s+)?(?P<m2>{_MONTH})(?:,?\s+(?P<y2>\d{{4}}))?\b"
        rf"|\b(?P<m3>{_MONTH})\s+(?P<d3>\d{{1,2}})(?:st|nd|rd|th)?\b(?:,?\s+(?P<y3>\d{{4}}))?"
        r"|\b\d{1,2}[/.]\d{1,2}[/.]\d{2,4}\b",
        re.IGNORECASE,
    ),
    "code": re.compile(
        r"`[^`\n]+`|\b(?<!\w\.)\w+(?:\.\w+)*\(\)|\b[A-Za-z]\w*_\w+\b|\b[a-z]+[A-Z]\w*\b"
        r"|\b[A-Z][a-z]+[A-Z]\w*\b|\b[A-Za-z_]\w+(?:\.[A-Za-z_]\w+)+\b"
    ),
    "quote": re.compile(
        r"\"[^\"\n]{2,100}\"|\u201c[^\u201d\n]{2,100}\u201d|\u00ab[^\u00bb\n]{2,100}\u00bb"
        r"|(?<!\w)'[^'\n]{2,100}'(?!\w)"
    ),
    "number": re.compile(
        rf"(?P<before>[{_BEFORE}])?(?<![\w.])(?P<value>[-+]?(?:\d{{1,3}}(?:,\d{{3}}){{1,9}}|\d+)(?:\.\d+)?)"
        rf"\s?(?P<unit>{_UNIT_PATTERN})?(?![\w])",
        re.IGNORECASE,
    ),
    # Not what begins a sentence or a line, which is written large whatever it is.
    "name": re.compile(r"(?<=[\w,;:)] )(?:[A-Z]\w+|[A-Z]{2,})(?:[ -][A-Z]\w+)*"),
}  # fmt: skip
_LIST_NUMBER = re.compile(r"^[ \t]*\(?\d{1,3}[.)](?=\s)", re.MULTILINE)
_WORD = re.compile(r"\w+")
_CODE_NAMES = frozenset({"e.g", "i.e", "a.m", "p.m"})


@dataclass(frozen=True)
class Assertion:
    """`kind` is one of KINDS; `text` as the answer has it; `value`, by which two are the same."""

    kind: str
    text: str
    value: str


def assertions(text: str) -> list[Assertion]:
    """What a text asserts, each place counted as one kind, in the order of KINDS."""
    rest, found = _LIST_NUMBER.sub(lambda m: " " * len(m[0]), text), list[Assertion]()
    for kind in KINDS:
        rest = _FOUND[kind].sub(partial(_taken, kind, found), rest)
    return list(dict.fromkeys(found))


def _taken(kind: str, found: list[Assertion], match: re.Match[str]) -> str:
    """Adds what is asserted there, and gives what then stands there for the next kinds."""
    said = match[0].strip(" .,;:")
    if not said or said.casefold() in _CODE_NAMES:
        return match[0]
    found.append(Assertion(kind, said, _value(kind, match)))
    blank = "x" if kind == "quote" else " "  # a word after a quotation begins no sentence
    return blank * len(match[0])


def unsupported(answer: str, known: Iterable[str]) -> list[Assertion]:
    """What an answer asserts that none of the `known` texts does: the prompt with what was said
    before it, and the teacher's answer."""
    texts = list(known)
    said = [each for text in texts for each in assertions(text)]
    values = {each.value for each in said}
    # A number that one side gives without its unit is the same where the numbers are.
    numbers = [_number(each) for each in said if each.kind == "number"]
    unitless = {number for number, unit in numbers if not unit}
    any_unit = {number for number, _ in numbers}
    folded = " ".join(" ".join(text.casefold().split()) for text in texts)
    words = set(_WORD.findall(folded))

    def is_known(one: Assertion) -> bool:
        if one.value in values:
            return True
        if one.kind == "number":
            number, unit = _number(one)
            return number in (unitless if unit else any_unit)
        return _is_said(one, folded, words)

    return [each for each in assertions(answer) if not is_known(each)]


def _number(one: Assertion) -> tuple[str, str]:
    """Its value and its unit, "" for none."""
    number, _, unit = one.value.removeprefix("number ").partition(" ")
    return number, unit


def _is_said(one: Assertion, folded: str, words: set[str]) -> bool:
    """Whether the known texts hold it in plain words; a date is the same by its value alone."""
    if one.kind == "date":
        return False
    if one.kind == "name":
        return all(word in words for word in _WORD.findall(one.text.casefold()))
    return _bare(one.text) in folded


def _value(kind: str, match: re.Match[str]) -> str:
    if kind == "date":
        return f"date {_date(match)}"
    if kind == "number":
        unit = match["before"] or _UNIT.get((match["unit"] or "").casefold(), "")
        return f"number {_plain(match['value'])} {unit}".strip()
    return f"{kind} {_bare(match[0])}"


def _plain(number: str) -> str:
    """Every digit of it, since numbers are also orders, telephones and amounts: without commas, +,
    and zeros behind the last place. Those in front stay."""
    digits = number.lstrip("+-").replace(",", "")
    if "." in digits:
        digits = digits.rstrip("0").rstrip(".")
    return f"-{digits}" if number.startswith("-") and digits.strip("0.") else digits


def _date(match: re.Match[str]) -> str:
    """As ISO 8601, as far as it is told; 3/4/2026 is either of two days, and stays as it is."""
    named = {name: value for name, value in match.groupdict().items() if value is not None}
    parts = {name[0]: value for name, value in named.items()}
    if not parts:
        return match[0]
    month = parts["m"]
    if not month.isdigit():
        month = str(next(i for i, m in enumerate(_MONTHS, 1) if m[:3] == month[:3].casefold()))
    day = f"-{int(parts['d']):02d}" if "d" in parts else ""
    return f"{parts.get('y', '')}-{int(month):02d}{day}"


def _bare(text: str) -> str:
    """Without what quotes it, in lower case, white space once."""
    return " ".join(text.strip("`\"'\u201c\u201d\u00ab\u00bb .,;:").casefold().split())


def told(found: Iterable[Assertion]) -> Iterator[dict[str, str]]:
    """As a result has them."""
    for each in found:
        yield {"kind": each.kind, "text": each.text}
