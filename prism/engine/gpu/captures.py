"""Captures CUDA graphs in pieces between other work of the loop, one at a time on a device.

Capturing a step takes as long as launching it, 20 ms for 8B. So a capture is left alone between halves of
layers, and the loop replays graphs, launches, copies and looks at events on other streams meanwhile. That
asks for:

- a stream of its own for each lane, since all that is queued on a capturing stream is captured. It has
  cuBLAS's workspace from the beginning (lane.py), which the graphs use when they run on the lane's stream;
- the mode "relaxed", in which a thread with a capture may allocate and ask for events;
- memory of the lane's pool: torch takes what is allocated on a capturing stream from there, and only that.

What was captured is made ready by another thread: that is one call of the driver, 1 to 2.5 ms for 8B.
"""

from __future__ import annotations

import logging
import warnings
from collections import OrderedDict, deque
from concurrent.futures import Future, ThreadPoolExecutor, wait
from enum import Enum, auto

import torch

from prism.engine.gpu.graphs import Graphs, Key, Wish
from prism.engine.gpu.lane import GpuLane
from prism.engine.pieces import Pieces
from prism.memory.cuda_calls import DriverGraph
from prism.types import Bytes, MiB

log = logging.getLogger(__name__)

MAX_URGENT = 8
"""Of a batch that grows quickly each size is wanted for some steps only: the oldest wishes are given up."""
LONGEST_WAIT = 1.0
"""Seconds at a time."""
MOST_BYTES = Bytes(16 * MiB)
"""That a graph is taken to hold: 1.1 MiB each were seen, and others may allocate while one is made ready."""


class ReadyGraph:
    """See `Graph`."""

    def __init__(self, captured: torch.cuda.CUDAGraph, lane: GpuLane) -> None:
        """Takes milliseconds in which other threads go on. Raises `DriverError`."""
        self._captured = captured  # which keeps the memory of its intermediate results
        self._calls = lane.calls
        self._graph: DriverGraph = lane.calls.graph(
            captured.raw_cuda_graph(), lane.capture_stream.cuda_stream
        )

    def replay(self, stream: torch.cuda.Stream) -> None:
        """See `Graph.replay`."""
        self._calls.launch(self._graph, stream.cuda_stream)


class _Stage(Enum):
    NEW = auto()
    CAPTURING = auto()
    CAPTURED = auto()


class _Capture:
    """One graph on its way."""

    def __init__(self, wish: Wish, lane: GpuLane, maker: ThreadPoolExecutor) -> None:
        self.wish = wish
        self._lane = lane
        self._maker = maker
        self._ready: Future[ReadyGraph] | None = None
        self._free_before = 0
        """Bytes of the device before it was made ready."""
        self._graph = torch.cuda.CUDAGraph(keep_graph=True)
        self._pieces = Pieces(wish.work())
        self._stage = _Stage.NEW

    def advance(self, seconds: float) -> bool:
        """Do some more; whether the graph is there now."""
        with torch.inference_mode(), torch.cuda.stream(self._lane.capture_stream):
            match self._stage:
                case _Stage.NEW:
                    self._graph.capture_begin(pool=self._lane.pool, capture_error_mode="relaxed")
                    self._stage = _Stage.CAPTURING
                case _Stage.CAPTURING if not self._pieces.is_complete:
                    self._pieces.advance(None, seconds)
                case _Stage.CAPTURING:
                    self._graph.capture_end()
                    self._stage = _Stage.CAPTURED
                case _Stage.CAPTURED if self._ready is None:
                    self._free_before = self._num_free()
                    self._ready = self._maker.submit(ReadyGraph, self._graph, self._lane)
                case _Stage.CAPTURED if wait([self._ready], min(seconds, LONGEST_WAIT)).done:
                    self._add(self._ready.result())
                    return True
        return False

    def _add(self, graph: ReadyGraph) -> None:
        taken = max(0, self._free_before - self._num_free())
        self.wish.graphs.add(self.wish.key, graph, Bytes(min(taken, MOST_BYTES)))

    def _num_free(self) -> int:
        return torch.cuda.mem_get_info(self._lane.device)[0]

    def abandon(self) -> None:
        """End it without a graph."""
        if self._ready is not None:
            wait([self._ready])
        if self._stage is _Stage.CAPTURING:
            try:
                with warnings.catch_warnings(), torch.cuda.stream(self._lane.capture_stream):
                    warnings.simplefilter("ignore")  # that the graph is empty
                    self._graph.capture_end()
            except RuntimeError as error:  # what was captured may be invalid, which is said here once more
                log.debug("a capture ended: %s", error)
        self._stage = _Stage.NEW


