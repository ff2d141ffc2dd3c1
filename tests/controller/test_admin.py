"""What the admin endpoints refuse."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from prism.controller.admin import LimitsBody


def test_a_floor_past_its_limit_is_refused() -> None:
    """A worker would have taken more for the floor than the limit allows."""
    with pytest.raises(ValidationError, match="kv_floor_bytes is larger than kv_limit_bytes"):
        LimitsBody(kv_floor_bytes=2, kv_limit_bytes=1)
    assert LimitsBody(kv_floor_bytes=2).kv_limit_bytes is None
