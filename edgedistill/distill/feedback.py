"""Which of the student's own answers are right, and what is better where they are not.

What the recipe's check calls the teacher's answer is right, and never costs a call. Of the others
the one that the student gives most often to a prompt is looked at:

- check: it is wrong.
- judge: the teacher compares it with its own answer, in both orders, since judges favour a place
  (Zheng et al. 2023, arXiv 2306.05685). It is wrong where it loses both. Won once each, called the
  same, or without a verdict that can be read: a tie, and a tie is right.
- preferred: the teacher is shown it as an answer of its own and says what it should have said. It
  is right where the check finds that to be the same; else what the teacher said is better.

Calls go through the trace store: they are kept, counted, and paid once.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from edgedistill.artifacts import TokenMixEntry, digest_of
from edgedistill.asking import STORE, ask_missing
from edgedistill.checks import Checker, about
from edgedistill.checks.cleaning import clean_answer
from edgedistill.fidelity import EvalRow
from edgedistill.progress import Progress
from edgedistill.recipe import CollectSpec, CurateSpec, Teacher
from edgedistill.teacher import Call, Trace, TraceStore, call_for

JUDGE, PREFERRED = "judge", "preferred"
CALLS = {"check": 0, JUDGE: 2, PREFERRED: 1}  # a prompt
JUDGE_SYSTEM = """\
You compare two answers to the same request. Say which one does better what was asked: judge what \
they say and whether it is right, not their length, style or place. Reply with one word: A, B, or \
SAME where neither is better."""
JUDGE_ASKS = """\
{task}Request:
{request}

Answer A:
{first}

Answer B:
{second}

Which answer is better: A, B, or SAME?"""
REVIEW = """\
Check your last answer. If it is right, repeat it exactly. If it is not, give the right one. Give \
the answer alone, in the same form as before."""
VERDICT = re.compile(r"\b(A|B|SAME)\b")
Feedback = Literal["check", "judge", "preferred"]


@dataclass(frozen=True)
class Verdict:
    """Of one prompt: the student's different answers that are `right`; `worse`, one that is wrong,
    and `better`, what to say instead. `worse` None: none is known to be wrong."""

    row: EvalRow
    right: tuple[str, ...]
    worse: str | None
    better: str


@dataclass(frozen=True)
class Desk:
    """Who is asked for feedback, and by which rules."""

    teacher: Teacher
    collect: CollectSpec
    cleaning: CurateSpec
    out: Path  # the workspace, which holds the trace store
    retry_failed: bool = False

    def identity(self) -> dict[str, Any]:
        """What of it shapes a verdict, as JSON."""
        probe = EvalRow("", "", "", "", True)
        calls = (*judge_calls(probe, "", self.teacher), review_call(probe, "", self.teacher))
        return {
            "calls": digest_of([[call.key, call.prompt_version] for call in calls]),
            "cleaning": self.cleaning.model_dump(mode="json", exclude={"split"}),
        }


@dataclass(frozen=True)
class Assessed:
    """Verdicts in the order of the rows; `told`, one entry a call; figures of them."""

    verdicts: tuple[Verdict, ...]
    told: tuple[dict[str, Any], ...]
    facts: dict[str, int]


def assess(
    rows: Sequence[EvalRow],
    answers: Sequence[Sequence[str]],
    feedback: Feedback,
    wanted: Literal["worse", "right"],
    checker: Checker,
    desk: Desk,
    calls_left: int,
    progress: Progress,
) -> Assessed:
    """What is right of the student's `answers` to each row.

    At most `calls_left` calls are made for it, kept ones counted; beyond that no answer is found to
    be right or wrong but by the check. With `wanted` "right" a prompt that has a right answer costs
    no call.

    Raises:
        CollectError: more calls failed than desk.collect allows.
        TeacherUnreachable, TeacherRefused: no call can work.
    """
    sorted_ = [_sorted(row, given, checker) for row, given in zip(rows, answers, strict=True)]
    asked, beyond = dict[int, tuple[Call, ...]](), 0
    for at, (row, (right, wrong)) in enumerate(zip(rows, sorted_, strict=True)):
        if not CALLS[feedback] or not wrong or not _may_be_right(wrong[0], checker):
            continue
        asked[at] = ()
        if wanted == "right" and right:
            continue
        if sum(map(len, asked.values())) + CALLS[feedback] > calls_left:
            beyond += 1
        else:
            asked[at] = _calls(row, wrong[0], feedback, desk.teacher)
    calls = [call for some in asked.values() for call in some]
    traces = _ask(calls, desk, progress)
    verdicts = list[Verdict]()
    for at, (row, (right, wrong)) in enumerate(zip(rows, sorted_, strict=True)):
        if at in asked:
            given = [traces[call.key] for call in asked[at]]
            known = Verdict(row, right, None, row.answer)
            verdicts.append(_heard(known, wrong[0], feedback, given, checker, desk.cleaning))
        else:
            verdicts.append(Verdict(row, right, wrong[0] if wrong else None, row.answer))
    facts = {
        "prompts": len(rows),
        "answers": sum(map(len, answers)),
        "prompts_with_right": sum(bool(v.right) for v in verdicts),
        "disagreements": sum(bool(wrong) for _, wrong in sorted_),
        "wrong": sum(v.worse is not None for v in verdicts),
        "teacher_calls": len(calls),
        "failed_calls": sum(trace.failure is not None for trace in traces.values()),
        "prompts_beyond_max_calls": beyond,
        "prompt_tokens": sum(trace.prompt_tokens for trace in traces.values()),
        "completion_tokens": sum(trace.completion_tokens for trace in traces.values()),
    }
    told = tuple(_told(call, traces[call.key]) for call in calls)
    return Assessed(tuple(verdicts), told, facts)


def _sorted(
    row: EvalRow, answers: Sequence[str], checker: Checker
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Different answers that the check takes for the teacher's, and those that it does not; the
    most frequent first, then the one that came first."""
    counts = Counter(answers)
    order = sorted(counts, key=lambda answer: -counts[answer])
    check = about(checker, row.prompt, row.history)
    same = {a for a in order if a == row.answer or check.same(a, row.answer)}
    right = tuple(answer for answer in order if answer in same)
    return right, tuple(answer for answer in order if answer not in same)


