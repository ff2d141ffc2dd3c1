"""What is registered, in which order, within which bounds, and how it is given back, without CUDA."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prism.errors import DriverError, NotHeld
from prism.memory import memfd
from prism.types import Address, Bytes, ModelId
from prism.weights.registrations import (
    REGISTER_BYTES,
    Registered,
    Registrations,
    RegistrationThread,
    choose,
)
from tests.support.waiting import wait_until

A, B, C = ModelId("a"), ModelId("b"), ModelId("c")
CHUNK = REGISTER_BYTES


class FakeLoan:
    """A mapping of some terabyte that is not there."""

    def __init__(self, world: World, model: ModelId, writable: bool) -> None:
        self._world = world
        self.model, self.writable = model, writable
        self.address = Address((1 + "abc".index(model)) << 40)
        self.lease_fd: int | None = None
        self.was_recalled = False
        world.loans.append(self)

    def is_recalled(self) -> bool:
        return self.was_recalled

    def close(self) -> None:
        mine = [at for at in self._world.registered if self.address <= at < self.address + (1 << 40)]
        assert not mine, "unmapped while it is registered"
        self._world.loans.remove(self)
        self._world.log.append(f"return {self.model}")


class World:
    """The store and the driver; strict."""

    def __init__(self) -> None:
        self.registered: dict[Address, Bytes] = {}
        self.loans: list[FakeLoan] = []
        self.log: list[str] = []
        self.held = {A, B, C}
        self.needs_writable = False
        self.fails_from: int | None = None
        self.refuses_to_undo = False

    def borrow(self, model: ModelId, *, writable: bool) -> FakeLoan:
        if model not in self.held:
            raise NotHeld(model)
        self.log.append(f"borrow {model}")
        return FakeLoan(self, model, writable)

    def register_host(self, address: Address, size: Bytes, *, read_only: bool = False) -> None:
        loan = self.loan_at(address)
        assert 0 < size <= REGISTER_BYTES and read_only is not loan.writable
        if read_only and self.needs_writable:
            raise DriverError("cuMemHostRegister", "CUDA_ERROR_NOT_SUPPORTED")
        if self.fails_from is not None and len(self.registered) >= self.fails_from:
            raise DriverError("cuMemHostRegister", "CUDA_ERROR_OUT_OF_MEMORY")
        for at, length in self.registered.items():
            assert address + size <= at or at + length <= address, "registered twice"
        self.registered[address] = size
        self.log.append(f"register {loan.model}")

    def unregister_host(self, address: Address) -> None:
        if self.refuses_to_undo:
            raise DriverError("cuMemHostUnregister", "CUDA_ERROR_UNKNOWN")
        del self.registered[address]
        self.log.append(f"unregister {self.loan_at(address).model}")

    def loan_at(self, address: Address) -> FakeLoan:
        return next(loan for loan in self.loans if loan.address <= address < loan.address + (1 << 40))

    def loan_of(self, model: ModelId) -> FakeLoan:
        return next(loan for loan in self.loans if loan.model == model)

    @property
    def total(self) -> int:
        return sum(self.registered.values())


@pytest.fixture
def world() -> World:
    return World()


def new(world: World, num_chunks: int = 100, order: tuple[ModelId, ...] = (A, B, C)) -> Registrations:
    return Registrations(world, world.borrow, Bytes(num_chunks * CHUNK), order)


def settle(registrations: Registrations) -> None:
    for _ in range(1000):
        if not registrations.step():
            return
    raise AssertionError("it does not come to rest")


def announced(registrations: Registrations, **chunks: float) -> Registrations:
    for model, num_chunks in chunks.items():
        registrations.announce(ModelId(model), Bytes(int(num_chunks * CHUNK)))
    return registrations


def test_likely_models_are_registered_first_in_bounded_chunks(world: World) -> None:
    registrations = announced(new(world, order=(B, A, C)), a=2.5, b=1, c=1)
    settle(registrations)
    expected = ["borrow b", "register b", "borrow a", *["register a"] * 3, "borrow c", "register c"]
    assert world.log == expected
    assert registrations.total_bytes == world.total == 4.5 * CHUNK
    assert registrations.registered_bytes(A) == 2.5 * CHUNK
    registrations.close()
    assert not world.registered and not world.loans


def test_pages_are_touched_before_they_are_registered(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """That takes the driver's time off launches."""

    def touch(address: Address, size: Bytes, *, writable: bool) -> None:
        assert not writable
        world.log.append(f"touch {world.loan_at(address).model} {size}")

    monkeypatch.setattr(memfd, "touch", touch)
    settle(announced(new(world), a=1.5))
    touched = [f"touch a {size}" for size in (CHUNK, CHUNK // 2)]
    assert world.log == ["borrow a", touched[0], "register a", touched[1], "register a"]


def test_nothing_happens_before_the_store_holds_anything(world: World) -> None:
    assert not new(world).step()
    assert not world.log


def test_a_load_sees_what_is_there_so_far(world: World) -> None:
    registrations = announced(new(world), a=3)
    with registrations.use(A) as registered:
        assert registered == Registered(Address(0), Bytes(0), None)
    for _ in range(3):  # borrows, and registers two chunks
        registrations.step()
    with registrations.use(A) as registered:
        assert registered == Registered(world.loan_of(A).address, Bytes(2 * CHUNK), None)
        assert not registrations.has_all(A)
        settle(registrations)
        assert registrations.registered_bytes(A) == 3 * CHUNK and registrations.has_all(A)
    with registrations.use(A) as registered:
        assert registered.size == 3 * CHUNK and registered.packed is world.loan_of(A)


def test_the_budget_is_never_passed_and_what_does_not_fit_is_left_out(world: World) -> None:
    registrations = announced(new(world, num_chunks=3), a=2, b=2, c=1)
    settle(registrations)
    assert {loan.model for loan in world.loans} == {A, C}
    assert world.total == 3 * CHUNK


def test_what_has_become_likely_takes_the_place_of_what_has_not(world: World) -> None:
    registrations = announced(new(world, num_chunks=2), a=2, b=2)
    settle(registrations)
    registrations.prefer((B, A))
    for _ in range(20):
        registrations.step()
        assert world.total <= 2 * CHUNK
    assert {loan.model for loan in world.loans} == {B} and world.total == 2 * CHUNK


def test_what_a_load_uses_stays_whatever_is_likely_or_recalled(world: World) -> None:
    registrations = announced(new(world, num_chunks=2), a=2, b=2)
    settle(registrations)
    with registrations.use(A):
        registrations.prefer((B, A))
        world.loan_of(A).was_recalled = True
        settle(registrations)
        assert registrations.registered_bytes(A) == world.total == 2 * CHUNK
    settle(registrations)
    assert {loan.model for loan in world.loans} == {B}


def test_a_chunk_on_its_way_out_is_not_counted_on(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A load that begins while a chunk is being unregistered must not copy from it."""
    registrations = announced(new(world), a=2)
    settle(registrations)
    seen = []
    undo = world.unregister_host

    def begin_a_load(address: Address) -> None:
        with registrations.use(A) as registered:
            seen.append((registered.size, address - world.loan_of(A).address))
        undo(address)

    monkeypatch.setattr(world, "unregister_host", begin_a_load)
    registrations.prefer(())
    settle(registrations)
    assert seen == [(CHUNK, CHUNK), (0, 0)]


def test_a_recalled_loan_is_returned_first_and_forgotten(world: World) -> None:
    registrations = announced(new(world), a=1, b=2)
    settle(registrations)
    world.loan_of(B).was_recalled = True
    world.log.clear()
    announced(registrations, c=1)
    settle(registrations)
    assert world.log == [*["unregister b"] * 2, "return b", "borrow c", "register c"]
    announced(registrations, b=2)
    settle(registrations)
    assert registrations.registered_bytes(B) == 2 * CHUNK


def test_what_the_store_has_let_go_is_no_error(world: World) -> None:
    world.held = {B}
    registrations = announced(new(world), a=1, b=1)
    settle(registrations)
    assert registrations.total_bytes == CHUNK and registrations.error is None


def test_memory_is_mapped_for_writing_where_reading_is_not_enough(world: World) -> None:
    world.needs_writable = True
    registrations = announced(new(world), a=1, b=1)
    settle(registrations)
    assert world.log == ["borrow a", "return a", "borrow a", "register a", "borrow b", "register b"]
    assert all(loan.writable for loan in world.loans) and registrations.error is None


def test_a_failure_is_told_once_and_leaves_what_was_done(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    world.fails_from = 3
    registrations = announced(new(world), a=2, b=2, c=2)
    settle(registrations)
    assert registrations.error == "b: cuMemHostRegister failed: CUDA_ERROR_OUT_OF_MEMORY"
    assert caplog.text.count("not registered") == 1
    with registrations.use(B) as registered:
        assert registered.size == CHUNK
    with registrations.use(C) as registered:
        assert registered.size == 0
    assert {loan.model for loan in world.loans} == {A, B}
    world.fails_from = None
    announced(registrations, c=2)  # it was packed again
    settle(registrations)
    assert registrations.registered_bytes(C) == 2 * CHUNK


def test_what_cannot_be_unregistered_stays_mapped_and_counted(world: World) -> None:
    registrations = announced(new(world, num_chunks=3), a=2, b=2)
    settle(registrations)
    world.refuses_to_undo = True
    registrations.prefer((B, A))
    settle(registrations)
    assert world.total == registrations.total_bytes == 2 * CHUNK
    assert registrations.error is not None
    registrations.close()
    lost = weakref.ref(world.loan_of(A))
    world.loans.clear()
    assert lost() is not None, "a loan that nobody refers to is unmapped"


@given(st.data())
def test_whatever_happens_bounds_hold_and_closing_gives_all_back(data: st.DataObject) -> None:
    world = World()
    registrations = new(world, num_chunks=4)
    models = st.sampled_from((A, B, C))
    with ExitStack() as loads:
        for _ in range(data.draw(st.integers(0, 40))):
            match data.draw(st.integers(0, 5)):
                case 0:
                    announced(registrations, **{data.draw(models): data.draw(st.sampled_from((0.5, 2, 3)))})
                case 1:
                    registrations.prefer(data.draw(st.permutations((A, B, C))))
                case 2 if world.loans:
                    data.draw(st.sampled_from(world.loans)).was_recalled = True
                case 3:
                    loads.enter_context(registrations.use(data.draw(models)))
                case _:
                    registrations.step()
            assert world.total <= 4 * CHUNK
            assert registrations.total_bytes == world.total
    registrations.close()
    assert not world.registered and not world.loans


def test_choosing_leaves_out_what_does_not_fit() -> None:
    sizes = {A: Bytes(5), B: Bytes(4), C: Bytes(2)}
    assert choose((A, B, C), sizes, Bytes(7)) == [A, C]
    assert choose((C, B, A), sizes, Bytes(7)) == [C, B]
    assert choose((A, B, C), {}, Bytes(7)) == []


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for end in ends:
        os.close(end)


def test_the_thread_wakes_for_news_and_recalls_and_ends(world: World, pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    registrations = new(world)
    borrow = world.borrow

    def borrow_with_a_lease(model: ModelId, *, writable: bool) -> FakeLoan:
        loan = borrow(model, writable=writable)
        loan.lease_fd = reader
        return loan

    registrations._borrow = borrow_with_a_lease
    thread = RegistrationThread(registrations)
    announced(registrations, a=1)
    wait_until(lambda: registrations.registered_bytes(A), "a is registered")
    world.loan_of(A).was_recalled = True
    os.write(writer, b"x")
    wait_until(lambda: not world.loans, "it is given back")
    announced(registrations, b=1)
    wait_until(lambda: registrations.registered_bytes(B), "b is registered")
    thread.close()
    assert not world.registered and not world.loans
