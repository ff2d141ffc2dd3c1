"""Packed weights as a reader sees them: one read-only mapping of the store's memory file."""

from __future__ import annotations

import mmap
import os
import socket
from pathlib import Path
from types import TracebackType

import msgspec
import numpy as np
from numpy.typing import NDArray

from prism.errors import HostMemoryError, NotHeld
from prism.memory import memfd
from prism.types import Address, Bytes, ModelId, Seconds
from prism.weights.packer import pack, plan_source
from prism.weights.protocol import Fetch, Lent, Manifest, NotPacked, WeightSource, file_bytes

_MAX_PACKET = 4096
_TIMEOUT = Seconds(10.0)


class PackedWeights:
    """One model's packed bytes and checksums, until `close`. Usable as a context manager."""

    def __init__(
        self, manifest: Manifest, fd: int, lease: socket.socket | None, *, writable: bool = False
    ) -> None:
        """Map the memory file, whose descriptor the caller keeps; `lease` is closed after the mapping."""
        self.model = ModelId(manifest.model)
        self.total_bytes = Bytes(manifest.total_bytes)
        self.fingerprint = manifest.fingerprint
        self._lease = lease
        size = file_bytes(self.total_bytes)
        access = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        self._mapping = mmap.mmap(fd, size, mmap.MAP_SHARED, access)
        self._file: NDArray[np.uint8] | None = np.frombuffer(self._mapping, np.uint8)

    @property
    def data(self) -> NDArray[np.uint8]:
        """The bytes, as the layout says."""
        assert self._file is not None, "closed"
        return self._file[: self.total_bytes]

    @property
    def checksums(self) -> NDArray[np.uint64]:
        """One per chunk."""
        assert self._file is not None, "closed"
        return self._file[self.total_bytes :].view(np.uint64)

    @property
    def lease_fd(self) -> int | None:
        """Becomes readable when the store recalls a cached loan."""
        return None if self._lease is None else self._lease.fileno()

    def is_recalled(self) -> bool:
        """Whether the store wants its memory back, or has gone."""
        if self._lease is None:
            return False
        try:
            self._lease.recv(_MAX_PACKET, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            return True
        return True  # nothing but a recall is ever said, and at the end of the connection it is readable too

    @property
    def address(self) -> Address:
        """Where the bytes are mapped."""
        return Address(self.data.__array_interface__["data"][0])

    def close(self) -> None:
        """Unmap, then let the store evict the weights. Arrays of `data` must be gone; twice is harmless."""
        self._file = None
        self._mapping.close()
        if self._lease is not None:
            self._lease.close()

    def __enter__(self) -> PackedWeights:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def fetch(
    socket_path: Path,
    model: ModelId,
    *,
    writable: bool = False,
    cached: bool = False,
    timeout: Seconds = _TIMEOUT,
) -> PackedWeights:
    """Borrow a model's weights from the store; blocks for a round trip.

    `writable` maps them for writing, which pinning needs on systems that cannot pin read-only memory; nobody
    writes all the same. A `cached` loan is to be closed when the store recalls it. Raises `HostMemoryError`
    when the store does not hold them or does not answer.
    """
    lease = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        lease.settimeout(timeout)
        lease.connect(str(socket_path))
        lease.send(msgspec.json.encode(Fetch(model=model, cached=cached)))
        packet, fds, _, _ = socket.recv_fds(lease, _MAX_PACKET, 1)
        lease.setblocking(False)
        return _open(packet, fds, lease, writable=writable)
    except (OSError, msgspec.DecodeError) as error:
        lease.close()
        raise HostMemoryError(f"{model}: the weight store does not answer: {error}") from error
    except BaseException:
        lease.close()
        raise


def _open(packet: bytes, fds: list[int], lease: socket.socket, *, writable: bool) -> PackedWeights:
    """What the store's answer stands for; the descriptors are closed in any case."""
    try:
        answer = msgspec.json.decode(packet, type=Lent)
        if isinstance(answer, NotPacked):
            raise NotHeld(f"{answer.model}: the weight store does not hold it")
        return PackedWeights(answer, fds[0], lease, writable=writable)
    finally:
        for fd in fds:
            os.close(fd)


def pack_here(source: WeightSource) -> PackedWeights:
    """Pack a model in this process, without a store: for tests and tools.

    Raises `CheckpointError` and `HostMemoryError`.
    """
    layout = plan_source(source)
    manifest = Manifest(model=source.model, total_bytes=layout.total_bytes, fingerprint=layout.fingerprint)
    fd = memfd.create_memfd("prism-weights")
    try:
        pack(source, fd, lambda _: None)
        return PackedWeights(manifest, fd, None)
    finally:
        os.close(fd)
