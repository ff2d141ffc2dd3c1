"""How the processes of a server end."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import threading
import torch
from prism.agent.child import end

def work():
    x = torch.ones(700, 700)
    while True:
        torch.mm(x, x)
        is_at_work.set()

is_at_work = threading.Event()
threading.Thread(target=work, daemon=True).start()
is_at_work.wait()
print("said", end="")
end(3)
"""


def test_a_thread_in_torch_does_not_abort_the_end() -> None:
    """Python's own end would be SIGABRT here."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (3, "said", "")
