"""What a model's sequences take of free memory, and what they ask others for: in server and simulator."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from prism.engine.scheduler import Want
from prism.types import ModelId, Rank
from prism.worker.snapshot import Need


def ask_in_order(wants: Sequence[Want], can_have: Callable[[int, Want], bool]) -> None:
    """Ask `can_have` for so many free blocks in the name of a sequence, for each that wants some.

    Each asks with its own rank for itself and those before it: a young one in the company of an old one
    would take memory from others that are older, and they would take it back. Behind one that is refused
    only older ones ask: those that run come first, and who waits may be older.
    """
    num_blocks = 0
    refused: Rank | None = None
    for want in wants:
        num_blocks += want.num_blocks
        may_ask = refused is None or want.rank < refused
        if may_ask and not can_have(num_blocks, want):
            refused = want.rank


def take_or_need(
    model: ModelId, lacking: int, blocks_per_slab: int, *, spare: int, room: int | None, want: Want
) -> int | Need:
    """Free slabs to take for blocks that are lacking, or what others are asked for, for a sequence's `want`.

    `spare` slabs are free and wanted by nobody older; it is negative if those lack some. `room` is what the
    model's limit leaves. Who begins again wants all of it or nothing, and leaves what is free to others until
    the rest is there, or within the limit.
    """
    missing, free = -(-lacking // blocks_per_slab), max(0, spare)
    within = missing if room is None else min(missing, room)
    count = min(within, free)
    if count == missing or (count > 0 and not want.is_again):
        return count
    return Need(
        model,
        max(1, within - free),
        want.rank,
        for_weights=False,
        blocks=lacking,
        reserved=max(0, -spare),
        is_again=want.is_again,
        num_found=want.num_found,
    )
