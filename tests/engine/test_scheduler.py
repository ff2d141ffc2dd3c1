"""What a step takes."""

from __future__ import annotations

from prism.engine.kv_blocks import KvSpace
from prism.engine.kv_layout import KvLayout
from prism.engine.scheduler import Scheduler, Slots
from prism.engine.sequence import Sequence
from prism.types import Bytes, RequestId, SamplingParams, SlabId


def test_blocks_wanted_knows_the_prefix_cache() -> None:
    """A step asked for, and took from other models, blocks that its prompts' prefixes already had."""
    layout = KvLayout(tokens_per_block=4, block_bytes=Bytes(64), unit=Bytes(64), slab_bytes=Bytes(1024))
    kv = KvSpace(layout)
    kv.add_slab(SlabId(0))
    scheduler = Scheduler(kv, 8, Slots(8))
    prompt = list(range(18))

    def sequence(name: str) -> Sequence:
        params = SamplingParams(max_tokens=4, temperature=0.0, seed=0)
        return Sequence(RequestId(name), 0, len(prompt), list(prompt), params, 0.0, max_len=100)

    first = sequence("first")
    scheduler.add(first)
    assert scheduler.blocks_wanted(100) == 5
    step = scheduler.schedule(100)
    assert step is not None
    first.num_pending = 0
    first.append(7)
    scheduler.computed(step)
    second = sequence("second")
    scheduler.add(second)
    assert scheduler.blocks_wanted(100) == 1  # 4 of 5 blocks are shared; the first needs no new one
