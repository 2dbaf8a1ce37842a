"""What every file that a user writes has in common."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

SEEDS = 2**32  # what the libraries that take one can hold


class Strict(BaseModel):
    """Frozen; a misspelt field is an error, and so is a number that is none (.inf, .nan)."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
