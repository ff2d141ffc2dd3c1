"""The state of one choice of one request inside an engine."""

from __future__ import annotations

from dataclasses import InitVar, dataclass, field
from typing import TYPE_CHECKING

from prism.engine.kv_slab import ROOT_KEY, BlockKey, block_key
from prism.engine.randomness import stream
from prism.types import BlockId, Rank, RequestId, SamplingParams

if TYPE_CHECKING:
    from prism.engine.adjustment import Adjustment


@dataclass(slots=True, eq=False)
class Sequence:
    """Tokens of a choice and where their KV is.

    tokens   [ prompt ............. | output ........ ]( num_pending )
    KV       [ num_computed ........................ )

    A step is queued before the tokens of the step before it are known: `num_pending` are drawn by queued
    steps, and the KV is there once those have run.
    """

    request_id: RequestId
    choice: int
    prompt_len: int
    tokens: list[int]
    params: SamplingParams
    arrival: float
    """Rank: memory goes to the oldest first."""
    max_len: InitVar[int]
    """Context length of the model; see `limit`."""
    num_computed: int = 0
    num_pending: int = 0
    """Tokens that queued steps draw."""
    ready_until: int = 0
    """While `num_computed` is less, it is a decode that needs nothing but its turn: its block has room, and
    its next token is not the last. The scheduler keeps it; 0 is always right, and costs a closer look."""
    is_ended: bool = False
    """It is gone; what queued steps still draw for it is dropped."""
    slot: int | None = None
    """Its row in the lane's device tables while it has blocks."""
    num_tabled: int = 0
    """Blocks that the row knows."""
    is_token_placed: bool = False
    """The row knows its newest token."""
    num_cached: int = 0
    """Prompt tokens found in the prefix cache when the sequence was first scheduled."""
    blocks: list[BlockId] = field(default_factory=list)
    keys: list[BlockKey] = field(default_factory=list)
    """Keys of the full blocks of `tokens`, as far as they were needed."""
    num_published: int = 0
    is_started: bool = False
    is_again: bool = False
    """It has lost its blocks to others, and has not begun again."""
    counts: dict[int, int] = field(default_factory=dict)
    """Occurrences of each output token, kept where penalties may want them."""
    adjustment: Adjustment | None = None
    """Of its logits, once the first token has been drawn."""
    end: int = field(init=False)
    """Tokens, prompt included, with which the choice ends."""
    stops: frozenset[int] = field(init=False)
    """Tokens that end it."""
    random_stream: int = field(init=False)
    """Of its draws; see `randomness.stream`."""
    needs_history: bool = field(init=False)
    """Its draws need its earlier tokens on the host, or report more than a token."""

    def __post_init__(self, max_len: int) -> None:
        p = self.params
        self.limit(max_len)
        self.stops = frozenset(p.stop_token_ids)
        self.random_stream = stream(p.seed, self.choice)
        penalties = p.presence_penalty or p.frequency_penalty or p.repetition_penalty != 1.0
        self.needs_history = bool(penalties or p.logit_bias or p.min_tokens or p.logprobs is not None)

    def limit(self, max_len: int) -> None:
        """It ends with its model's longest context, or with `max_tokens`, whatever comes first."""
        self.end = min(max_len, self.prompt_len + self.params.max_tokens)
        self.ready_until = 0

    @property
    def rank(self) -> Rank:
        """Order in which sequences are served; unique."""
        return (self.arrival, self.request_id, self.choice)

    @property
    def num_output(self) -> int:
        """Output tokens so far, resumed ones included: the index of the next one."""
        return len(self.tokens) - self.prompt_len

    @property
    def num_total(self) -> int:
        """Tokens, those included that are on their way."""
        return len(self.tokens) + self.num_pending

    @property
    def num_missing(self) -> int:
        """Tokens whose KV must be computed before the next one can be drawn."""
        return len(self.tokens) + self.num_pending - self.num_computed

    @property
    def draw_index(self) -> int:
        """Index in the output of the token that the newest queued step draws."""
        return len(self.tokens) - self.prompt_len + self.num_pending - 1

    @property
    def needs_a_block(self) -> bool:
        """A decode that needs one more block, and nothing else but its turn."""
        return 0 < self.ready_until == self.num_computed < self.end - 1

    @property
    def can_step(self) -> bool:
        """Another step makes sense now.

        1. Not if the tokens on their way are the last ones.
        2. Without tokens on their way, always.
        3. Else only a decode whose draw needs none of them.
        """
        pending = self.num_pending
        if not pending:  # 2; tokens that are known are not the last ones, or it would have ended
            return True
        total = len(self.tokens) + pending
        if total >= self.end:  # 1
            return False
        return total - self.num_computed == 1 and not self.needs_history  # 3

    @property
    def is_prompt_computed(self) -> bool:
        """The whole prompt is in KV blocks."""
        return self.num_computed >= self.prompt_len

    def append(self, token: int) -> None:
        """A drawn token."""
        self.tokens.append(token)
        if self.needs_history:
            self.counts[token] = self.counts.get(token, 0) + 1

    def full_keys(self, tokens_per_block: int, num_tokens: int) -> list[BlockKey]:
        """Keys of the full blocks among the first `num_tokens` tokens."""
        wanted = num_tokens // tokens_per_block
        self.extend_keys(tokens_per_block, wanted)
        return self.keys[:wanted]

    def extend_keys(self, tokens_per_block: int, num_blocks: int) -> None:
        """Have so many keys at least."""
        while len(self.keys) < num_blocks:
            start = len(self.keys) * tokens_per_block
            parent = self.keys[-1] if self.keys else ROOT_KEY
            self.keys.append(block_key(parent, self.tokens[start : start + tokens_per_block]))
