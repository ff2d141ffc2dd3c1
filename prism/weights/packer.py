"""Packs one model's weights into an inherited memory file: `python -m prism.weights.packer JOB`.

A process of its own, so that neither a bad checkpoint nor a full machine ends anything else, and light
(numpy, no torch), so that it starts at once. It says how it goes in JSON lines on standard output and ends
with `Packed`, `BadCheckpoint` or `NoMemory`. When nobody reads them any more, it ends too.
"""

from __future__ import annotations

import mmap
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from prism.errors import CheckpointError, HostMemoryError
from prism.memory import memfd
from prism.modelspec import ModelSpec, read_spec
from prism.types import Bytes
from prism.weights import checksum, protocol
from prism.weights.dummy import dummy_pieces
from prism.weights.layout import Layout, plan_layout
from prism.weights.pieces import Piece, checkpoint_pieces
from prism.weights.safetensors_index import locate, read_checkpoint

_MAX_THREADS = 4  # a page cache fills memory at 5 GB/s a thread; more would only disturb what is served


def plan_source(source: protocol.WeightSource) -> Layout:
    """The layout of a model's weights; raises `CheckpointError`."""
    return plan_layout(_spec(source))


def _spec(source: protocol.WeightSource) -> ModelSpec:
    return read_spec(source.path, dtype=source.dtype, quantization=source.quantization)


def pack(source: protocol.WeightSource, fd: int, on_progress: Callable[[Bytes], None]) -> None:
    """Fill the memory file with weights and checksums, calling `on_progress` with the bytes in place.

    Raises `CheckpointError`, and `HostMemoryError` when the pages cannot be reserved.
    """
    layout = plan_source(source)
    pieces = _pieces(layout, source)
    size = protocol.file_bytes(layout.total_bytes)
    try:
        memfd.allocate(fd, 0, size)
    except OSError as error:
        raise HostMemoryError(f"{size} bytes of host memory: {error.strerror}") from error
    buffer = np.frombuffer(mmap.mmap(fd, size), np.uint8)
    on_progress(Bytes(0))
    with ThreadPoolExecutor(min(_MAX_THREADS, os.cpu_count() or 1)) as threads:
        for done in _fill(buffer, pieces, threads):
            on_progress(done)
        _write_checksums(buffer, layout.total_bytes, threads)


def _pieces(layout: Layout, source: protocol.WeightSource) -> Iterable[Piece]:
    """All of the work, the checkpoint's headers checked."""
    if source.load_format == "dummy":
        return dummy_pieces(layout, source.model, _spec(source).dtype)
    directory = Path(source.path)
    return checkpoint_pieces(layout, locate(layout, read_checkpoint(directory), directory))


def _fill(buffer: NDArray[np.uint8], pieces: Iterable[Piece], threads: ThreadPoolExecutor) -> Iterator[Bytes]:
    """Do all pieces; yields the bytes that are in place, in order. The first error ends the rest."""

    def fill(piece: Piece) -> Bytes:
        piece.fill(buffer)
        return piece.end

    try:
        yield from threads.map(fill, pieces)
    except BaseException:
        threads.shutdown(cancel_futures=True)
        raise


def _write_checksums(buffer: NDArray[np.uint8], total: Bytes, threads: ThreadPoolExecutor) -> None:
    """Put the table of checksums behind the weights."""
    factors = checksum.factors()

    def of_chunk(index: int) -> int:
        begin = index * checksum.CHUNK_BYTES
        return checksum.checksum(buffer[begin : min(begin + checksum.CHUNK_BYTES, total)], factors)

    table = buffer[total:].view(np.uint64)
    table[:] = np.fromiter(threads.map(of_chunk, range(len(table))), np.uint64, len(table))


def main() -> int:
    """Do the job given as the only argument; the exit status is 0 if the weights are packed."""
    job = msgspec.json.decode(sys.argv[1], type=protocol.PackJob)
    with suppress(OSError):  # should memory run out all the same, the kernel ends a packer and no worker
        Path("/proc/self/oom_score_adj").write_text("800")
    try:
        pack(job.source, job.fd, lambda done: _say(protocol.Progress(done_bytes=done)))
    except CheckpointError as error:
        _say(protocol.BadCheckpoint(message=error.message, file=error.file, tensor=error.tensor))
        return 1
    except HostMemoryError as error:
        _say(protocol.NoMemory(message=str(error)))
        return 1
    _say(protocol.Packed())
    return 0


def _say(event: protocol.PackEvent) -> None:
    """One line. Ends the process when nobody is there to read it."""
    with suppress(BrokenPipeError):
        sys.stdout.buffer.write(msgspec.json.encode(event) + b"\n")
        sys.stdout.buffer.flush()
        return
    os._exit(1)  # the store has gone; a normal exit would flush into the closed pipe again


if __name__ == "__main__":
    sys.exit(main())
