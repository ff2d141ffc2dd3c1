"""Memory for graphs that is taken ahead."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import Any
from weakref import WeakSet

import pytest
import torch

from prism.engine.gpu.graph_memory import NUM_GRAPHS, take_graph_memory
from prism.types import Bytes, MiB
from tests.support.checkpoints import make_model, save

PROGRAM = """
import sys
from pathlib import Path

import torch

from prism.attention.gpu.products import Products, products_of
from prism.engine.gpu.graph_memory import NUMBERS, take_graph_memory
from prism.memory.cuda_calls import CudaCalls
from prism.modelspec import read_spec

wanted = products_of(read_spec(Path(sys.argv[1])))
products = Products(torch.cuda.Stream(), CudaCalls(), wanted, torch.bfloat16)
products.capture(NUMBERS)  # whose kernels are loaded
for _ in range(2):
    pieces = take_graph_memory(products)
    try:
        while True:
            next(pieces)
    except StopIteration as stop:
        print(stop.value)
"""


@pytest.mark.gpu
def test_the_driver_keeps_what_it_has_taken(tmp_path: Path) -> None:
    """In a process of its own: others have taken some."""
    path = save(make_model("llama").bfloat16(), tmp_path / "m")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(path)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    first, second = map(int, done.stdout.split())
    assert 10 * MiB <= first < 64 * MiB and second <= 2 * MiB


class Graph:
    """Made ready."""


class Products:
    """Counts what is captured, and its graphs: those that are there, and the most that were."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.num_captures = 0
        self.graphs: WeakSet[Graph] = WeakSet()
        self.most = 0

    def capture(self, numbers: Iterable[int]) -> Products:
        self.num_captures += 1
        return self

    def ready(self) -> Graph:
        self.graphs.add(graph := Graph())
        self.most = max(self.most, len(self.graphs))
        return graph


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> Any:
    """On a device of which each graph takes a MiB that the driver keeps."""
    made = Products()
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: ((100 - made.most) * MiB, 100 * MiB))
    return made


def result_of(taking: Generator[None, None, Bytes]) -> Bytes:
    try:
        while True:
            next(taking)
    except StopIteration as stop:
        return Bytes(stop.value)


def test_one_capture_serves_for_all_graphs(products: Any) -> None:
    """Each product that is captured waits for the interpreter, beside a busy loop 1.5 ms."""
    for expected in (NUM_GRAPHS * MiB, 0):  # what is kept is not taken again
        assert result_of(take_graph_memory(products)) == expected
        assert not products.graphs
    assert products.num_captures == 2
    assert products.most == NUM_GRAPHS, "all are there at a time, or one's memory serves the next"


def test_who_stops_half_way_keeps_no_graphs(products: Any) -> None:
    taking = take_graph_memory(products)
    for _ in range(3):
        next(taking)
    taking.close()
    assert not products.graphs
