"""First code of every child process: ties its life to the agent's, then runs its role.

Usage: python -m prism.agent.child ROLE --run-dir DIR --name NAME --incarnation N --agent-pid PID
       [--listen-fd FD]
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import logging
import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NoReturn

from prism.config import Config
from prism.messages import Role

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int) -> None:
    """The kernel kills this process when the agent ends, however that happens."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(1)


def main() -> int:
    """Run one role until it ends.

    What the libraries have made by then is left out of garbage collections: with torch's objects a full one
    holds up a worker for 65 ms, without them for 2 ms.
    """
    arguments = _arguments()
    die_with_parent(arguments.agent_pid)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C reaches the whole group; the agent decides
    config = Config.model_validate_json((arguments.run_dir / "config.json").read_bytes())
    place = (arguments.run_dir, arguments.name, arguments.incarnation, config)
    run: Callable[[], int]
    match Role(arguments.role):
        case Role.GATEWAY:
            from prism.gateway.main import run as run_gateway

            run = partial(run_gateway, *place, listen_fd=arguments.listen_fd)
        case Role.CONTROLLER:
            from prism.controller.main import run as run_controller

            run = partial(run_controller, *place, listen_fd=arguments.listen_fd)
        case Role.WORKER:
            from prism.worker.main import run as run_worker

            run = partial(run_worker, *place)
    gc.freeze()
    return run()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("role", choices=[role.value for role in Role])
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--incarnation", type=int, required=True)
    parser.add_argument("--agent-pid", type=int, required=True)
    parser.add_argument("--listen-fd", type=int, default=-1)
    return parser.parse_args()


def end(status: int) -> NoReturn:
    """End the process here and now.

    Python's own way aborts it (SIGABRT) while a thread is in torch or in a compiler, as one is that loads a
    model or its kernels. Nothing is lost: gateways have said their last when they end, and the agent ends the
    others when nobody listens any more.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    end(main())
