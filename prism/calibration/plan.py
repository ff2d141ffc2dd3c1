"""Which steps of a model are measured: what fits its context and the device. Pure."""

from __future__ import annotations

from dataclasses import dataclass

SHORT = 16
LONG = 4096
"""Tokens of context that long decodes have, if they fit."""
MAX_PREFILL = 1 << 17
"""Prompt tokens that may be computed before one size of decodes is measured."""
CHUNKS = (16, 64, 256, 512, 1024, 2048, 4096, 8192)
DEEP_CHUNKS = (64, 512)
DEEPEST = 8192
ROOM = 128
"""Tokens by which sequences grow while they are measured, at the most."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What bounds a step."""

    max_batch: int
    max_tokens: int
    """Of one step."""
    max_len: int
    """Of one sequence."""
    num_blocks: int
    tokens_per_block: int

    def fits(self, sequences: int, tokens: int) -> bool:
        """Whether so many sequences of so many tokens have room at a time."""
        blocks = -(-tokens // self.tokens_per_block)
        return tokens <= self.max_len and sequences * blocks <= self.num_blocks


@dataclass(frozen=True, slots=True)
class DecodeSize:
    """Decodes of `batch` sequences with about `context` tokens each."""

    batch: int
    context: int


@dataclass(frozen=True, slots=True)
class PromptSize:
    """A chunk of a prompt behind `start` tokens."""

    length: int
    start: int


def decode_sizes(limits: Limits) -> list[DecodeSize]:
    """Batches of 1, 2, 4, ... up to the largest, each with short contexts and with long ones."""
    batches = [1]
    while 2 * batches[-1] < limits.max_batch:
        batches.append(2 * batches[-1])
    if limits.max_batch > batches[-1]:
        batches.append(limits.max_batch)
    sizes = []
    for batch in batches:
        short = min(SHORT, limits.max_len // 4)
        growth = room(batch, limits)
        if short and limits.fits(batch, short + growth):
            sizes.append(DecodeSize(batch, short))
        long = min(LONG, MAX_PREFILL // batch, limits.max_len - growth)
        while long > 2 * short and not limits.fits(batch, long + growth):
            long //= 2
        if long > 2 * short:
            sizes.append(DecodeSize(batch, long))
    return sizes


def room(batch: int, limits: Limits) -> int:
    """Tokens that the first sequence draws while the others' prompts are computed, and all are measured."""
    return min(ROOM, limits.max_len // 2) + MAX_PREFILL // max(limits.max_tokens, 1024) * (batch > 1)


def prompt_sizes(limits: Limits) -> list[PromptSize]:
    """Chunks of all lengths from the start, and some behind much context."""
    longest = min(limits.max_tokens, limits.max_len - 2)
    lengths = sorted({length for length in CHUNKS if length < longest} | {min(longest, CHUNKS[-1])})
    fitting = [length for length in lengths if length > 1 and limits.fits(2, length + 1)]
    sizes = [PromptSize(length, 0) for length in fitting]
    for length in sorted({*DEEP_CHUNKS, *fitting[-1:]} & set(fitting)):
        deepest = min(DEEPEST, limits.max_len - length - 2)
        for start in sorted({deepest // 4, deepest}):
            start -= start % limits.tokens_per_block
            if start and limits.fits(3, start + length + 1):
                sizes.append(PromptSize(length, start))
    return sizes
