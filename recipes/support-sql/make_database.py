"""Make tickets.db: one seeded, skewed table of support tickets.

Usage: python recipes/support-sql/make_database.py [out]
"""

import math
import random
import sqlite3
import sys
from collections.abc import Mapping
from datetime import date, timedelta
from pathlib import Path

SEED = 20266
TICKETS = 5000
FIRST_ID = 1001
FIRST_DAY = date(2025, 1, 1)
LAST_DAY = date(2026, 10, 31)

CUSTOMERS = (
    "Acme", "Borealis", "Cobalt", "Dorado", "Ember", "Fjord", "Granite", "Harbor", "Iris",
    "Juniper", "Kestrel", "Lumen", "Meridian", "Nectar", "Orchid", "Pioneer", "Quartz", "Ridge",
    "Sable", "Tundra", "Umber", "Vertex", "Willow", "Xenon", "Yarrow", "Zephyr", "Alder", "Basalt",
    "Cedar", "Delta",
)  # fmt: skip
PRODUCTS = {"Atlas": 32, "Nimbus": 25, "Pulse": 19, "Ledger": 14, "Vault": 10}
CHANNELS = {"email": 38, "chat": 27, "phone": 21, "web": 14}
PRIORITIES = {"normal": 41, "low": 26, "high": 21, "urgent": 12}
AGENTS = ("Ana", "Ben", "Chloe", "Dina", "Emma", "Farid", "Grace", "Hugo")

MEAN_RATING = {"Atlas": 3.9, "Nimbus": 3.4, "Pulse": 4.2, "Ledger": 2.8, "Vault": 3.1}
MEDIAN_MINUTES = {"low": 18, "normal": 30, "high": 52, "urgent": 85}
PRODUCT_PACE = {"Atlas": 1.0, "Nimbus": 1.3, "Pulse": 0.7, "Ledger": 1.9, "Vault": 1.5}
RATING_BONUS = {"email": -0.4, "chat": 0.5, "phone": 0.2, "web": -0.2}
CHANNEL_PACE = {"email": 1.0, "chat": 0.8, "phone": 1.3, "web": 0.9}
CLOSE_DAYS = {"low": 9, "normal": 6, "high": 4, "urgent": 2}
UNIQUE_MINUTES_FROM = 150

# Names compare without case, as a help desk's search does: "atlas" finds 'Atlas'.
SCHEMA = """CREATE TABLE tickets (
  id INTEGER PRIMARY KEY,
  created TEXT NOT NULL,
  closed TEXT,
  customer TEXT NOT NULL COLLATE NOCASE,
  product TEXT NOT NULL COLLATE NOCASE,
  channel TEXT NOT NULL COLLATE NOCASE,
  priority TEXT NOT NULL COLLATE NOCASE,
  status TEXT NOT NULL COLLATE NOCASE,
  agent TEXT COLLATE NOCASE,
  rating INTEGER,
  minutes INTEGER NOT NULL
)"""

Row = tuple[int, str, str | None, str, str, str, str, str, str | None, int | None, int]


def pick(rng: random.Random, weights: Mapping[str, float]) -> str:
    return rng.choices(list(weights), weights=list(weights.values()))[0]


def ticket_days(rng: random.Random) -> list[tuple[date, str]]:
    """(created, customer) by date, at most one a day for a customer, so that "latest" is clear."""
    weights = [1 / (rank + 4) for rank in range(len(CUSTOMERS))]
    span = (LAST_DAY - FIRST_DAY).days + 1
    # Later days are likelier: the desk grows, and no two months are equally busy.
    growth = [1 + 1.4 * day / span + 0.5 * math.sin(day / 23) for day in range(span)]
    days: set[tuple[date, str]] = set()
    while len(days) < TICKETS:
        day = rng.choices(range(span), weights=growth)[0]
        customer = rng.choices(CUSTOMERS, weights=weights)[0]
        days.add((FIRST_DAY + timedelta(days=day), customer))
    return sorted(days)


def product_mix(rng: random.Random) -> dict[str, dict[str, float]]:
    """Each customer uses three or four products, so "how many customers" is rarely all of them."""
    mix = {}
    for customer in CUSTOMERS:
        unused = set(rng.sample(list(PRODUCTS), rng.choice((1, 2))))
        used = {name: weight for name, weight in PRODUCTS.items() if name not in unused}
        mix[customer] = {name: weight * rng.uniform(0.4, 2.2) for name, weight in used.items()}
    return mix


def agent_mix(rng: random.Random) -> dict[str, dict[str, float]]:
    return {product: {agent: rng.uniform(1, 4) ** 2 for agent in AGENTS} for product in PRODUCTS}


def draw_minutes(rng: random.Random, median: float, used: set[int]) -> int:
    """Worked minutes; long ones are all different, so that "the longest" has one answer."""
    while True:
        minutes = max(2, round(rng.lognormvariate(math.log(median), 0.8)))
        if minutes < UNIQUE_MINUTES_FROM:
            return minutes
        if minutes not in used:
            used.add(minutes)
            return minutes


def draw_closed(rng: random.Random, created: date, priority: str) -> date | None:
    closed = created + timedelta(days=int(rng.expovariate(1 / CLOSE_DAYS[priority])))
    forgotten = rng.random() < 0.2
    return None if forgotten or closed > LAST_DAY else closed


def draw_status(rng: random.Random, closed: date | None) -> str:
    return "closed" if closed else pick(rng, {"active": 42, "waiting": 31, "new": 27})


def draw_agent(rng: random.Random, status: str, weights: Mapping[str, float]) -> str | None:
    free = {"new": 0.95, "active": 0.2, "waiting": 0.35, "closed": 0.0}[status]
    return None if rng.random() < free else pick(rng, weights)


def draw_rating(rng: random.Random, product: str, channel: str, agent: str | None) -> int | None:
    if agent is None or rng.random() < 0.3:
        return None
    skill = 0.15 * (AGENTS.index(agent) * 5 % len(AGENTS)) - 0.5
    mean = MEAN_RATING[product] + RATING_BONUS[channel] + skill
    return min(5, max(1, round(rng.gauss(mean, 1.2))))


def make_rows(seed: int = SEED) -> list[Row]:
    rng = random.Random(seed)
    products, agents = product_mix(rng), agent_mix(rng)
    used_minutes: set[int] = set()
    rows: list[Row] = []
    for number, (created, customer) in enumerate(ticket_days(rng), start=FIRST_ID):
        product, channel = pick(rng, products[customer]), pick(rng, CHANNELS)
        priority = pick(rng, PRIORITIES)
        closed = draw_closed(rng, created, priority)
        status = draw_status(rng, closed)
        agent = draw_agent(rng, status, agents[product])
        rating = draw_rating(rng, product, channel, agent) if closed else None
        pace = PRODUCT_PACE[product] * CHANNEL_PACE[channel]
        minutes = draw_minutes(rng, MEDIAN_MINUTES[priority] * pace, used_minutes)
        rows.append((
            number, created.isoformat(), closed.isoformat() if closed else None, customer, product,
            channel, priority, status, agent, rating, minutes,
        ))  # fmt: skip
    return rows


def write_database(out: Path, seed: int = SEED) -> None:
    out.unlink(missing_ok=True)
    database = sqlite3.connect(out)
    with database:
        database.execute(SCHEMA)
        database.executemany(f"INSERT INTO tickets VALUES ({','.join('?' * 11)})", make_rows(seed))
    database.execute("VACUUM")
    database.close()


if __name__ == "__main__":
    write_database(
        Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("tickets.db")
    )
