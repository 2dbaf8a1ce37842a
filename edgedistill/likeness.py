"""How like the teacher's the answers of a sitting are: agreement and gold, on slices of the prompts
too, refusals, what is asserted that the teacher did not, and the worst of them (docs/likeness.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from edgedistill.assertions import WHOLE, told, unsupported
from edgedistill.bench.agreement import bootstrap
from edgedistill.check_specs import Check
from edgedistill.checks import (
    Checker,
    about,
    at_rest,
    forget_thrown,
    make_checker,
    require_usable,
    thrown_by,
)
from edgedistill.checks.text import rouge_l
from edgedistill.errors import EdgedistillError
from edgedistill.fidelity import EvalRow
from edgedistill.progress import Progress, Task
from edgedistill.refusing import refuses
from edgedistill.slices import sliced

RESAMPLES = 2000
READ_CHARS = 2000  # of an answer, when the worst are put in order
Row = dict[str, Any]


class Known(Protocol):
    """What is known of the prompts beside their rows: their tags by ID, and how refusals start."""

    @property
    def tags(self) -> Mapping[str, Sequence[str]]: ...
    @property
    def refusals(self) -> Sequence[str]: ...


@dataclass(frozen=True)
class Given:
    """The answer to one prompt; `finish_reason` and `more` (kept in the row) where a server gave
    it."""

    row: EvalRow
    text: str
    finish_reason: str = ""
    more: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class _Unjudged:
    """Why there are no verdicts: at all, or on single answers, by prompt ID; errors on the
    teacher's own answers are not the model's."""

    stopped: str | None = None
    threw: dict[str, str] = field(default_factory=dict)
    teacher_threw: dict[str, str] = field(default_factory=dict)


def ready_checker(check: Check | None) -> Checker | None:
    """The checker, before anything is measured that is for it; at rest, as the measuring needs.

    Raises:
        as make_checker and require_usable.
    """
    if check is None:
        return None
    checker = make_checker(check)
    try:
        require_usable(checker)
    finally:
        at_rest(checker)
    return checker


def likeness_of(
    known: Known,
    check: Check | None,
    checker: Checker | None,
    given: Sequence[Given],
    refused: Sequence[Given],
    unlike: int,
    seed: int,
    progress: Progress,
) -> dict[str, Any]:
    """What a result holds of answers: of each prompt the texts, and whether the check takes the
    answer for the teacher's (`same`) and for the prompt's reference (`gold`), it `refuses`, or
    `drifts`. `refused`: answers to prompts that the teacher refuses. `unlike`: how many answers
    were not the same each time.

    A judge that cannot be asked any more is no end of it: `stopped` says why, and there are no
    verdicts then.
    """
    whole = None if check is None else WHOLE.get(check.kind)
    with progress.task("comparing answers", len(given), "answers") as task:
        rows, lacking = _rows(known, checker, given, task)
    if whole is None:
        for row, one in zip(rows, given, strict=True):
            row.update(_drift(one))
    refused_rows = [_refused(known, one) for one in refused]
    return {
        "rows": rows,
        "agreement": _share(rows, "same", seed),
        "gold": _share(rows, "gold", seed),
        "teacher_gold": _share(rows, "teacher_gold", seed),
        "threw": lacking.threw,
        "teacher_threw": lacking.teacher_threw,
        "unlike": unlike,
        "stopped": lacking.stopped,
        "slices": sliced(rows, seed),
        "worst": worst(rows),
        "refusals": _share(rows, "refuses", seed),
        "refused": refused_rows,
        "regressions": _share(refused_rows, "answers", seed),
        "drift": _share(rows, "drifts", seed),
        "drift_per_answer": _per_answer(rows, "asserts", "drifts"),
        "drift_floor": _floor(rows, seed),
        "drift_left_out": whole,
    }


def _rows(
    known: Known, checker: Checker | None, given: Sequence[Given], task: Task
) -> tuple[list[Row], _Unjudged]:
    rows, lacking = [_texts(known, one) for one in given], _Unjudged()
    if checker is None:
        return rows, lacking
    verdicts = list[Row]()
    try:
        for row, one in zip(rows, given, strict=True):
            verdicts.append(_verdicts(checker, row, one.row, lacking))
            task.advance()
    except EdgedistillError as error:  # a local judge that does not come back is one, too
        return rows, _Unjudged(stopped=error.what.splitlines()[0])  # a server's log may be behind
    finally:
        at_rest(checker)
    for row, found in zip(rows, verdicts, strict=True):
        row.update(found)
    return rows, lacking


def _texts(known: Known, one: Given) -> Row:
    """What is needed to read and judge an answer months later."""
    row, answer = one.row, one.text.strip()
    found: Row = {"id": row.id, "answer": answer, "prompt": row.prompt}
    if row.history:
        found["history"] = [dict(message) for message in row.history]
    if row.answer:
        found["teacher"] = row.answer
    if row.reference is not None:
        found["reference"] = row.reference
    if tags := known.tags.get(row.id):
        found["tags"] = list(tags)
    return {**found, "refuses": refuses(answer, known.refusals, one.finish_reason), **one.more}


def _verdicts(checker: Checker, found: Row, row: EvalRow, lacking: _Unjudged) -> Row:
    check, teacher = about(checker, row.prompt, row.history), row.answer or None
    flags: Row = {}
    for flag, answer, other, threw in (
        ("same", found["answer"], teacher, lacking.threw),
        ("gold", found["answer"], row.reference, lacking.threw),
        ("teacher_gold", teacher, row.reference, lacking.teacher_threw),
    ):
        if answer is None or other is None:
            continue
        forget_thrown(checker)  # it keeps that by text, of all models and of the teacher alike
        flags[flag] = check.same(answer, other)
        for why in thrown_by(checker).values():
            threw.setdefault(row.id, why)
    return flags


def _refused(known: Known, one: Given) -> Row:
    """An answer to a prompt that the teacher refuses."""
    found = _texts(known, one)
    refuses = found.pop("refuses")  # a figure of the prompts that the teacher answers
    return {**found, "answers": bool(found["answer"]) and not refuses}


def _drift(one: Given) -> Row:
    """What an answer asserts that neither the prompt nor the teacher's answer does, and of the
    teacher's what the reference does not, either."""
    row = one.row
    if not row.answer:
        return {}
    asked = [row.prompt, *(message["content"] for message in row.history)]
    found = list(told(unsupported(one.text, [*asked, row.answer])))
    kept: Row = {"drifts": bool(found), **({"asserts": found} if found else {})}
    if row.reference is not None:
        floor = list(told(unsupported(row.answer, [*asked, row.reference])))
        kept |= {"teacher_drifts": bool(floor), **({"teacher_asserts": floor} if floor else {})}
    return kept


