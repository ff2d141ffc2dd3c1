"""Which random examples property tests try: the same ones each time, or others.

`PRISM_TESTS=thorough scripts/test` is for whoever has changed what they try. Without it a test that passes
today passes tomorrow, on however slow a machine.
"""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings


def load_profile() -> None:
    """For all tests; what they set themselves goes on top of it."""
    slow = [HealthCheck.too_slow]
    settings.register_profile("thorough", deadline=None, suppress_health_check=slow, print_blob=True)
    settings.register_profile("usual", settings.get_profile("thorough"), derandomize=True, database=None)
    settings.load_profile("thorough" if os.environ.get("PRISM_TESTS") == "thorough" else "usual")
