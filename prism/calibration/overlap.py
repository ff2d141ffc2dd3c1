"""How much more decodes of several lanes do than those of one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from prism.calibration.driving import Driver, Ran, add_request, random_prompt
from prism.calibration.models import LoadedModel

BATCH = 4
CONTEXT = 16
WARM_STEPS = 6
NUM_STEPS = 64
"""Of each model."""


def overlap_factor(models: Sequence[LoadedModel]) -> float:
    """Steps a second of all of them together, each on its lane, over those of the first one alone."""
    together, alone = steps_per_second(models), steps_per_second(models[:1])
    return max(1.0, together / alone)


def steps_per_second(models: Sequence[LoadedModel]) -> float:
    """Of decodes of all models side by side."""
    random = np.random.default_rng(len(models))
    max_tokens = 4 * (WARM_STEPS + NUM_STEPS)  # more than any of them draws until all are measured
    for model in models:
        for i in range(BATCH):
            add_request(model, f"{i}", random_prompt(random, CONTEXT), max_tokens)
    driver = Driver(models, BATCH * CONTEXT)
    _run(driver, len(models), WARM_STEPS, prepare=True)
    ran = _run(driver, len(models), NUM_STEPS, prepare=False)
    driver.end()
    return (len(ran) - 1) / (ran[-1].end - ran[0].end)


def _run(driver: Driver, num_models: int, num_steps: int, *, prepare: bool) -> list[Ran]:
    """Until each model has made so many full decodes, or all have ended."""
    counts = [0] * num_models
    steps: list[Ran] = []
    while min(counts) < num_steps and not driver.is_idle:
        for ran in driver.turn():
            if ran.step.num_sequences == BATCH and not ran.step.has_prompts:
                counts[ran.place] += 1
                steps.append(ran)
                if prepare:
                    driver.prepare()
    return steps
