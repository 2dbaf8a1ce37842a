"""Make prompts.jsonl: each phrasing in phrasings.txt filled two or three times, with its gold SQL.

A fill is kept when its gold query finds something in tickets.db and its answer does not hang on
the order in which rows are stored.

Usage: python recipes/support-sql/make_prompts.py [out]
"""

import json
import random
import re
import sqlite3
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
SEED = 7
SHORT = 60  # characters; phrasings up to here are filled three times, longer ones twice
MAX_DRAWS = 200

SLOT = re.compile(r"\{([a-z]+)(\d?)\}")
MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September",
    "October", "November", "December",
)  # fmt: skip
FEW = ("two", "three", "four", "five", "six", "seven")
PRODUCTS = ("Atlas", "Nimbus", "Pulse", "Ledger", "Vault")
CHANNELS = ("email", "phone", "chat", "web")
PRIORITIES = ("low", "normal", "high", "urgent")
STATUSES = ("new", "active", "waiting", "closed")
AGENTS = ("Ana", "Ben", "Chloe", "Dina", "Emma", "Farid", "Grace", "Hugo")
DIMENSIONS = ("product", "channel", "priority")

Fill = dict[str, tuple[str, str]]
"""Slot name to what the user writes and what the query says."""


@dataclass(frozen=True)
class Phrasing:
    """One hand-written way to ask, and the query that answers it."""

    id: str
    intent: str
    style: str
    prompt: str
    sql: str


def read_phrasings(path: Path = HERE / "phrasings.txt") -> list[Phrasing]:
    phrasings: list[Phrasing] = []
    intent = sql = ""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            intent = line.strip("[]")
        elif line.startswith("> "):
            sql = line[2:]
        elif line and not line.startswith("#"):
            style, prompt = line.split(" | ", 1)
            name = f"p{len(phrasings) + 1:03d}"
            phrasings.append(Phrasing(name, intent, style, prompt, sql))
    return phrasings


def read_customers(database: sqlite3.Connection) -> dict[str, int]:
    """Customers and their tickets: busy customers are also asked about more often."""
    return dict(database.execute("SELECT customer, COUNT(*) FROM tickets GROUP BY 1 ORDER BY 1"))


def same(value: str | int) -> tuple[str, str]:
    return str(value), str(value)


def draw_month(rng: random.Random) -> dict[str, tuple[str, str]]:
    number = rng.randrange(22)
    year, month = 2025 + number // 12, number % 12
    iso = f"{year}-{month + 1:02d}"
    name = MONTHS[month]
    return {"month": (f"{name} {year}", iso), "mon": (f"{name[:3]} {year}", iso), "ym": same(iso)}


def draw_few(rng: random.Random) -> dict[str, tuple[str, str]]:
    number = rng.randrange(2, 8)
    return {"n": same(number), "few": (FEW[number - 2], str(number))}


def draw_fill(rng: random.Random, phrasing: Phrasing, customers: dict[str, int]) -> Fill:
    """One value for each slot; slots that share a name and differ in a digit differ in value."""
    one: dict[str, Callable[[], str | int]] = {
        "product": lambda: rng.choice(PRODUCTS),
        "channel": lambda: rng.choice(CHANNELS),
        "priority": lambda: rng.choice(PRIORITIES),
        "status": lambda: rng.choice(STATUSES),
        "agent": lambda: rng.choice(AGENTS),
        "customer": lambda: rng.choices(list(customers), weights=list(customers.values()))[0],
        "dim": lambda: rng.choice(DIMENSIONS),
        "year": lambda: rng.choice((2025, 2026)),
        "id": lambda: rng.randrange(1001, 6001),
        "stars": lambda: rng.randrange(1, 6),
        "bound": lambda: rng.randrange(2, 5),
    }
    fill: Fill = {**draw_month(rng), **draw_few(rng)}
    for name, digit in sorted(set(SLOT.findall(phrasing.prompt + phrasing.sql))):
        if name in one:
            value = same(one[name]())
            while digit and value == fill.get(name):
                value = same(one[name]())
            fill[name + digit] = value
    return fill


def render(template: str, fill: Fill, side: int) -> str:
    return SLOT.sub(lambda match: fill[match[1] + match[2]][side], template)


def shuffled_copy(database: sqlite3.Connection) -> sqlite3.Connection:
    """The same table stored backwards: an answer that differs there is a tie, not an answer."""
    copy = sqlite3.connect(":memory:")
    schema = database.execute("SELECT sql FROM sqlite_master WHERE name = 'tickets'").fetchone()[0]
    copy.execute(schema.replace("INTEGER PRIMARY KEY", "INTEGER"))
    rows = database.execute("SELECT * FROM tickets ORDER BY id DESC").fetchall()
    copy.executemany(f"INSERT INTO tickets VALUES ({','.join('?' * len(rows[0]))})", rows)
    return copy


def has_answer(sql: str, database: sqlite3.Connection, backwards: sqlite3.Connection) -> bool:
    rows = sorted(database.execute(sql).fetchall(), key=repr)
    empty = all(value in (None, 0) for row in rows for value in row)
    return not empty and rows == sorted(backwards.execute(sql).fetchall(), key=repr)


def normalise(text: str) -> str:
    return re.sub(r"[^a-z0-9]", "", text.lower())


def draw_lines(
    phrasings: list[Phrasing], database: sqlite3.Connection, seed: int
) -> Iterator[tuple[Phrasing, str, str]]:
    customers, backwards = read_customers(database), shuffled_copy(database)
    seen: set[str] = set()
    for phrasing in phrasings:
        # Seeded by its own text: rewording one phrasing leaves the prompts of all others alone.
        rng = random.Random(f"{seed} {phrasing.prompt}")
        wanted, found = 3 if len(phrasing.prompt) <= SHORT else 2, 0
        for _ in range(MAX_DRAWS):
            fill = draw_fill(rng, phrasing, customers)
            prompt, sql = render(phrasing.prompt, fill, 0), render(phrasing.sql, fill, 1)
            prompt = prompt.lower() if phrasing.style == "chat" else prompt
            if normalise(prompt) not in seen and has_answer(sql, database, backwards):
                seen.add(normalise(prompt))
                yield phrasing, prompt, sql
                found += 1
            if found == wanted:
                break


def make_lines(path: Path = HERE / "tickets.db", seed: int = SEED) -> Iterator[dict[str, object]]:
    drawn = list(draw_lines(read_phrasings(), sqlite3.connect(path), seed))
    random.Random(seed).shuffle(drawn)
    for number, (phrasing, prompt, sql) in enumerate(drawn, start=1):
        tags = {"phrasing": phrasing.id, "intent": phrasing.intent, "style": phrasing.style}
        yield {
            "id": f"sql-{number:04d}",
            "prompt": prompt,
            "tags": [f"{name}:{value}" for name, value in tags.items()],
            "reference": sql,
        }


def write_prompts(out: Path) -> None:
    lines = [json.dumps(line) + "\n" for line in make_lines()]
    out.write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    write_prompts(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "prompts.jsonl")
