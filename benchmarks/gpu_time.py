"""What a GPU does while some steps of a training are computed: shares of the time that passes."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

# Parts of kernels' names, the first that is found: cuBLAS and CUTLASS products, fused attention,
# the optimizer, copies; everything else reads and writes activations.
KINDS = (
    ("attention", ("flash", "fmha", "attention", "sdpa", "cudnn_generated")),
    ("products", ("gemm", "nvjet", "cutlass", "splitk", "gemv")),
    ("optimizer", ("adam", "multi_tensor")),
    ("copies", ("memcpy", "memset")),
    ("softmax and loss", ("softmax", "nll_loss")),
)
REST = "element by element"
IDLE = "idle"


class Watched:
    """Profiles from step `first` to step `last`."""

    def __init__(self, first: int, last: int) -> None:
        self._first, self._last, self._step = first, last, 0
        self._profile: Any = None
        self._begun = 0.0
        self.found: dict[str, Any] = {}

    def step(self) -> None:
        """A step begins; the GPU has nothing to do."""
        if self._step == self._first:
            from torch.profiler import ProfilerActivity, profile

            self._profile = profile(activities=[ProfilerActivity.CUDA])
            self._profile.__enter__()
            self._begun = time.perf_counter()
        elif self._step == self._last and self._profile is not None:
            passed = time.perf_counter() - self._begun
            self._profile.__exit__(None, None, None)
            self.found = shares(_kernels(self._profile), passed, self._last - self._first)
        self._step += 1


def _kernels(profile: Any) -> list[tuple[str, float]]:
    """Names and seconds of what ran on the GPU."""
    from torch.autograd import DeviceType

    events = [each for each in profile.events() if each.device_type == DeviceType.CUDA]
    return [(each.name, each.time_range.elapsed_us() / 1e6) for each in events]


def shares(kernels: Iterable[tuple[str, float]], passed: float, steps: int) -> dict[str, Any]:
    """Of `passed` seconds, by kind, and the kernels that took longest; kernels do not overlap."""
    of_kind: dict[str, float] = {}
    of_name: dict[str, list[float]] = {}
    for name, seconds in kernels:
        of_kind[kind_of(name)] = of_kind.get(kind_of(name), 0.0) + seconds
        of_name.setdefault(name[:90], []).append(seconds)
    of_kind[IDLE] = max(0.0, passed - sum(of_kind.values()))
    longest = sorted(of_name.items(), key=lambda each: -sum(each[1]))[:12]
    return {
        "seconds_a_step": passed / steps,
        "kernels_a_step": sum(map(len, of_name.values())) / steps,
        "shares": {kind: round(seconds / passed, 4) for kind, seconds in of_kind.items()},
        "longest": [
            {"kernel": name, "share": round(sum(all_) / passed, 4), "a_step": len(all_) / steps}
            for name, all_ in longest
        ],
    }


def kind_of(name: str) -> str:
    """The kind of a kernel, by its name."""
    low = name.lower()
    return next((kind for kind, parts in KINDS if any(part in low for part in parts)), REST)
