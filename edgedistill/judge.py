"""judge: have a language model grade the answers in results, compare them in pairs, and say which
state facts that the teacher's do not.

    edgedistill judge a.json b.json --judge https://HOST/v1 --model ID

What it was asked and said is kept in the workspace's trace store, as a teacher's answers are, so
that no verdict is paid for twice, and a run that was ended goes on where it was.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from edgedistill import __version__
from edgedistill.asking import STORE, ask_missing
from edgedistill.bench.agreement import bootstrap
from edgedistill.errors import ArtifactError, CollectError, TeacherError, UsageError
from edgedistill.fidelity import shuffled
from edgedistill.judging import (
    ADDS,
    FIRST,
    GRADE,
    JUDGE,
    PAIR,
    SECOND,
    TIE,
    Judge,
    grade_of,
    question_of,
    unreadable,
    verdict_of,
)
from edgedistill.progress import Progress
from edgedistill.recipe import ApiTeacher, CollectSpec
from edgedistill.result_set import Named as NamedResult
from edgedistill.result_set import require_comparable
from edgedistill.teacher import Call, Named, Trace, TraceStore
from edgedistill.verdicts import RESAMPLES, PairVerdict, of_grades, of_pairs

KIND, VERSION = "edgedistill-judgement", 1
GRADES, PAIRS, DRIFT = "grade", "pairs", "drift"
ASKS = (GRADES, PAIRS, DRIFT)
TEACHER = "the teacher"
ASK = CollectSpec(concurrency=4, attempts=3, max_failed_share=0.2)
SHOWN = 3  # verdicts that cannot be read
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Question:
    """Two answers to one question. `gold` is which of them is better, where that is known."""

    id: str
    question: str
    first: str
    second: str
    gold: str | None = None

    @property
    def is_equal(self) -> bool:
        """Whether both answers are the same text: a tie that nobody is asked about."""
        return self.first.strip() == self.second.strip()


@dataclass
class Desk:
    """Asks a judge, and counts: calls `asked` now, `kept` from before, those that `failed` for good
    and verdicts that were `unread`, each by what was said, and the model IDs that answered."""

    judge: Judge
    root: Path
    spec: CollectSpec = ASK
    max_calls: int | None = None
    retry_failed: bool = False
    named: Named = JUDGE
    asked: int = 0
    kept: int = 0
    failed: list[str] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)
    answered: set[str] = field(default_factory=set)

    def answers(self, calls: Sequence[Call], progress: Progress) -> dict[str, Trace]:
        """What came of the calls, by their key.

        Raises:
            UsageError: more calls are missing than `max_calls`. TeacherError: the judge cannot be
            asked, or too many calls failed.
        """
        keys = {call.key for call in calls}
        with TraceStore(self.root / STORE) as store:
            missing = sum(self._is_missing(store.get(key)) for key in keys)
            self._tell(len(keys), missing, progress)
            try:
                self.asked = ask_missing(
                    calls, self.judge.teacher, self._spec(), store, progress, self.retry_failed,
                    self.named, commands="`judge`",
                )  # fmt: skip
            except CollectError as error:
                what = f"the judge fails too often: {error.what}"
                raise TeacherError(what, hint=error.hint) from error
            self.kept = len(keys) - self.asked
            found = {key: trace for key in keys if (trace := store.get(key)) is not None}
        for trace in found.values():
            if trace.failure is not None:
                self.failed.append(trace.why)
            elif trace.model_answered:
                self.answered.add(trace.model_answered)
        return found

    def verdict(self, kind: str, trace: Trace) -> str | None:
        """What it says to PAIR or ADDS; one that cannot be read is counted."""
        found = self._read(trace, verdict_of(kind, trace.text))
        return None if found is None else str(found)

    def grade(self, trace: Trace) -> int | None:
        """What it says to GRADE; one that cannot be read is counted."""
        found = self._read(trace, grade_of(trace.text))
        return None if found is None else int(found)

    def _read(self, trace: Trace, found: Any) -> Any:
        if trace.failure is not None:
            return None
        if found is None:
            cut = " (cut off at max_tokens)" if trace.finish_reason == "length" else ""
            self.unread.append(unreadable(trace.text) + cut)
        return found

    def _spec(self) -> CollectSpec:
        """A model served here answers one call at a time: others would wait past their timeout."""
        one = not isinstance(self.judge.teacher, ApiTeacher)
        return self.spec.model_copy(update={"concurrency": 1}) if one else self.spec

    def _is_missing(self, kept: Trace | None) -> bool:
        return kept is None or (kept.failure is not None and self.retry_failed)

    def _tell(self, calls: int, missing: int, progress: Progress) -> None:
        if self.max_calls is not None and missing > self.max_calls:
            raise UsageError(
                f"this makes {missing} calls, and --max-calls allows {self.max_calls}",
                hint="--sample and --ask make them fewer; what was answered is not asked again",
            )
        progress.note(f"{missing} calls to make; {calls - missing} were answered before")


@dataclass(frozen=True)
class _Against:
    """The answers of one result, and those that they are compared with."""

    name: str
    other: str
    questions: list[Question]


def judge(
    named: Sequence[NamedResult],
    desk: Desk,
    asks: Sequence[str],
    progress: Progress,
    *,
    with_teacher: bool = False,
    sample: int | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Grades, pairs and drift of results, as docs/likeness.md says. Pairs are of a single result,
    or `with_teacher` of each, with the teacher's answers, and else of each with the first.

    Raises:
        ArtifactError: a result has no answers with their prompts, or two have other prompts.
        UsageError: there is nothing to ask, or more than allowed. TeacherError: see Desk.answers.
    """
    require_comparable(named)
    rows = {each.name: _rows(each, sample) for each in named}
    with_teacher = with_teacher or len(named) == 1
    against = _against(rows, with_teacher) if PAIRS in asks else []
    calls = [call for name in rows if GRADES in asks for call in _grade_calls(desk, rows[name])]
    calls += [call for name in rows if DRIFT in asks for call in _drift_calls(desk, rows[name])]
    calls += [call for each in against for call in _pair_calls(desk, each.questions)]
    if not calls and not any(each.questions for each in against):
        raise UsageError(
            "there is nothing to ask: no row has a teacher's answer to compare with",
            hint="measure with --recipe, give a second result, or --ask grade",
        )
    traces = desk.answers(calls, progress)
    return {
        "kind": KIND,
        "version": VERSION,
        "made": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "edgedistill": __version__,
        "judge": _about(desk, asks),
        "token_mix": dict(named[0].result.token_mix or {}),
        "results": [
            {"name": each.name, "model": each.result.model["name"],
             "sha256": each.result.model["sha256"], "answers": len(rows[each.name])}
            for each in named
        ],
        "grades": [_grades(n, rows[n], desk, traces, seed) for n in rows if GRADES in asks],
        "pairs": [_pairs(each, desk, traces, seed) for each in against],
        "drift": [_drifts(n, rows[n], desk, traces, seed) for n in rows if DRIFT in asks],
        "calls": {"asked": desk.asked, "kept": desk.kept, "failed": len(desk.failed),
                  "unreadable": len(desk.unread)},
        "notes": _notes(desk),
    }  # fmt: skip