def _may_be_right(answer: str, checker: Checker) -> bool:
    """What cannot be an answer at all is wrong; nobody has to be asked."""
    return bool(answer.strip()) and checker.invalid(answer) is None


def _calls(row: EvalRow, answer: str, feedback: Feedback, teacher: Teacher) -> tuple[Call, ...]:
    if feedback == JUDGE:
        return judge_calls(row, answer, teacher)
    return (review_call(row, answer, teacher),)


def judge_calls(row: EvalRow, answer: str, teacher: Teacher) -> tuple[Call, Call]:
    """The teacher's answer as A and the student's as B, and the other way around."""
    task = "" if teacher.system is None else f"Instructions:\n{teacher.system}\n\n"
    said = [f"{m['role']}: {m['content']}" for m in row.history]
    request = "\n".join([*said, f"user: {row.prompt}"]) if said else row.prompt
    version = f"judge-{digest_of([JUDGE_SYSTEM, JUDGE_ASKS])[:12]}"

    def call(first: str, second: str) -> Call:
        asks = {"task": task, "request": request, "first": first, "second": second}
        text = re.sub(r"\{(\w+)\}", lambda slot: asks[slot[1]], JUDGE_ASKS)
        messages = ({"role": "system", "content": JUDGE_SYSTEM}, {"role": "user", "content": text})
        made = call_for(TokenMixEntry(row.id, messages), teacher, JUDGE)
        return replace(made, prompt_version=version)

    return call(row.answer, answer), call(answer, row.answer)


def review_call(row: EvalRow, answer: str, teacher: Teacher) -> Call:
    """The teacher's own conversation, with the student's answer as if it were its own."""
    messages = (
        *row.history,
        {"role": "user", "content": row.prompt},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": REVIEW},
    )
    made = call_for(TokenMixEntry(row.id, messages), teacher, PREFERRED)
    return replace(made, prompt_version=f"{made.prompt_version}+review-{digest_of(REVIEW)[:12]}")


def _ask(calls: Sequence[Call], desk: Desk, progress: Progress) -> Mapping[str, Trace]:
    """The trace of each call, by its key."""
    if not calls:
        return {}
    with TraceStore(desk.out / STORE) as store:
        ask_missing(
            calls, desk.teacher, desk.collect, store, progress, desk.retry_failed,
            commands="`build`",  # `collect` does not come so far
        )  # fmt: skip
        found = {call.key: store.get(call.key) for call in calls}
    return {key: trace for key, trace in found.items() if trace is not None}


def _heard(
    known: Verdict,
    answer: str,
    feedback: Feedback,
    given: Sequence[Trace],
    checker: Checker,
    cleaning: CurateSpec,
) -> Verdict:
    """With what the teacher said of `answer`; what it failed to say changes nothing."""
    if not given or any(trace.failure is not None for trace in given):
        return known
    passed = replace(known, right=(*known.right, answer))
    if feedback == JUDGE:
        lost = [_word(trace) for trace in given] == ["A", "B"]
        return replace(known, worse=answer) if lost else passed
    better = clean_answer(given[0].text, cleaning)
    if given[0].finish_reason == "length" or not better or checker.invalid(better) is not None:
        return known
    row = known.row
    if better == answer or about(checker, row.prompt, row.history).same(answer, better):
        return passed
    return replace(known, worse=answer, better=better)


def _word(trace: Trace) -> str | None:
    """A, B or SAME, where a judge says one of them and no other."""
    found = set(VERDICT.findall(trace.text))
    return found.pop() if len(found) == 1 else None


def _told(call: Call, trace: Trace) -> dict[str, Any]:
    """One call, for those who want to know what a verdict rests on."""
    return {
        "prompt_id": call.prompt_id,
        "purpose": call.purpose,
        "trace_id": trace.trace_id,
        "model_asked": trace.model_asked,
        "model_answered": trace.model_answered,
        "prompt_version": call.prompt_version,
        "said": trace.text,
        "failure": trace.failure,
    }
