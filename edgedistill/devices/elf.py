"""For which processor a Linux program was compiled, from its first bytes."""

from __future__ import annotations

from pathlib import Path

from edgedistill.errors import UsageError
from edgedistill.runner import ARCHITECTURES, ARM, X86

MAGIC = b"\x7fELF"
LITTLE = 1  # EI_DATA
MACHINES = {0x3E: X86, 0xB7: ARM, 0x28: "arm", 0x03: "i386", 0xF3: "riscv64"}  # e_machine


def architecture_of(program: Path) -> str | None:
    """None where it is no ELF program, or of a kind that we have no name for."""
    with program.open("rb") as stream:
        head = stream.read(20)
    if len(head) < 20 or not head.startswith(MAGIC):
        return None
    order = "little" if head[5] == LITTLE else "big"
    return MACHINES.get(int.from_bytes(head[18:20], order))  # type: ignore[arg-type]


def require_fit(program: Path, architecture: str) -> None:
    """That `program` is for a device of this architecture (as `uname -m` says), where it tells.

    Raises:
        UsageError: it is for another.
    """
    made_for, there = architecture_of(program), ARCHITECTURES.get(architecture, architecture)
    if made_for is not None and made_for != there:
        raise UsageError(
            f"this runner is for {made_for}, and the device is {there}",
            where=str(program),
            hint="leave --runner out, or give one that was compiled for the device",
        )
