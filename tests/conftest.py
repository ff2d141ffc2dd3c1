"""Test-wide settings."""

from __future__ import annotations

import torch

from tests.support import examples

torch.set_num_threads(1)  # the models are tiny: more threads only wait for one another
examples.load_profile()
