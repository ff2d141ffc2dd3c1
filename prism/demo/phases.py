"""What the demo's users do, phase by phase.

    alone      each model by itself: it is loaded when it is first asked
    together   conversations with all of them at once
    burst      more and more chats with one model: it takes the others' caches, then their weights
    return     the others are asked again: they come back, and the one gives up cache

Every answer is compared with what transformers answers.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from prism.demo.plan import Plan
from prism.demo.traffic import Users, burst_turns

SETTLE_SECONDS = 1.3
"""A little more than the second between two reports of a worker: so that each phase's end is seen."""
NUM_CONVERSATIONS = 4
NUM_STAGES = 4
STAGE_SECONDS = 2.5


async def talk(users: Users, plan: Plan, begin: Callable[[str], None]) -> None:
    """All phases; `begin` is told the title of each."""
    begin("alone: one model after the other")
    for name in plan.names:
        await users.chat_at_once("alone", [name], 1)
    await asyncio.sleep(SETTLE_SECONDS)
    begin("together: conversations with all of them at once")
    await users.chat_at_once("together", plan.names, NUM_CONVERSATIONS)
    await asyncio.sleep(SETTLE_SECONDS)
    await _burst(users, plan, begin)
    await asyncio.sleep(SETTLE_SECONDS)
    begin(f"return: {' and '.join(plan.others)} are asked again")
    for name in (*plan.others, plan.bursting.name):
        await users.chat_at_once("return", [name], NUM_CONVERSATIONS)
        await asyncio.sleep(SETTLE_SECONDS)


async def _burst(users: Users, plan: Plan, begin: Callable[[str], None]) -> None:
    """Users come in groups and stay to the end, so memory moves step by step."""
    model, num_users = plan.bursting.name, plan.burst_chats
    deadline = time.monotonic() + NUM_STAGES * STAGE_SECONDS
    async with asyncio.TaskGroup() as group:
        for stage in range(NUM_STAGES):
            present, wanted = (num_users * step // NUM_STAGES for step in (stage, stage + 1))
            begin(f"burst: {wanted} chats at once with {model}")
            for user in range(present, wanted):
                turns = burst_turns(model, user, num_users)
                group.create_task(users.ask_until("burst", model, turns, deadline))
            await asyncio.sleep(STAGE_SECONDS)
