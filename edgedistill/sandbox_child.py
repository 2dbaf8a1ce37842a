"""The process that a program runs in: started by sandbox.py as a file, with Python's standard
library alone. It gives up its rights, runs the program and its tests, and says what came of it.

Linux: a user and network namespace of its own; resource limits; Landlock (reads: Python's library;
writes: its own folder; no TCP; no signals out); seccomp (no process, program, signal or socket).
Elsewhere: resource limits where there are any, and the audit hook, which is set everywhere.
Sources: kernel documentation userspace-api/landlock and userspace-api/seccomp_filter; PEP 578.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import struct
import sys
from collections.abc import Callable, Sequence
from typing import Any

CLONE_NEWUSER, CLONE_NEWNET, CLONE_NEWIPC = 0x10000000, 0x40000000, 0x08000000
PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 4, 38, 22, 2
ALLOW, EPERM = 0x7FFF0000, 0x00050001  # SECCOMP_RET_ALLOW; SECCOMP_RET_ERRNO with EPERM
LOAD, EQUAL, ABOVE, RETURN = 0x20, 0x15, 0x35, 0x06  # of classic BPF
# Calls that no program needs: processes and programs, signals, sockets, a look into other
# processes, namespaces and mounts, and interfaces of the kernel that were often attacked.
CALLS = {
    "x86_64": (
        0xC000003E,
        (56, 57, 58, 59, 322, 435, 62, 129, 200, 234, 297, 424, 434, 41, 42, 43, 49, 53, 101,
         310, 311, 272, 308, 165, 166, 155, 161, 321, 298, 323, 425, 248, 249, 250),
    ),
    "aarch64": (
        0xC00000B7,
        (220, 221, 281, 435, 129, 130, 131, 138, 240, 424, 434, 198, 199, 200, 202, 203, 117,
         270, 271, 97, 268, 40, 39, 41, 51, 280, 241, 282, 425, 217, 218, 219),
    ),
}  # fmt: skip
X32 = 0x40000000  # a second table of the same calls on x86_64
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446  # of Landlock, on every architecture
READS, ALL_FILES = 0b1100, 0x1FFF  # read files and list folders; all rights of its first version
REFUSED = (
    "ctypes.", "os.exec", "os.fork", "os.kill", "os.posix_spawn", "os.spawn", "os.startfile",
    "os.system", "pty.", "shutil.", "signal.pthread_kill", "socket.", "subprocess.", "winreg.",
    "_winapi.", "code.__new__", "gc.get_objects", "gc.get_referrers", "os.chmod", "os.chown",
    "os.link", "os.symlink", "sys._current_frames", "urllib.", "ftplib.", "http.", "smtplib.",
)  # fmt: skip
CHANGES = ("os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.truncate", "os.utime")
WHY = 300  # characters of an error


def main() -> None:
    request = json.loads(sys.stdin.buffer.readline())
    channel = os.dup(1)
    # Nobody reads what the program prints, and nothing is there for it to read.
    nowhere = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(nowhere, number)
    token = request["token"].encode()
    try:
        held = confine(request)
    except Exception as error:
        tell(channel, token, {"refused": f"{type(error).__name__}: {error}"})
        os._exit(1)
    tell(channel, token, {"held_by": held})
    write, leave, turn = os.write, os._exit, run  # a program may put others in their place
    passed, failed = token + b" passed\n", token + b" failed "
    why = turn(request["program"], request["tests"])
    if why is None:
        write(channel, passed)
    else:
        write(channel, failed + why.encode("ascii", "backslashreplace").replace(b"\n", b" "))
    leave(0)


def tell(channel: int, token: bytes, value: Any) -> None:
    os.write(channel, token + b" " + json.dumps(value).encode() + b"\n")


def run(program: str, tests: str) -> str | None:
    """Why it failed; None where the tests ran to their end. An exit is a failure as well."""
    space: dict[str, Any] = {"__name__": "solution"}
    start, make, caught = exec, compile, BaseException
    try:
        start(make(program, "solution", "exec"), space)
        start(make(tests, "tests", "exec"), space)
    except caught as error:
        try:
            return f"{type(error).__name__}: {error}"[:WHY]
        except caught:
            return "an error that cannot be shown"
    return None


def confine(request: dict[str, Any]) -> list[str]:
    """Give up what a program does not need; by what it is held from now on."""
    here, held = os.getcwd(), list[str]()
    reads = [os.path.dirname(os.path.realpath(os.__file__)), here]
    libc: Any = ctypes.CDLL(None, use_errno=True) if sys.platform.startswith("linux") else None
    if libc is not None:
        libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
        if libc.unshare(CLONE_NEWUSER | CLONE_NEWNET | CLONE_NEWIPC) == 0:
            held.append("namespace")
    if limit(request):
        held.append("limits")
    if libc is not None and libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0:
        if landlock(libc, reads, here):
            held.append("landlock")
        if seccomp(libc):
            held.append("seccomp")
    sys.addaudithook(watch(reads, here, request["files"]))
    return [*held, "audit"]


def limit(request: dict[str, Any]) -> bool:
    """Whether this system knows limits of a process."""
    try:
        import resource
    except ImportError:
        return False
    seconds = int(request["seconds"]) + 1
    wanted = {
        "RLIMIT_CPU": seconds,
        "RLIMIT_AS": request["memory_bytes"],
        "RLIMIT_FSIZE": request["file_bytes"],
        "RLIMIT_NOFILE": 64,
        "RLIMIT_NPROC": 0,
        "RLIMIT_CORE": 0,
    }
    for name, value in wanted.items():
        number = getattr(resource, name, None)
        if number is None:
            continue
        hard = resource.getrlimit(number)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        try:
            resource.setrlimit(number, (value, value))
        except (ValueError, OSError):
            if name == "RLIMIT_CPU":  # macOS knows no bound of the address space
                raise
    return True


def landlock(libc: Any, reads: Sequence[str], own: str) -> bool:
    """Whether the kernel now refuses all other files (later versions also TCP and signals)."""
    version = libc.syscall(CREATE_RULESET, None, ctypes.c_size_t(0), 1)
    if version < 1:
        return False
    files = ALL_FILES | (version >= 2) << 13 | (version >= 3) << 14 | (version >= 5) << 15
    values = [files] + [0b11] * (version >= 4) + [0b11] * (version >= 6)
    asked = struct.pack(f"{len(values)}Q", *values)
    rules = libc.syscall(CREATE_RULESET, asked, ctypes.c_size_t(len(asked)), 0)
    if rules < 0:
        return False
    libraries = [folder for folder in ("/lib", "/lib64", "/usr/lib") if os.path.isdir(folder)]
    allowed = [(path, READS) for path in [*reads, *libraries]] + [(own, files & ~(1 << 15))]
    for path, rights in allowed:
        opened = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rule = struct.pack("=Qi", rights, opened)
        failed = libc.syscall(ADD_RULE, rules, 1, rule, 0)
        os.close(opened)
        if failed:
            return False
    done = bool(libc.syscall(RESTRICT_SELF, rules, 0) == 0)
    os.close(rules)
    return done


def seccomp(libc: Any) -> bool:
    """Whether the kernel now refuses CALLS. It holds from here on, for all that follows."""
    if platform.machine() not in CALLS or sys.maxsize < 2**32:
        return False
    architecture, calls = CALLS[platform.machine()]
    # Each line: code, how far to jump where true, where false, value.
    lines = [(LOAD, 0, 0, 4), (EQUAL, 1, 0, architecture), (RETURN, 0, 0, EPERM), (LOAD, 0, 0, 0)]
    lines += [(ABOVE, 0, 1, X32), (RETURN, 0, 0, EPERM)]
    for call in calls:
        lines += [(EQUAL, 0, 1, call), (RETURN, 0, 0, EPERM)]
    lines.append((RETURN, 0, 0, ALLOW))
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in lines))
    program = struct.pack("HxxxxxxP", len(lines), ctypes.addressof(code))
    return bool(libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, program, 0, 0) == 0)


def watch(reads: Sequence[str], own: str, files: int) -> Callable[[str, Any], None]:
    """An audit hook (PEP 578) that refuses what has no place in a solution."""
    roots = [os.path.realpath(path) for path in reads]
    mine, writing, left = os.path.realpath(own), os.O_WRONLY | os.O_RDWR | os.O_CREAT, [files]
    real, inside, split, path_of = os.path.realpath, str.startswith, os.sep, os.fsdecode

    def within(path: Any, folders: Sequence[str]) -> bool:
        if isinstance(path, int):
            return True
        found = real(path_of(path))
        return any(found == root or inside(found, root + split) for root in folders)

    def hook(event: str, given: Any) -> None:
        if inside(event, REFUSED):
            raise PermissionError(f"a sandboxed program may not: {event}")
        if inside(event, CHANGES) and not all(
            within(path, [mine]) for path in given if isinstance(path, str | bytes)
        ):
            raise PermissionError(f"a sandboxed program may not: {event}")
        if event == "open":
            path, mode, flags = given
            writes = (mode and set(mode) & set("wax+")) or (flags or 0) & writing
            left[0] -= bool(writes)
            if left[0] < 0 or not within(path, [mine] if writes else roots):
                raise PermissionError("a sandboxed program may not open this file")

    return hook


if __name__ == "__main__":
    main()
