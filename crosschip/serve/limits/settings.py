"""What a server allows, as a table of a TOML file or as options of a command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["Limits"]


class Limits(BaseModel):
    """Limits of one server. None is no limit.

    `requests_per_minute` and `max_concurrent` hold for each key, and for all clients together where there are no keys;
    a key's own table goes before them. `max_prompt_chars` counts the characters of all text that a request sends for
    the model to read, the names in its objects, too; a token id counts as one.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    api_keys: Path | None = None
    max_body_bytes: Annotated[int, Field(ge=1024)] = 16 * 2**20
    max_body_s: Annotated[float, Field(gt=0)] = 30.0
    max_prompt_chars: Annotated[int, Field(ge=1)] | None = None
    max_request_s: Annotated[float, Field(gt=0)] | None = None
    requests_per_minute: Annotated[float, Field(gt=0)] | None = None
    max_concurrent: Annotated[int, Field(ge=1)] | None = None
