"""Memory for graphs that is taken ahead."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from prism.types import MiB
from tests.support.checkpoints import make_model, save

pytestmark = pytest.mark.gpu

PROGRAM = """
import sys
from pathlib import Path

import torch

from prism.attention.gpu.products import Products, products_of
from prism.engine.gpu.graph_memory import take_graph_memory
from prism.memory.cuda_calls import CudaCalls
from prism.modelspec import read_spec

wanted = products_of(read_spec(Path(sys.argv[1])))
products = Products(torch.cuda.Stream(), CudaCalls(), wanted, torch.bfloat16)
products.capture(range(8, 488, 8))  # whose kernels are loaded
for _ in range(2):
    pieces = take_graph_memory(products)
    try:
        while True:
            next(pieces)
    except StopIteration as stop:
        print(stop.value)
"""


def test_the_driver_keeps_what_it_has_taken(tmp_path: Path) -> None:
    """In a process of its own: others have taken some."""
    path = save(make_model("llama").bfloat16(), tmp_path / "m")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(path)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    first, second = map(int, done.stdout.split())
    assert 10 * MiB <= first < 64 * MiB and second <= 2 * MiB
