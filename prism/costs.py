"""What work costs on a device, in seconds: steps, and bringing a model's weights in. Pure.

    step = gemm(tokens) + per_pair * pairs + per_context * context

`gemm` goes through measured knots (matrix products wait for weights at few tokens, for arithmetic at
many), those of decodes alone or of steps with prompts, which GPUs launch in other ways; `pairs` counts
(prompt token, token it attends to); `context` counts the tokens whose KV decodes read.
A profile (`prism profile`) has measured knots; without one they come from the shape and from rates that the
worker measured when it opened the device. Either is the start: measured steps correct it (`Corrections`).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from math import sqrt

from prism.types import Bytes, Seconds

KNOT_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
"""Sizes of steps at which profiles have knots."""

MOST_TOKENS = (1 << 20) - 1
"""Of a chunk; more than any context."""

LOAD_FIXED = Seconds(0.003)
"""Of a load without a profile: `prism profile` measured 1.2 ms (1B) and 2.9 ms (8B) on one H200."""


@dataclass(frozen=True, slots=True)
class DeviceRates:
    """What a device can do, as measured on it."""

    flops: float
    """Floating-point operations a second of large matrix products."""
    bandwidth: float
    """Bytes a second that a step reads."""
    link: float
    """Bytes a second from host memory to the device."""
    launch: Seconds
    """A step's time when there is next to nothing to compute, for each layer."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What the cost of a model's steps follows from when nothing has been measured."""

    num_parameters: float
    """Those that each token is multiplied by: all but the input embedding."""
    weight_bytes: Bytes
    """What a load copies."""
    read_bytes: Bytes
    """What a decode step reads of it."""
    kv_bytes_per_token: Bytes
    num_layers: int
    attention_width: int
    """Query heads times head dimension."""
    position_bytes: Bytes
    """Of the rotary table behind the weights, for each position of the context. No load copies it."""


Knots = tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class StepCosts:
    """Times of one model's steps on one device."""

    knots: Knots
    """Of decodes: (tokens of a step, seconds), both growing; no context."""
    per_pair: float
    per_context: float
    prompt_knots: Knots = ()
    """Of steps with prompts, where they differ."""

    @property
    def prompt_curve(self) -> Knots:
        """Of steps with prompts in any case."""
        return self.prompt_knots or self.knots

    def step(self, tokens: int, pairs: float = 0.0, context: float = 0.0) -> float:
        """Seconds of a step of `tokens`, prompt chunks and decodes together; without `pairs` of decodes."""
        gemm = self.gemm(tokens, has_prompts=pairs > 0)
        return gemm + self.per_pair * pairs + self.per_context * context

    def gemm(self, tokens: int, *, has_prompts: bool = False) -> float:
        """Between knots and beyond the last one in straight lines."""
        knots = self.prompt_curve if has_prompts else self.knots
        place = bisect_left(knots, (tokens, 0.0))
        if place == 0:
            return knots[0][1]
        place = min(place, len(knots) - 1)
        (n0, t0), (n1, t1) = knots[place - 1], knots[place]
        return t0 + (t1 - t0) * (tokens - n0) / (n1 - n0)

    def prefill(self, tokens: int, start: int = 0) -> float:
        """A prompt's tokens from `start` on, as if in one step."""
        return self.step(tokens, pairs=tokens * (start + tokens / 2))

    def decode(self, batch: int, context: float) -> float:
        """A step of `batch` sequences that have `context` tokens together."""
        return self.step(batch, context=context)

    def tokens_within(self, seconds: float, start: int = 0) -> int:
        """The largest prompt chunk from `start` on that takes no longer than this; 0 if none does.

        Asked for at every step beside decodes, so solved and not searched: between two knots the time is
        quadratic in the tokens.
        """
        if self.prefill(1, start) > seconds:
            return 0
        knots, place = self.prompt_curve, 1
        for n, t in knots[1:-1]:
            if t + self.per_pair * n * (start + n / 2) > seconds:
                break
            place += 1
        (n0, t0), (n1, t1) = knots[place - 1], knots[place]
        slope = (t1 - t0) / (n1 - n0)
        linear = slope + self.per_pair * start
        left = seconds - t0 + slope * n0  # half of per_pair * n^2 + linear * n = left
        root = linear * linear + 2 * self.per_pair * left
        whole = linear + sqrt(root) if root > 0 else 0.0
        guess = int(min(2 * left / whole, MOST_TOKENS)) if whole > 0 else MOST_TOKENS
        guess = max(1, min(guess, MOST_TOKENS))
        while self.prefill(guess, start) > seconds:  # rounding, or fewer tokens than the first knot has
            guess = guess - 1 if guess <= n1 else guess // 2
        while guess < MOST_TOKENS and self.prefill(guess + 1, start) <= seconds:
            guess += 1
        return guess


