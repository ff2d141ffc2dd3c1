"""Where the shipped demo models are, and the answers they must give."""

import json
from dataclasses import dataclass
from pathlib import Path

from prism.demo.tasks import TASKS, Message, Task, is_true

MODELS_DIR = Path(__file__).parent / "models"
GOLDEN_PATH = Path(__file__).parent / "golden.json"


@dataclass(frozen=True)
class GoldenAnswer:
    """What transformers answers greedily, in fp32, to a held-out conversation that ends with a question."""

    messages: tuple[Message, ...]
    num_prompt_tokens: int
    answer: str
    token_ids: tuple[int, ...]
    """Without the end-of-turn token, which every answer ends with."""
    margin: float
    """The least gap between the best and the second-best logit of any token, the end included."""

    def is_true(self, task: Task) -> bool:
        """Whether the last question of the conversation got the answer that is right."""
        return is_true(task, self.messages[-1]["content"], self.answer)


def demo_task(name: str) -> Task:
    """The task of the demo model of that name."""
    return {task.name: task for task in TASKS}[name]


def demo_model_path(name: str) -> Path:
    """The Hugging Face directory of the demo model of that name."""
    return MODELS_DIR / demo_task(name).name


def golden_answers(name: str) -> tuple[GoldenAnswer, ...]:
    """What the demo model of that name answers, single questions first, then conversations."""
    entries = json.loads(GOLDEN_PATH.read_text(encoding="utf-8"))[name]
    return tuple(
        GoldenAnswer(**entry | {"messages": tuple(entry["messages"]), "token_ids": tuple(entry["token_ids"])})
        for entry in entries
    )
