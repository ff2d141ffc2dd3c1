"""What goes on beside a load in a server: decodes of another model."""

from __future__ import annotations

import time

import numpy as np

from prism.calibration.driving import Driver, add_request, random_prompt
from prism.calibration.models import LoadedModel
from prism.worker.stepper import LOOK_SECONDS

BATCH = 4
CONTEXT = 16
MOST_TOKENS = 512
"""Of one answer; then another begins."""
WARM_STEPS = 8


class Decodes:
    """A model that decodes on and on."""

    def __init__(self, model: LoadedModel) -> None:
        """The first steps have run, and what they lacked has been captured, when this is made."""
        self._model = model
        self._random = np.random.default_rng(0)
        self._driver = Driver([model], BATCH * CONTEXT)
        self.num_steps = 0
        while self.num_steps < WARM_STEPS:
            self.turn()
        self._driver.prepare()

    def turn(self) -> None:
        """Queue steps and commit what has run, once, as a worker's loop does."""
        if self._model.engine.is_idle:
            most = min(MOST_TOKENS, self._model.profile.spec.max_position - CONTEXT)
            for i in range(BATCH):
                add_request(self._model, f"{self.num_steps}-{i}", random_prompt(self._random, CONTEXT), most)
        ran = self._driver.turn()
        self.num_steps += len(ran)
        if not ran:
            time.sleep(LOOK_SECONDS)

    def close(self) -> None:
        """Drop what runs."""
        self._driver.end()