def judged_pairs(
    desk: Desk, questions: Sequence[Question], progress: Progress
) -> list[PairVerdict]:
    """Each pair in both orders; raises as Desk.answers."""
    traces = desk.answers(_pair_calls(desk, questions), progress)
    return [_verdict(desk, each, traces) for each in questions]


def _rows(named: NamedResult, sample: int | None) -> list[Row]:
    rows = (named.result.likeness or {}).get("rows", [])
    if not rows:
        raise ArtifactError(
            "this result has no answers to judge: it was measured without prompts",
            where=str(named.file), hint="measure with `bench MODEL --recipe NAME --out FILE`",
        )  # fmt: skip
    if any("prompt" not in row for row in rows):
        raise ArtifactError(
            "this result has answers without their prompts: it is of an older edgedistill",
            where=str(named.file), hint="measure again with `bench MODEL --recipe NAME --out FILE`",
        )  # fmt: skip
    if sample is None:
        return list(rows)
    return sorted(rows, key=lambda row: shuffled(row["id"], 0))[:sample]


def _asked(row: Row) -> str:
    return question_of(row["prompt"], row.get("history", ()))


def _grade_calls(desk: Desk, rows: Iterable[Row]) -> list[Call]:
    return [desk.judge.call(GRADE, row["id"], _asked(row), row["answer"]) for row in rows]


def _drift_calls(desk: Desk, rows: Iterable[Row]) -> list[Call]:
    return [
        desk.judge.call(ADDS, row["id"], _asked(row), row["teacher"], row["answer"])
        for row in rows
        if row.get("teacher") and row["teacher"] != row["answer"]
    ]


def _pair_calls(desk: Desk, questions: Iterable[Question]) -> list[Call]:
    """Two for each pair that differs: its first answer in the first place, and in the second."""
    return [
        desk.judge.call(PAIR, each.id, each.question, *shown)
        for each in questions
        if not each.is_equal
        for shown in ((each.first, each.second), (each.second, each.first))
    ]


