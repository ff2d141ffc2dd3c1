"""`prism demo`: a server with three small models on the CPU, on memory that does not hold all of them.

plan -> server -> users talk (phases) while the admin endpoint is watched and shown -> summary, verdict
"""

from __future__ import annotations

import asyncio
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console

from prism.demo.display import Display, Progress, open_display
from prism.demo.phases import talk
from prism.demo.plan import SLAB, make_plan, write_config
from prism.demo.samples import Sample
from prism.demo.server import DemoError, DemoServer, free_port
from prism.demo.summary import Run, describe, problems
from prism.demo.traffic import Users, open_client
from prism.demo.watch import Watcher
from prism.types import MiB

INTERRUPTED = 130
MAX_PROBLEMS = 10


def run_demo(*, port: int, keep: bool) -> int:
    """Run everything and print what was seen; the exit status."""
    if not 0 <= port < 2**16:
        print(f"error: {port} is no port", file=sys.stderr)
        return 2
    folder = Path(tempfile.mkdtemp(prefix="prism-demo-"))
    status = asyncio.run(Show(folder, port or free_port(), keep).run())
    if status in (0, INTERRUPTED):
        shutil.rmtree(folder, ignore_errors=True)
    return status


class Show:
    """One run of the demo."""

    def __init__(self, folder: Path, port: int, keep: bool) -> None:
        self._console = Console()
        self._plan = make_plan()
        self._keep = keep
        self._title = ""
        self._start = time.monotonic()
        admin_port = free_port()
        config = folder / "demo.yaml"
        write_config(self._plan, config, port, admin_port)
        self._server = DemoServer(config, folder / "server.log", port, admin_port)

    async def run(self) -> int:
        """Serve, talk, stop. A signal ends it early, and the server with it."""
        work = asyncio.create_task(self._serve_and_talk())
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            asyncio.get_running_loop().add_signal_handler(number, work.cancel)
        try:
            status = await work
        except asyncio.CancelledError:
            self._say("interrupted")
            status = INTERRUPTED
        except DemoError as error:
            self._say(f"error: {error}\n{self._server.log_tail()}")
            status = 1
        return self._end(status)

    async def _serve_and_talk(self) -> int:
        async with self._server as server:
            self._say(f"starting a server; its log is {server.log}")
            await server.until_healthy()
            self._introduce()
            async with open_client(server.url) as client:
                users = Users(client)
                with open_display(self._console) as display:
                    watcher = Watcher(server.admin_url, lambda sample: self._show(display, sample, users))
                    await self._talk_watched(users, watcher)
            status = self._judge(users, watcher)
            if self._keep:
                await self._go_on_serving()
        return status

    async def _talk_watched(self, users: Users, watcher: Watcher) -> None:
        """Until the users have done everything. Raises `DemoError` if the server ends before."""
        talking = asyncio.create_task(talk(users, self._plan, self._begin))
        watching = asyncio.create_task(watcher.run())
        ended = asyncio.create_task(self._server.ended())
        tasks = (talking, watching, ended)
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if ended.done():
                raise DemoError("the server ended by itself")
            (watching if watching.done() else talking).result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    # --- what is printed ------------------------------------------------------------------------------

    def _introduce(self) -> None:
        plan, seconds = self._plan, time.monotonic() - self._start
        wanted = plan.burst_chats * plan.bursting.chat_bytes / SLAB
        self._say(
            f"after {seconds:.1f} s it serves {', '.join(plan.names)} on {self._server.url}/v1\n"
            f"memory: {plan.num_slabs} slabs of {SLAB // MiB} MiB; the weights of all models take "
            f"{plan.weight_slabs}, and the KV of the burst alone wants {wanted:.0f}"
        )
        self._start = time.monotonic()

    def _begin(self, title: str) -> None:
        self._title = title

    def _show(self, display: Display, sample: Sample, users: Users) -> None:
        wrong = sum(answer.problem is not None for answer in users.answers)
        seconds = time.monotonic() - self._start
        display.show(sample, Progress(self._title, seconds, users.num_open, len(users.answers), wrong))

    def _judge(self, users: Users, watcher: Watcher) -> int:
        run = Run(self._plan, users.answers, watcher.samples, self._server.log.read_text(encoding="utf-8"))
        self._say("\n" + "\n".join(describe(run)))
        found = problems(run)
        for problem in found[:MAX_PROBLEMS]:
            self._say(f"problem: {problem}")
        if len(found) > MAX_PROBLEMS:
            self._say(f"and {len(found) - MAX_PROBLEMS} more problems")
        return 1 if found else 0

    async def _go_on_serving(self) -> None:
        """Until a signal comes or the server ends."""
        server, model = self._server, self._plan.names[0]
        self._say(
            f"\nIt goes on serving until Ctrl-C. Try:\n"
            f"  curl {server.url}/v1/models\n"
            f"  curl {server.url}/v1/chat/completions -H 'content-type: application/json' \\\n"
            f'    -d \'{{"model": "{model}", "messages": '
            f'[{{"role": "user", "content": "What is 17 + 25?"}}]}}\'\n'
            f"  prism ps --admin {server.admin_url}"
        )
        try:
            await server.ended()
        except asyncio.CancelledError:
            self._say("stopping")

    def _end(self, status: int) -> int:
        """The server must have ended well too."""
        server = self._server
        self._say(f"the server ended with status {server.status}")
        if server.status != 0:
            status = 1
        if status == 0:
            self._say("The demo saw all that it promises.")
        elif status != INTERRUPTED:
            self._say(f"The demo failed. The server's log: {server.log}")
        return status

    def _say(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)
