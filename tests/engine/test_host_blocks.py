"""Random operations on the host tier keep its laws; room is made where nobody was for the longest time."""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from prism.engine.host_blocks import HostBlocks, HostPlace
from prism.types import Bytes, ModelId

CHUNK = Bytes(12)
SIZES = {ModelId("a"): Bytes(3), ModelId("b"): Bytes(4), ModelId("c"): Bytes(5)}
MODELS = st.sampled_from(sorted(SIZES))
KEYS = st.integers(0, 19).map(lambda number: b"%d" % number)


class HostBlocksMachine(RuleBasedStateMachine):
    """A model of the tier: what has been written to each place, and which copies are on their way."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = HostBlocks(CHUNK, 4)
        self.content: dict[HostPlace, tuple[str, bytes]] = {}
        self.copies: list[tuple[HostPlace, tuple[str, bytes]]] = []

    @rule()
    @precondition(lambda self: self.blocks.num_chunks < 4)
    def add_chunk(self) -> None:
        self.blocks.add_chunk()

    @rule(model=MODELS, key=KEYS)
    def put(self, model: ModelId, key: bytes) -> None:
        if self.blocks.has(model, key):
            self.blocks.touch(model, key)
            return
        room = self.blocks.num_obtainable(SIZES[model])
        place = self.blocks.put(model, key, SIZES[model])
        assert (place is None) == (room == 0)
        if place is not None:
            assert place.slot < CHUNK // SIZES[model]
            self.content[place] = (model, key)
            self.copies.append((place, (model, key)))

    @rule(model=MODELS, data=st.data())
    def put_as_many_as_there_is_room_for(self, model: ModelId, data: st.DataObject) -> None:
        for number in range(self.blocks.num_obtainable(SIZES[model])):
            key = b"new %d %d" % (number, len(self.content))
            if self.blocks.has(model, key):
                return
            place = self.blocks.put(model, key, SIZES[model])
            assert place is not None
            self.content[place] = (model, key)
            self.copies.append((place, (model, key)))
        assert self.blocks.num_obtainable(SIZES[model]) == 0

    @rule(model=MODELS, key=KEYS)
    def use(self, model: ModelId, key: bytes) -> None:
        if self.blocks.has(model, key):
            place = self.blocks.use(model, key)
            assert self.content[place] == (model, key)
            self.copies.append((place, (model, key)))

    @rule(data=st.data())
    @precondition(lambda self: self.copies)
    def end_a_copy(self, data: st.DataObject) -> None:
        place, _ = self.copies.pop(data.draw(st.integers(0, len(self.copies) - 1)))
        self.blocks.release(place)

    @rule(model=MODELS)
    def forget(self, model: ModelId) -> None:
        self.blocks.forget(model)
        assert self.blocks.bytes_of(model) == 0

    @invariant()
    def laws(self) -> None:
        self.blocks.check()
        self.blocks.check_references(place for place, _ in self.copies)
        for place, content in self.copies:  # nobody has written there since
            assert self.content[place] == content
        total = sum(self.blocks.bytes_of(model) for model in SIZES)
        assert total <= self.blocks.num_chunks * CHUNK <= 4 * CHUNK


TestHostBlocks = HostBlocksMachine.TestCase
TestHostBlocks.settings = settings(max_examples=80, stateful_step_count=40)

A, B = ModelId("a"), ModelId("b")


def filled(*models: ModelId) -> HostBlocks:
    """A chunk for each, full of blocks of 4 bytes that nobody copies any more."""
    blocks = HostBlocks(CHUNK, len(models))
    for number, model in enumerate(models):
        blocks.add_chunk()
        for slot in range(3):
            place = blocks.put(model, b"%d.%d" % (number, slot), Bytes(4))
            assert place is not None
            blocks.release(place)
    return blocks


def test_the_chunk_used_least_recently_makes_room() -> None:
    blocks = filled(A, B, A)
    blocks.touch(A, b"0.1")
    place = blocks.put(A, b"new", Bytes(4))
    assert place is not None and place.chunk == 1
    assert blocks.has(A, b"0.0") and blocks.has(A, b"2.2") and not blocks.has(B, b"1.0")
    assert (blocks.bytes_of(A), blocks.bytes_of(B)) == (28, 0)


def test_a_chunk_passes_to_blocks_of_another_size() -> None:
    blocks = filled(A, A)
    for number in range(4):
        assert blocks.put(B, b"%d" % number, Bytes(3)) == HostPlace(0, number)
    assert (blocks.bytes_of(A), blocks.bytes_of(B)) == (12, 12)
    blocks.check()


def test_what_a_copy_uses_stays_where_it_is() -> None:
    blocks = filled(A, B)
    used = [blocks.use(A, b"0.0"), blocks.use(B, b"1.1")]
    assert blocks.num_obtainable(Bytes(4)) == 0 and blocks.put(A, b"new", Bytes(4)) is None
    blocks.forget(B)
    place = blocks.put(A, b"new", Bytes(4))
    assert place is not None and place.chunk == 1 and place not in used
    assert not blocks.has(B, b"1.1")
    for place in used:
        blocks.release(place)
    blocks.check()
