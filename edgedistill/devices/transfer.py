"""Files on a device: copied once, by their sha256, and taken away again.

A file is `<sha256>` there when it is whole, and `<sha256>.part` until then, so a copy that was cut
off goes on where it was. Only `<sha256>.kept` beside it says that somebody wants it to stay: what a
killed sitting has left is used by the next one, and then removed.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from edgedistill.artifacts import digest_of_file
from edgedistill.devices.shell import Shell, quote
from edgedistill.errors import DeviceError, EdgedistillError, StorageError
from edgedistill.progress import Progress, Task

HASHING_SECONDS = 1800.0
TRIES = 3  # of a connection that breaks again without a byte that went through
FREE = re.compile(r"\s\d+\s+\d+\s+(\d+)\s+\d+%\s")  # KiB, as POSIX has the columns of df -Pk
WAIT_SECONDS = 1.0  # before the second try, and twice as long before each further one
# What the folder is in may be ours, too; a file in it says so, for whoever removes it.
FOLDER_SCRIPT = """\
new=
[ -d {parent} ] || {{ mkdir {parent} && new=1; }} || exit 1
[ -d {folder} ] || mkdir {folder} || exit 1
cd {folder} || exit 1
[ -z "$new" ] || : > parent.ours
echo "at $PWD"
"""
# What another sitting has asked to keep meanwhile stays.
CLEAN_SCRIPT = """\
cd {folder} || exit 1
for name in {names}; do
  [ -f $name ] && [ -f $name.kept ] || rm -f $name $name.part $name.kept || exit 1
