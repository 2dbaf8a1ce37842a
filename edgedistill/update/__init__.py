"""Update: what an app in the field needs to turn the bundle it holds into the new one.

An update file is a zip: `update.json` says of every file of the new bundle whether it is kept from
the old one, added (`files/NAME`), or made from an old one and a difference (`patches/NAME`, see
patch.py). Each has its sha256, so the result is the new bundle byte for byte, or nothing.
docs/update.md describes it for apps that apply it themselves.
"""

from edgedistill.update.apply import Applied, apply
from edgedistill.update.contents import Contents, Entry, Sample, read_bundle, require_gguf
from edgedistill.update.make import Made, make
from edgedistill.update.samples import ask, compare

__all__ = [
    "Applied",
    "Contents",
    "Entry",
    "Made",
    "Sample",
    "apply",
    "ask",
    "compare",
    "make",
    "read_bundle",
    "require_gguf",
]
