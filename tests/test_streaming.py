"""Calls in flight at once: what came is kept, and what no server can cause is raised."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
from fakes import KEY, MODEL, FakeTeacher

from edgedistill.errors import TeacherRefused
from edgedistill.streaming import Pass, ask_all
from edgedistill.teacher import Call, Endpoint, TeacherClient, Trace
from edgedistill.teacher.answers import Answer

CALLS = {
    f"p{i}": Call(f"p{i}", MODEL, ({"role": "user", "content": f"q{i}"},), {}, "v1")
    for i in range(4)
}


class Refusing:
    """A client that is refused for q0 once another call is in flight, which it then answers."""

    def __init__(self, inner: TeacherClient, error: Callable[[], BaseException]) -> None:
        self.endpoint = inner.endpoint
        self._inner, self._error = inner, error
        self._in_flight, self._refused = threading.Event(), threading.Event()

    def timed(self, call: Call) -> tuple[Trace, Answer | None]:
        if call.prompt_id == "p0":
            assert self._in_flight.wait(20)
            self._refused.set()
            raise self._error()
        self._in_flight.set()
        assert self._refused.wait(20)
        return self._inner.timed(call)

    def close(self) -> None:
        pass


def asked(error: Callable[[], BaseException]) -> Pass:
    with FakeTeacher() as teacher, TeacherClient(Endpoint(teacher.base_url, KEY)) as client:
        return ask_all(Refusing(client, error), CALLS, 2, lambda: None)


def test_what_is_in_flight_when_it_ends_is_kept() -> None:
    made = asked(lambda: TeacherRefused("no quota left"))
    assert str(made.stopped) == "no quota left"
    assert "p1" in made.answered
    assert made.failed == {}


def test_an_error_of_ours_is_raised() -> None:
    with pytest.raises(ZeroDivisionError):
        asked(ZeroDivisionError)


def test_a_pass_counts_tokens_and_tells() -> None:
    told: list[int] = []
    with FakeTeacher() as teacher, TeacherClient(Endpoint(teacher.base_url, KEY)) as client:
        made = ask_all(client, CALLS, 2, lambda: told.append(1))
    assert sorted(made.answered) == sorted(CALLS)
    assert (len(told), made.stopped) == (4, None)
    seconds = max(one.ended for one in made.answered.values()) - made.begun
    assert made.tokens_per_second == pytest.approx(4 * 30 / seconds)  # usage says 30 an answer