@dataclass(frozen=True, slots=True)
class LoadCosts:
    """Time of an activation: `fixed` and the copy."""

    fixed: Seconds
    bandwidth: float

    def load(self, size: float) -> float:
        """Seconds until so many bytes are on the device and usable."""
        return self.fixed + size / self.bandwidth


@dataclass(frozen=True, slots=True)
class Costs:
    """One model on one device."""

    steps: StepCosts
    loads: LoadCosts
    shape: Shape

    @property
    def activation(self) -> float:
        """Seconds from the decision to the model's readiness, with the link to itself."""
        return self.loads.load(self.shape.weight_bytes)

    @property
    def digest(self) -> str:
        """Tells these costs from others."""
        return blake2b(repr(self).encode(), digest_size=6).hexdigest()


def from_shape(shape: Shape, rates: DeviceRates) -> Costs:
    """The start without a profile: a roofline."""
    knots = []
    for tokens in KNOT_TOKENS:
        compute = 2 * shape.num_parameters * tokens / rates.flops
        read = shape.read_bytes / rates.bandwidth
        knots.append((tokens, shape.num_layers * rates.launch + max(compute, read)))
    per_pair = 4 * shape.num_layers * shape.attention_width / rates.flops
    steps = StepCosts(_growing(knots), per_pair, shape.kv_bytes_per_token / rates.bandwidth)
    return Costs(steps, LoadCosts(LOAD_FIXED, rates.link), shape)


def _growing(knots: Sequence[tuple[int, float]]) -> Knots:
    """More tokens take no less time: measured knots may say otherwise by noise."""
    result: list[tuple[int, float]] = []
    for tokens, seconds in sorted(knots):
        floor = result[-1][1] if result else 0.0
        result.append((tokens, max(seconds, floor)))
    return tuple(result)


def measured(
    knots: Sequence[tuple[int, float]],
    per_pair: float,
    per_context: float,
    prompt_knots: Sequence[tuple[int, float]] = (),
) -> StepCosts:
    """Costs from measured knots, in any order. Raises `ValueError` if a curve has fewer than two."""
    curve, prompt_curve = _growing(knots), _growing(prompt_knots)
    for points in (curve, prompt_curve or curve):
        if len(points) < 2 or len({tokens for tokens, _ in points}) != len(points):
            raise ValueError("costs need two knots or more, of different numbers of tokens")
    return StepCosts(curve, max(0.0, per_pair), max(0.0, per_context), prompt_curve)


class Corrections:
    """Factors between predicted and measured times: one of decodes, one of steps with prompts, one of loads.

    Exponentially weighted means of the logarithm would not follow zero; these are of the ratio, each
    measurement clipped to a factor of `CLIP` of the present one, so that a single outlier (a kernel compiled,
    a host that paused) moves little.
    """

    WEIGHT = 0.05
    CLIP = 2.0

    def __init__(self, decode: float = 1.0, prompt: float = 1.0, load: float = 1.0) -> None:
        self.decode = decode
        self.prompt = prompt
        self.load = load

    def saw_decode(self, predicted: float, seconds: float) -> None:
        """A step of decodes alone has taken `seconds` where `predicted`, uncorrected, was expected."""
        self.decode = self._moved(self.decode, predicted, seconds)

    def saw_prompt(self, predicted: float, seconds: float) -> None:
        """The same of a step with prompt chunks."""
        self.prompt = self._moved(self.prompt, predicted, seconds)

    def saw_load(self, predicted: float, seconds: float) -> None:
        """The same of a load; few are seen, so each counts more."""
        self.load = self._moved(self.load, predicted, seconds, 5 * self.WEIGHT)

    def _moved(self, factor: float, predicted: float, seconds: float, weight: float = WEIGHT) -> float:
        ratio = seconds / max(predicted, 1e-9)
        ratio = min(max(ratio, factor / self.CLIP), factor * self.CLIP)
        return factor + weight * (ratio - factor)

    def apply(self, costs: Costs) -> Costs:
        """The costs as they are now believed to be."""
        start = costs.steps
        steps = StepCosts(
            _scaled(start.knots, self.decode),
            start.per_pair * self.prompt,
            start.per_context * self.decode,
            _scaled(start.prompt_curve, self.prompt),
        )
        loads = LoadCosts(Seconds(costs.loads.fixed * self.load), costs.loads.bandwidth / self.load)
        return replace(costs, steps=steps, loads=loads)


def _scaled(knots: Knots, factor: float) -> Knots:
    return tuple((tokens, factor * seconds) for tokens, seconds in knots)
