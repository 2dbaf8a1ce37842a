"""A language model says whether two answers to a question say the same."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from dataclasses import dataclass

from edgedistill.check_specs import JudgeCheck
from edgedistill.errors import TeacherError
from edgedistill.judging import JUDGE_OF_CHECK, SAME, judge_of, unreadable, verdict_of
from edgedistill.progress import Silent
from edgedistill.teacher import Call, TeacherClient, Trace, TraceStore, open_endpoint

FAILED_IN_A_ROW = 3  # then it is not asked any more
PROBE = ("ready", "Is this a test?", "Yes, it is.", "No, it is not.")


class JudgeChecker:
    """Same where the judge says so with either answer shown first (Zheng et al. 2023, arXiv
    2306.05685). Equal answers are the same, and nobody is asked; nor about the second order where
    the first says different. What was said is kept by question and answers, so it is asked once.

    `thrown`: why there is no verdict, by the answer that then is not the same and its question.

    Raises (when it is asked):
        TeacherError: it cannot be asked, or three calls in a row failed for good.
        WeightsError, RuntimeFailure: a local judge's file cannot be had or loaded, or it died.
    """

    def __init__(self, spec: JudgeCheck) -> None:
        self._spec, self._judge = spec, judge_of(spec)
        self._heard: dict[str, Trace] = {}
        self._failed_in_a_row = 0
        self._client: TeacherClient | None = None
        self._store: TraceStore | None = None
        self._open = contextlib.ExitStack()
        weakref.finalize(self, self._open.close)
        self.thrown: dict[str, str] = {}
        self.description = (
            f"The judge {spec.model} says that both answers say the same, whichever is shown "
            f"first (prompt version {self._judge.version(SAME)})."
        )

    def invalid(self, answer: str) -> str | None:
        return None if answer.strip() else "empty"

    def same(self, answer: str, teacher: str) -> bool:
        """Without the question; `about` has it."""
        return self.same_about("", answer, teacher)

    def about(self, question: str) -> AboutQuestion:
        """The same check for answers to a question."""
        return AboutQuestion(self, question)

    def same_about(self, question: str, answer: str, teacher: str) -> bool:
        """Whether both answers to the question say the same."""
        ours, theirs = answer.strip(), teacher.strip()
        if not ours or not theirs or ours == theirs:
            return bool(ours) and ours == theirs
        told = f"{ours} (to: {question})" if question else ours
        return all(
            self._says_same(self._judge.call(SAME, "", question, *shown), told)
            for shown in ((theirs, ours), (ours, theirs))
        )

    def probe(self) -> None:
        """Ask once, so that a judge that cannot be asked is known before much work is done.

        Raises:
            as above.
        """
        with self._ending():
            trace = self._asked().ask(self._judge.call(SAME, *PROBE))
            if trace.failure is not None:
                raise self._useless(f"the judge did not answer the first call: {trace.why}")

    def close(self) -> None:
        """End a local judge and the store; both open again when it is asked. Safe to call twice."""
        self._open.close()
        self._client = self._store = None

    @property
    def is_open(self) -> bool:
        """Whether a judge is served here, or a connection to one is held."""
        return self._client is not None

    def _says_same(self, call: Call, told: str) -> bool:
        trace = self._trace(call)
        verdict = None if trace.failure is not None else verdict_of(SAME, trace.text)
        if verdict is None:
            self.thrown[told] = trace.why if trace.failure else unreadable(trace.text)
        return verdict == SAME

    def _trace(self, call: Call) -> Trace:
        if call.key in self._heard:
            return self._heard[call.key]
        store = self._kept()
        trace = None if store is None else store.get(call.key)
        if trace is None or trace.failure is not None:
            with self._ending():
                trace = self._asked().ask(call)
                self._count(trace)
        if trace.failure is None:
            self._heard[call.key] = trace
            if store is not None:
                store.put(trace)
        return trace

    @contextlib.contextmanager
    def _ending(self) -> Iterator[None]:
        """An error ends what is open, and goes through it: what serves a local judge tells by it
        whether that has died."""
        try:
            yield
        except TeacherError:
            self._client = self._store = None
            with self._open.pop_all():
                raise

    def _count(self, trace: Trace) -> None:
        self._failed_in_a_row = self._failed_in_a_row + 1 if trace.failure is not None else 0
        if self._failed_in_a_row >= FAILED_IN_A_ROW:
            raise self._useless(
                f"{FAILED_IN_A_ROW} calls of the judge in a row failed, the last: {trace.why}"
            )

    def _useless(self, what: str) -> TeacherError:
        where = self._spec.base_url or str(self._spec.weights)
        return TeacherError(what, where=where, hint="`check` in the recipe names the judge")

    def _asked(self) -> TeacherClient:
        if self._client is None:
            opened = open_endpoint(self._judge.teacher, Silent(), JUDGE_OF_CHECK)
            endpoint = self._open.enter_context(opened)
            client = TeacherClient(endpoint, self._spec.timeout_seconds, self._spec.attempts)
            self._client = self._open.enter_context(client)
        return self._client

    def _kept(self) -> TraceStore | None:
        if self._store is None and self._spec.kept_in is not None:
            self._store = self._open.enter_context(TraceStore(self._spec.kept_in))
        return self._store


@dataclass(frozen=True)
class AboutQuestion:
    """A judge's check for answers to one question."""

    judge: JudgeChecker
    question: str

    @property
    def description(self) -> str:
        return self.judge.description

    def invalid(self, answer: str) -> str | None:
        return self.judge.invalid(answer)

    def same(self, answer: str, teacher: str) -> bool:
        return self.judge.same_about(self.question, answer, teacher)
