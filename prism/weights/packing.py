"""One packer process, from its start to its end."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable

import msgspec

from prism.errors import CheckpointError, HostMemoryError
from prism.types import Bytes
from prism.weights.protocol import BadCheckpoint, NoMemory, Packed, PackEvent, PackJob, Progress

_decoder: msgspec.json.Decoder[PackEvent] = msgspec.json.Decoder(PackEvent)


async def run_packer(job: PackJob, on_progress: Callable[[Bytes], None]) -> None:
    """Pack in a child process, which ends with this call however that ends.

    Raises what the packer reports, `CheckpointError` or `HostMemoryError`; a packer that ends without a
    word counts as the former.
    """
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "prism.weights.packer", msgspec.json.encode(job).decode()),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        pass_fds=(job.fd,),
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},  # no threads for mathematics it does not do
    )
    assert process.stdout is not None
    try:
        last = await _follow(process.stdout, on_progress)
        status = await process.wait()
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()  # reads what is left, so that the pipe is closed too
    _raise_unless_packed(job, last, status)


def _raise_unless_packed(job: PackJob, last: PackEvent | None, status: int) -> None:
    """Say what a packer's last event and its exit status mean."""
    match last:
        case Packed():
            return
        case BadCheckpoint():
            raise CheckpointError(last.message, file=last.file, tensor=last.tensor)
        case NoMemory():
            raise HostMemoryError(f"{job.source.model}: {last.message}")
        case _:
            ending = f"signal {-status}" if status < 0 else f"status {status}"
            raise CheckpointError(f"its packer ended with {ending}", file=job.source.path)


async def _follow(lines: asyncio.StreamReader, on_progress: Callable[[Bytes], None]) -> PackEvent | None:
    """Read to the end, passing progress on; returns the last event."""
    event: PackEvent | None = None
    async for line in lines:
        event = _decoder.decode(line)
        if isinstance(event, Progress):
            on_progress(Bytes(event.done_bytes))
    return event