done
new=
[ "$(ls -A)" = parent.ours ] && new=1 && rm -f parent.ours
cd ..
rmdir {folder} 2>/dev/null && [ -n "$new" ] && rmdir "$PWD"
true
"""
STATE_SCRIPT = """\
size() {{ stat -c %s "$1" 2>/dev/null || wc -c < "$1"; }}
cd {folder} || exit 1
[ -f {name} ] && echo "whole $(size {name})"
[ -f {name}.part ] && echo "part $(size {name}.part)"
[ -f {name}.kept ] && echo kept
df -Pk . 2>/dev/null | tail -n 1
true
"""
HASH_SCRIPT = """\
cd {folder} || exit 1
if command -v sha256sum >/dev/null 2>&1; then sha256sum {file}
elif command -v toybox >/dev/null 2>&1; then toybox sha256sum {file}
elif command -v shasum >/dev/null 2>&1; then shasum -a 256 {file}
else echo "there is no sha256sum, toybox or shasum" >&2; exit 3; fi
"""


@dataclass(frozen=True)
class State:
    """Of one file there: bytes of the whole one and of the part, None for neither; and how many
    bytes are free, None where df does not tell."""

    whole: int | None
    part: int | None
    kept: bool
    free: int | None


@dataclass
class Store:
    """The folder of ours on one device, and what this sitting has put into it."""

    shell: Shell
    progress: Progress
    folder: str = ""
    _ours: dict[str, bool] = field(default_factory=dict)  # name -> whether it may be removed

    def open(self) -> None:
        """Make the folder where there is none.

        Raises:
            DeviceError: that fails.
        """
        folder = self.shell.transport.folder
        script = FOLDER_SCRIPT.format(parent=folder.rpartition("/")[0], folder=folder)
        said = self.shell.run(script, "making a folder")
        if said.code != 0:
            raise self._error(f"no folder can be made there: {said.reason}")
        self.folder = said.out.strip().removeprefix("at ")

    def put(self, file: Path, label: str, *, executable: bool = False) -> str:
        """The path there of a copy of `file`, sent as far as it is not there yet.

        Raises:
            DeviceError: the device was lost, or the copy does not arrive as it was sent.
            StorageError: there is no space for it.
        """
        name, size, step = digest_of_file(file), file.stat().st_size, f"copying {label}"
        mode = "700" if executable else "600"
        for _ in range(2):  # what lies there may be damaged, or have been written to by two at once
            state = self._state(name, step)
            self._ours[name] = not state.kept
            lying = name if state.whole == size else f"{name}.part"
            if lying != name:
                self._send(file, name, size, label)
            if self._hash(lying, label) == name:
                # A mark that was left without its file would keep this one.
                forget = "" if state.kept else f" && rm -f {name}.kept"
                moved = "" if lying == name else f"{forget} && mv {lying} {name}"
                self._do(f"chmod {mode} {lying}{moved}", step)
                return f"{self.folder}/{name}"
            self._do(f"rm -f {name} {name}.part {name}.kept", step)
        raise self._error(f"{step}: it does not arrive as it was sent, its sha256 is another")

    def keep(self) -> None:
        """Leave there what was used, for other sittings."""
        for name in self._ours:
            self._do(f": > {name}.kept", "keeping what was copied")
            self._ours[name] = False

    def clean(self, *, asked_to_keep: bool = False) -> None:
        """Remove what this sitting has put there, but what it or another one wants to keep. Where
        that fails, say what lies where; where it was `asked_to_keep`, say that it is removed."""
        if not self.folder:
            return
        names = [name for name, ours in self._ours.items() if ours]
        why = self._removed(names)
        if not names:
            return
        lying = ", ".join(f"{name[:12]}..." for name in names)
        if why is None and asked_to_keep:
            self.progress.note(
                f"{self.shell.address}: not all was there when this ended, so nothing is kept but "
                f"what was kept before. Removed from {self.folder}: {lying}"
            )
        if why is not None:
            self.progress.note(
                f"{self.shell.address}: what was copied could not be removed ({why}). In "
                f"{self.folder} lies {lying}; the next sitting there uses and removes it"
            )

    def _removed(self, names: Sequence[str]) -> str | None:
        """Why these files could not be removed; None when they were."""
        script = CLEAN_SCRIPT.format(folder=quote(self.folder), names=" ".join(names))
        try:
            said = self.shell.run(script, "removing what was copied")
        except EdgedistillError as error:
            return error.what
        return None if said.code == 0 else said.reason

    def _send(self, file: Path, name: str, size: int, label: str) -> None:
        """Append to the part until it is whole, over as many connections as that takes."""
        step, tries, best = f"copying {label}", 0, -1
        with self.progress.task(step, size / 1e6, "MB") as task:
            shown = _Shown(task)
            while True:
                lost = None
                try:
                    state = self._state(name, step)
                    part = state.part or 0
                    shown.at(part)
                    if part == size:
                        return
                    tries, best = (0, part) if part > best else (tries, best)
                    self._append(file, name, state, label, shown)
                except DeviceError as error:
                    lost = error
                tries += 1
                if tries == TRIES:
                    raise lost or self._error(f"{step}: the device does not take all of it")
                if lost is not None:
                    self.progress.note(f"{lost.where}: {lost.what}; trying again")
                    time.sleep(WAIT_SECONDS * 2 ** (tries - 1))

    def _append(self, file: Path, name: str, state: State, label: str, shown: _Shown) -> None:
        part, step = state.part or 0, f"copying {label}"
        left = file.stat().st_size - part
        if left < 0:  # of another file of this name, or of one that has changed
            self._do(f"rm -f {name}.part", step)
            return
        self._require_space(left, state.free, label)
        with file.open("rb") as source:
            source.seek(part)
            said = self.shell.send(self._in_folder(f"cat >> {name}.part"), step, source, shown.more)
        if said.code == 0:
            return
        now = self._state(name, step)
        left = file.stat().st_size - (now.part or 0)
        if "No space left" in said.err:
            self._require_space(left, min(now.free or 0, left - 1), label)
        self._require_space(left, now.free, label)
        raise StorageError(
            f"{label} cannot be written there: {said.reason}",
            where=f"{self.shell.address}: {self.folder}",
        )

    def _require_space(self, needed: int, free: int | None, label: str) -> None:
        if free is not None and free < needed:
            raise StorageError(
                f"no space for {label}: {needed / 1e6:.1f} MB are needed, {free / 1e6:.1f} MB free",
                where=f"{self.shell.address}: {self.folder}",
                hint="make space there, and try again",
            )

    def _state(self, name: str, step: str) -> State:
        said = self.shell.run(STATE_SCRIPT.format(folder=quote(self.folder), name=name), step)
        if said.code != 0:
            raise self._error(f"{step}: {said.reason}")
        # BSD's wc pads its number with blanks.
        told = [line.split() for line in said.out.splitlines()]
        found = {words[0]: words[1] for words in told if len(words) == 2}
        free = FREE.search(said.out)
        return State(
            whole=int(found["whole"]) if "whole" in found else None,
            part=int(found["part"]) if "part" in found else None,
            kept="kept" in said.out.splitlines() and "whole" in found,
            free=int(free[1]) * 1024 if free else None,
        )

    def _hash(self, file: str, label: str) -> str:
        """sha256 of a file there."""
        script = HASH_SCRIPT.format(folder=quote(self.folder), file=file)
        with self.progress.task(f"checking {label} there", None):
            said = self.shell.run(script, f"checking {label}", HASHING_SECONDS)
        if said.code != 0:
            raise self._error(f"checking {label}: {said.reason}")
        return said.out.split()[0]

    def _do(self, script: str, step: str) -> None:
        said = self.shell.run(self._in_folder(script), step)
        if said.code != 0:
            raise self._error(f"{step}: {said.reason}")

    def _in_folder(self, script: str) -> str:
        return f"cd {quote(self.folder)} && {script}"

    def _error(self, what: str) -> DeviceError:
        return DeviceError(what, where=self.shell.address)


class _Shown:
    """How much of a file the bar shows: what went on its way may not have arrived."""

    def __init__(self, task: Task) -> None:
        self._task, self._bytes = task, 0

    def more(self, count: int) -> None:
        self.at(self._bytes + count)

    def at(self, count: int) -> None:
        self._task.advance((count - self._bytes) / 1e6)
        self._bytes = count