class DeviceCaptures:
    """See `Captures`."""

    def __init__(self, device: torch.device) -> None:
        self._lanes: dict[Graphs, GpuLane] = {}
        self._urgent: deque[Wish] = deque()  # newest first
        self._likely: OrderedDict[tuple[Graphs, Key], Wish] = OrderedDict()
        self._capture: _Capture | None = None
        self._maker = ThreadPoolExecutor(1, "graphs", torch.cuda.set_device, (device,))
        self._maker.submit(int).result()  # a thread that begins keeps who starts it waiting for 5 ms
        self._is_urgent = False
        """A step lacks the graph that is being captured."""
        self.begins_likely = True
        """Else likely ones wait, but for one that has begun."""

    def add_lane(self, lane: GpuLane, graphs: Graphs) -> None:
        """A lane and its graphs."""
        self._lanes[graphs] = lane

    def add(self, wish: Wish, *, is_urgent: bool) -> None:
        """See `Captures.add`."""
        name = (wish.graphs, wish.key)
        if self._capture is not None and name == (self._capture.wish.graphs, self._capture.wish.key):
            return
        if is_urgent:
            self._likely.pop(name, None)
            self._urgent = deque([wish, *(w for w in self._urgent if (w.graphs, w.key) != name)][:MAX_URGENT])
        elif all((w.graphs, w.key) != name for w in self._urgent):
            self._likely.setdefault(name, wish)

    def advance(self, seconds: float, *, urgent_only: bool) -> bool:
        """Capture some more, about so long; whether there was anything to do. What fails is given up.

        With `urgent_only` just what steps lack, and what stands before that.
        """
        if urgent_only and not self._urgent and not self._is_urgent:
            return False
        if self._capture is None:
            self._begin()
        capture = self._capture
        if capture is None:
            return False
        try:
            if capture.advance(seconds):
                self._finish()
        except Exception:  # whatever it is, steps of this size can still be launched kernel by kernel
            log.exception("a graph of %d rows could not be captured", capture.wish.key.size)
            self._finish()
            capture.abandon()
            capture.wish.graphs.fail(capture.wish.key)
        return True

    def _begin(self) -> None:
        self._is_urgent = bool(self._urgent)
        if self._urgent:
            wish = self._urgent.popleft()
        elif self._likely and self.begins_likely:
            wish = self._likely.popitem(last=False)[1]
        else:
            return
        self._capture = _Capture(wish, self._lanes[wish.graphs], self._maker)

    def _finish(self) -> None:
        self._capture = None
        self._is_urgent = False

    def close(self) -> None:
        """Give up all that has not been captured."""
        self._urgent.clear()
        self._likely.clear()
        if self._capture is not None:
            self._capture.abandon()
            self._finish()
        self._maker.shutdown()

    def forget(self, owner: int) -> None:
        """A model is gone."""
        self._urgent = deque(w for w in self._urgent if w.key.owner != owner)
        for name in [name for name in self._likely if name[1].owner == owner]:
            del self._likely[name]
        if self._capture is not None and self._capture.wish.key.owner == owner:
            self._capture.abandon()
            self._finish()
