"""Prompts that nobody wrote, near those that somebody did: what fitting must not unlearn.

A student knows the answers to its training prompts by heart, whatever it is rounded to; fitting on
them alone teaches little, and costs what it knew of other wordings. Its predictions on altered
prompts are compared with the unquantized student's instead: matching a function needs inputs and no
labels (Beyer et al. 2022, "Knowledge distillation: a good teacher is patient and consistent", arXiv
2106.05237). Words are dropped, swapped, replaced and inserted as in Wei and Zou 2019 (EDA, arXiv
1901.11196), from the token mix itself, and letters are swapped, so any language serves.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import replace

from edgedistill.fidelity import EvalRow
from edgedistill.prompting import StudentPrompt
from edgedistill.training.data import TrainingRow, training_rows

RATE = 0.06  # of each of the five alterations, a word
TRIES = 8  # to alter a prompt so that its row is short enough
WORD = re.compile(r"\s*\S+")


def perturbed_rows(
    rows: Sequence[EvalRow],
    shown: StudentPrompt,
    count: int,
    longest: int,
    seed: str,
) -> list[TrainingRow]:
    """`count` of the rows (all, and some again, where that is more) with altered prompts, marked as
    text that no teacher answered. Those that become longer than `longest` tokens are altered anew,
    and left out if they do each time. Decided by the seed alone."""
    chance = random.Random(seed)
    words = sorted({word for row in rows for word in _pieces(row.prompt)})
    waiting = [*rows] * (count // len(rows)) + chance.sample(list(rows), count % len(rows))
    made: list[TrainingRow] = []
    for _ in range(TRIES):
        if not waiting:
            break
        altered = [replace(row, prompt=perturb(row.prompt, words, chance)) for row in waiting]
        tried = list(zip(waiting, training_rows(altered, shown, None), strict=True))
        made += [row for _, row in tried if len(row) <= longest]
        waiting = [row for row, cut in tried if len(cut) > longest]
    return [replace(row, id=f"perturbed-{row.id}", general=True) for row in made]


def perturb(prompt: str, words: Sequence[str], chance: random.Random) -> str:
    """The prompt with about three alterations in ten words; never empty."""
    made: list[str] = []
    for piece in _pieces(prompt):
        kind = int(chance.random() / RATE)
        if kind == 0:  # dropped
            continue
        if kind == 1:
            piece = chance.choice(words)
        elif kind == 2 and made:  # swapped with the one before it
            made.insert(len(made) - 1, piece)
            continue
        elif kind == 3:
            piece = _with_swapped_letters(piece, chance)
        elif kind == 4:
            made.append(chance.choice(words))
        made.append(piece)
    return "".join(made) or prompt


def _pieces(prompt: str) -> list[str]:
    """Words with the white space before them; characters, where nothing separates words."""
    found = WORD.findall(prompt)
    return found if len(found) > 1 else list(prompt)


def _with_swapped_letters(piece: str, chance: random.Random) -> str:
    if len(piece) < 4:
        return piece
    at = chance.randrange(1, len(piece) - 1)
    return piece[:at] + piece[at + 1] + piece[at] + piece[at + 2 :]