def _against(rows: Mapping[str, list[Row]], with_teacher: bool) -> list[_Against]:
    if with_teacher:
        return [
            _Against(name, TEACHER, [
                _question(row, row["teacher"], row.get("teacher_gold"))
                for row in own if row.get("teacher")
            ])
            for name, own in rows.items()
        ]  # fmt: skip
    first, *others = rows
    theirs = {row["id"]: row for row in rows[first]}
    return [
        _Against(name, first, [
            _question(row, theirs[row["id"]]["answer"], theirs[row["id"]].get("gold"))
            for row in rows[name] if row["id"] in theirs
        ])
        for name in others
    ]  # fmt: skip


def _question(row: Row, other: str, other_gold: bool | None) -> Question:
    gold, ours = None, row.get("gold")
    if ours is not None and other_gold is not None:
        gold = TIE if ours == other_gold else FIRST if ours else SECOND
    return Question(row["id"], _asked(row), row["answer"], other, gold)


def _verdict(desk: Desk, one: Question, traces: Mapping[str, Trace]) -> PairVerdict:
    if one.is_equal:
        return PairVerdict(one.id, TIE, TIE, one.gold, asked=False)
    first, second = (desk.verdict(PAIR, traces[call.key]) for call in _pair_calls(desk, [one]))
    return PairVerdict(one.id, first, second, one.gold)


def _pairs(against: _Against, desk: Desk, traces: Mapping[str, Trace], seed: int) -> dict[str, Any]:
    found = [_verdict(desk, each, traces) for each in against.questions]
    rows = [
        {**asdict(pair), "verdict": pair.verdict,
         "trace_ids": [traces[call.key].trace_id for call in _pair_calls(desk, [one])]}
        for pair, one in zip(found, against.questions, strict=True)
    ]  # fmt: skip
    return {"first": against.name, "second": against.other, **of_pairs(found, seed), "rows": rows}


def _grades(
    name: str, rows: Sequence[Row], desk: Desk, traces: Mapping[str, Trace], seed: int
) -> dict[str, Any]:
    given = [traces[call.key] for call in _grade_calls(desk, rows)]
    grades = [desk.grade(trace) for trace in given]
    told = of_grades(grades, [row.get("gold") for row in rows], seed)
    each = [
        {"id": row["id"], "grade": grade, "trace_id": trace.trace_id}
        for row, grade, trace in zip(rows, grades, given, strict=True)
    ]
    return {"result": name, **told, "rows": each}


def _drifts(
    name: str, rows: Sequence[Row], desk: Desk, traces: Mapping[str, Trace], seed: int
) -> dict[str, Any]:
    """The share of answers that the judge says state a fact that the teacher's do not; one that is
    the teacher's own, word by word, does not."""
    known, each = [row for row in rows if row.get("teacher")], list[dict[str, Any]]()
    for row in known:
        calls = _drift_calls(desk, [row])
        said = desk.verdict(ADDS, traces[calls[0].key]) if calls else "no"
        adds = None if said is None else said == "yes"
        each.append({"id": row["id"], "adds": adds, "trace_ids": [c.key[:32] for c in calls]})
    flags = [row["adds"] for row in each if row["adds"] is not None]
    share = asdict(bootstrap(flags, RESAMPLES, seed)) if flags else None
    return {"result": name, "share": share, "unreadable": len(each) - len(flags), "rows": each}


def _about(desk: Desk, asks: Sequence[str]) -> dict[str, Any]:
    """Who judged, and how it was asked."""
    teacher = desk.judge.teacher
    kinds = {GRADES: GRADE, PAIRS: PAIR, DRIFT: ADDS}
    return {
        "model": teacher.model,
        "answered": sorted(desk.answered),
        "place": teacher.base_url
        if isinstance(teacher, ApiTeacher)
        else Path(teacher.weights).name,
        "prompt_versions": {ask: desk.judge.version(kinds[ask]) for ask in asks},
        "rubric": desk.judge.rubric,
        "reasons": desk.judge.reasons,
        "sampling": teacher.sampling.model_dump(mode="json", exclude_none=True),
    }


def _notes(desk: Desk) -> list[str]:
    notes = []
    if desk.failed:
        notes.append(
            f"{len(desk.failed)} calls failed and count for nothing (--retry-failed asks them "
            f"again); the first: {desk.failed[0]}"
        )
    notes += list(dict.fromkeys(desk.unread))[:SHOWN]
    return notes
