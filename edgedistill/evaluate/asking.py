"""What benchmarks ask of a model, whoever scores the answers: how likely a text is behind another,
and what the model writes. Each answer is kept at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from edgedistill.errors import UsageError
from edgedistill.evaluate.kept import Kept
from edgedistill.progress import Progress, SilentTask, Task

if TYPE_CHECKING:
    from edgedistill.evaluate.models import Model


@dataclass
class Asking:
    """A model with what it has answered. `truncated`: how many requests were longer than the
    context and lost their beginning, as lm-evaluation-harness cuts them; `reused`: how many were
    answered in an earlier run."""

    model: Model
    kept: Kept
    progress: Progress
    truncated: int = 0
    reused: int = 0
    task: Task = field(default_factory=SilentTask)

    def likelihood(self, before: Sequence[int], answer: Sequence[int]) -> tuple[float, bool]:
        """Log-likelihood in nats of the tokens `answer` behind `before`, and whether it is the
        greedy answer.

        Raises:
            UsageError: the answer alone is longer than the context.
        """
        found = self.kept.get("likelihood", [list(before), list(answer)])
        if found is None:
            found = self.model.likelihood(*self._fitting(before, answer))
            self.kept.put("likelihood", [list(before), list(answer)], found)
        else:
            self.reused += 1
        return float(found[0]), bool(found[1])

    def _fitting(self, before: Sequence[int], answer: Sequence[int]) -> tuple[list[int], int]:
        """The ids that are asked, and where the answer begins in them."""
        ids, room = [*before, *answer], self.model.context_tokens
        if not answer:
            raise UsageError("a task asks for the likelihood of an answer without a token")
        if len(answer) >= room:
            raise UsageError(
                f"an answer of {len(answer)} tokens does not fit into a context of {room}",
                hint="give a larger --context",
            )
        self.truncated += len(ids) > room
        ids = ids[-room:]
        return ids, len(ids) - len(answer)

    def answer(self, text: str, max_tokens: int, stops: Sequence[str]) -> str:
        """What the model writes behind a text, up to an end token or to one of `stops`."""
        asked: list[Any] = [text, max_tokens, list(stops)]
        found = self.kept.get("answer", asked)
        if found is None:
            found = self._written(text, max_tokens, stops)
            self.kept.put("answer", asked, found)
        else:
            self.reused += 1
        return str(found)

    def _written(self, text: str, max_tokens: int, stops: Sequence[str]) -> str:
        ids, room = self.model.encode(text), self.model.context_tokens
        # Half of the context at most is for an answer: some tasks allow more than a model has.
        longest = min(max_tokens, room // 2)
        most = room - longest
        self.truncated += len(ids) > most
        return self.model.generate(ids[-most:], longest, stops)
