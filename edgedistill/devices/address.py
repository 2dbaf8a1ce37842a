"""Where a device is, as the command line says it: `local`, `ssh://[user@]host[:port]`,
`adb://[serial]`, `emulated://phone`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import urlsplit

from edgedistill.errors import UsageError, did_you_mean

LOCAL, SSH, ADB, EMULATED = "local", "ssh", "adb", "emulated"
FORMS = "local, ssh://[user@]host[:port], adb://[serial], emulated://phone"
# What OpenSSH itself takes for a name; a leading "-" would be read as one of its options.
NAME = re.compile(r"[A-Za-z0-9_.][A-Za-z0-9_.@+-]*")
HOST = re.compile(r"[A-Za-z0-9_.:%][A-Za-z0-9_.:%-]*")  # a name, an alias, or an IP address
PORT = re.compile(r":[0-9]*\Z")  # the last colon of an IPv6 address stands before a bracket
SERIAL = re.compile(r"[A-Za-z0-9_.:\[\]][A-Za-z0-9_.:\[\]-]*")


@dataclass(frozen=True)
class Address:
    """`name` is a host, a serial number ("": the only device), or an emulated device class."""

    scheme: str
    name: str = ""
    user: str | None = None
    port: int | None = None


def read_address(text: str) -> Address:
    """Read what `--device` was given.

    Raises:
        UsageError: it is none of the forms.
    """
    if text == LOCAL:
        return Address(LOCAL)
    scheme, separator, rest = text.partition("://")
    if not separator or scheme not in (SSH, ADB, EMULATED):
        hint = did_you_mean(text.partition(":")[0], (LOCAL, SSH, ADB, EMULATED))
        raise _refused(text, "it is no device that is known", hint)
    if scheme == SSH:
        return _ssh(text)
    if scheme == ADB and not (rest == "" or SERIAL.fullmatch(rest)):
        raise _refused(text, "this is no serial number of a device")
    return Address(scheme, rest)


def _ssh(text: str) -> Address:
    try:
        parts = urlsplit(text)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise _refused(text, str(error)) from error
    if parts.password is not None:
        raise _refused(text, "a password in it would be seen by everyone; use a key")
    if parts.path.strip("/") or parts.query or parts.fragment:
        raise _refused(text, "nothing may stand behind the host and its port")
    # The host as it was written: aliases of ssh's own configuration tell A from a.
    written = PORT.sub("", parts.netloc.rpartition("@")[2]).strip("[]")
    if not host or not HOST.fullmatch(written):
        raise _refused(text, "it names no host")
    if parts.username is not None and not NAME.fullmatch(parts.username):
        raise _refused(text, "this is no user's name")
    if port == 0:
        raise _refused(text, "there is no port 0")
    return Address(SSH, written, parts.username, port)


def _refused(text: str, what: str, hint: str = "") -> UsageError:
    forms = f"give one of: {FORMS}"
    return UsageError(f"--device {text}: {what}", hint=f"{hint} {forms}".strip())