def _floor(rows: Sequence[Row], seed: int) -> dict[str, Any] | None:
    """The same measure of the teacher's answers against the references."""
    share = _share(rows, "teacher_drifts", seed)
    if share is None:
        return None
    return {**share, "per_answer": _per_answer(rows, "teacher_asserts", "teacher_drifts")}


def _per_answer(rows: Sequence[Row], listed: str, flag: str) -> float | None:
    counts = [len(row.get(listed, ())) for row in rows if flag in row]
    return sum(counts) / len(counts) if counts else None


def worst(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """IDs of the answers that are not the teacher's (or, where none is known, not the reference),
    the worst first: those that are wrong by gold before others, then by the words they share with
    it (ROUGE-L), the fewest first."""
    flag, other = ("same", "teacher") if any("same" in r for r in rows) else ("gold", "reference")
    wrong = [row for row in rows if row.get(flag) is False]
    ranked = sorted(
        wrong,
        key=lambda row: (
            row.get("gold") is not False,
            rouge_l(row["answer"][:READ_CHARS], str(row.get(other, ""))[:READ_CHARS]),
            row["id"],
        ),
    )
    return [row["id"] for row in ranked]


def _share(rows: Sequence[Mapping[str, Any]], flag: str, seed: int) -> dict[str, Any] | None:
    flags = [row[flag] for row in rows if flag in row]
    return asdict(bootstrap(flags, RESAMPLES, seed)) if flags else None


def notes_of(likeness: Mapping[str, Any] | None) -> list[str]:
    """What a reader of the result should know of how its answers were judged."""
    if likeness is None:
        return []
    notes = []
    if likeness["stopped"]:
        notes.append(f"the check ended midway, so there is no verdict: {likeness['stopped']}")
    for name, whose, counted in (
        ("threw", "answers", "not the same"),
        ("teacher_threw", "of the teacher's answers against their references", "wrong"),
    ):
        for prompt, why in [*likeness[name].items()][:1]:
            row = next(row for row in likeness["rows"] if row["id"] == prompt)
            text = row["answer" if name == "threw" else "teacher"]
            notes.append(
                f"the check gave no verdict on {len(likeness[name])} {whose}, which count as "
                f"{counted}; the first, {text[:60]!r}: {why}"
            )
    return notes
