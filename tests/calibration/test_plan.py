"""What is measured fits the model and its memory."""

from __future__ import annotations

from dataclasses import replace

from prism.calibration.plan import Limits, decode_sizes, prompt_sizes, room

LARGE = Limits(max_batch=512, max_tokens=8192, max_len=131072, num_blocks=1 << 16, tokens_per_block=16)


def test_batches_and_contexts_vary() -> None:
    sizes = decode_sizes(LARGE)
    assert sorted({size.batch for size in sizes}) == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
    contexts = {batch: {s.context for s in sizes if s.batch == batch} for batch in (1, 64, 512)}
    assert contexts == {1: {16, 4096}, 64: {16, 2048}, 512: {16, 256}}


def test_a_largest_batch_that_is_no_power_of_two_is_measured() -> None:
    assert max(size.batch for size in decode_sizes(replace(LARGE, max_batch=100))) == 100


def test_decodes_have_room() -> None:
    tight = replace(LARGE, num_blocks=700, max_len=512)
    sizes = decode_sizes(tight)
    assert sizes
    for size in sizes:
        assert tight.fits(size.batch, size.context + room(size.batch, tight))
    assert decode_sizes(replace(LARGE, num_blocks=2)) == []


def test_chunks_of_all_lengths_and_some_deep_ones() -> None:
    sizes = prompt_sizes(LARGE)
    assert [s.length for s in sizes if not s.start] == [16, 64, 256, 512, 1024, 2048, 4096, 8192]
    assert {(s.length, s.start) for s in sizes if s.start} == {
        (length, start) for length in (64, 512, 8192) for start in (2048, 8192)
    }


def test_chunks_stay_within_the_context() -> None:
    short = replace(LARGE, max_len=600, max_tokens=300)
    sizes = prompt_sizes(short)
    assert max(size.length for size in sizes) == 300
    assert any(size.start for size in sizes)
    for size in sizes:
        assert size.start + size.length < short.max_len
        assert size.start % short.tokens_per_block == 0
