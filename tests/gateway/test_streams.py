"""What waits in a mailbox comes out together."""

from __future__ import annotations

import asyncio

import pytest

from prism.errors import EngineFailure
from prism.gateway.requests import Failed, Finished
from prism.gateway.streams import MOST_PIECES, Batch, Mailbox
from prism.gateway.texts import Piece
from prism.types import FinishReason
from tests.support.turns import OtherTask

pytestmark = pytest.mark.anyio


def piece(text: str, finish: FinishReason | None = None) -> Piece:
    return Piece(0, text, (), finish)


async def rest(mailbox: Mailbox) -> list[Batch]:
    """Until nothing follows; nothing does behind a failure."""
    batches = []
    async with asyncio.timeout(10):
        while (batch := await mailbox.next()) is not None:
            batches.append(batch)
            assert len(batches) < 100, "it never ends"
        if batches[-1].failure is not None:
            mailbox.put(piece("late"))
            assert await mailbox.next() is None
    return batches


async def test_what_has_come_meanwhile_is_one_batch() -> None:
    mailbox = Mailbox(1)
    mailbox.put(piece("a"))
    assert await mailbox.next() == Batch([piece("a")], None)
    waiting = asyncio.ensure_future(mailbox.next())
    await asyncio.sleep(0)
    for text in "bcd":
        mailbox.put(piece(text))
    assert await waiting == Batch([piece("b"), piece("c"), piece("d")], None)
    mailbox.put(piece("e", FinishReason.STOP))
    mailbox.put(Finished())
    assert await rest(mailbox) == [Batch([piece("e", FinishReason.STOP)], None)]


async def test_a_pile_comes_out_in_parts() -> None:
    mailbox = Mailbox(1)
    everything = [piece(str(number)) for number in range(2 * MOST_PIECES + 1)]
    for each in everything:
        mailbox.put(each)
    failed = Failed(EngineFailure("gone").wire())
    mailbox.put(failed)
    batches, seen = [], []
    async with OtherTask() as other:
        while (batch := await mailbox.next()) is not None:
            batches.append(batch)
            seen.append(other.turns)
    assert seen == [0, 1, 2], "others have their turns"
    assert [len(batch.pieces) for batch in batches] == [MOST_PIECES, MOST_PIECES, 1]
    assert [batch.failure for batch in batches] == [None, None, failed]
    assert [each for batch in batches for each in batch.pieces] == everything


async def test_a_failure_comes_behind_what_was_said_before_and_nothing_after_it() -> None:
    mailbox = Mailbox(2)
    first, second = (Failed(EngineFailure(text).wire()) for text in ("first", "second"))
    mailbox.put(piece("a"))
    mailbox.put(first)
    mailbox.put(piece("of another prompt"))
    mailbox.put(second)
    assert await rest(mailbox) == [Batch([piece("a")], first)]


async def test_a_failure_wakes_who_waits() -> None:
    mailbox = Mailbox(2)
    waiting = asyncio.ensure_future(mailbox.next())
    await asyncio.sleep(0)
    failed = Failed(EngineFailure("gone").wire())
    mailbox.put(failed)
    assert await waiting == Batch([], failed)
