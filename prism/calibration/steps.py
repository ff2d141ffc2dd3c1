"""Times of one model's steps, by size."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from statistics import mean, median
from typing import NamedTuple

import numpy as np

from prism.calibration.driving import Driver, Ran, add_request, random_prompt
from prism.calibration.models import LoadedModel
from prism.calibration.plan import DecodeSize, Limits, PromptSize, decode_sizes, prompt_sizes
from prism.worker.cost_book import Work, work_of

WARM_STEPS = 4
"""Not counted: the first steps of a size load kernels, and what they lack is captured."""
MAX_STEPS = 32
MIN_STEPS = 5
MAX_SECONDS = 1.0
"""After which `MIN_STEPS` are enough."""
NUM_PROMPTS = 6
"""The first is not counted."""


class Point(NamedTuple):
    """The median of some steps of one size."""

    kind: str
    """`decode` or `prompt`."""
    work: Work
    seconds: float
    num_steps: int


def measure_steps(model: LoadedModel, limits: Limits, say: Callable[[str], None]) -> list[Point]:
    """Decodes and prompts of all sizes that fit."""
    points = []
    for size in decode_sizes(limits):
        say(f"{model.name}: decodes of {size.batch} sequences behind {size.context} tokens")
        points += measure_decodes(model, size, limits)
    for prompt in prompt_sizes(limits):
        say(f"{model.name}: prompt chunks of {prompt.length} tokens behind {prompt.start}")
        points += measure_prompts(model, prompt, limits)
    return points


def measure_decodes(model: LoadedModel, size: DecodeSize, limits: Limits) -> list[Point]:
    """One point, or none if so many sequences never ran at a time."""
    random = np.random.default_rng([size.batch, size.context])
    for i in range(size.batch):
        prompt = random_prompt(random, size.context)
        add_request(model, f"{i:05d}", prompt, limits.max_len - size.context)
    driver = Driver([model], limits.max_tokens)
    full: list[Ran] = []
    num_full = 0
    spent = 0.0
    while len(full) < MAX_STEPS and not (spent > MAX_SECONDS and len(full) >= MIN_STEPS):
        if driver.is_idle:
            break
        for ran in driver.turn():
            if ran.step.num_sequences < size.batch or ran.step.has_prompts:
                continue
            num_full += 1
            if num_full <= WARM_STEPS:
                driver.prepare()
            else:
                full.append(ran)
                spent += ran.seconds
    driver.end()
    return _point("decode", full)


def measure_prompts(model: LoadedModel, size: PromptSize, limits: Limits) -> list[Point]:
    """One point. What stands before the chunks is computed once, and found in the prefix cache then.

    Prompts come one after the other, so what the first one lacked is captured for the others.
    """
    random = np.random.default_rng([size.length, size.start, 1])
    prefix = random_prompt(random, size.start)
    if prefix:
        driver = Driver([model], limits.max_tokens)
        add_request(model, "prefix", prefix, 1)
        while not driver.is_idle:
            driver.turn()
    driver = Driver([model], size.length)
    chunks: list[Ran] = []
    for i in range(NUM_PROMPTS):
        add_request(model, f"{i}", prefix + random_prompt(random, size.length), 1)
        while not driver.is_idle:
            chunks += [ran for ran in driver.turn() if _is_chunk(ran, size)]
        if i == 0:
            driver.prepare()
    driver.end()
    return _point("prompt", chunks[1:])


def _is_chunk(ran: Ran, size: PromptSize) -> bool:
    return [(c.start, c.length) for c in ran.step.chunks] == [(size.start, size.length)]


def _point(kind: str, steps: Iterable[Ran]) -> list[Point]:
    found = [(work_of(ran.step), ran.seconds) for ran in steps]
    if not found:
        return []
    works = [work for work, _ in found]
    work = Work(works[0].tokens, works[0].pairs, round(mean(w.context for w in works)))
    return [Point(kind, work, median(seconds for _, seconds in found), len(found))]
