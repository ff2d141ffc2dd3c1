"""A byte-level tokenizer without merges: a token per UTF-8 byte, whose id is the byte.

It has the two chat dialects that most open models speak, so that demo models exercise what real ones
do: Llama 3's, whose template writes the begin-of-text token that its tokenizer adds too, and ChatML,
which has no such token.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

VOCAB_SIZE = 264
"""256 bytes and 5 special tokens at most, padded to a multiple of 8 as real models pad theirs."""

_CHECK_ROLE = (
    "{% if message.role not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('Unknown role: ' + message.role) }}{% endif %}"
)
_CHATML_TEMPLATE = (
    "{% for message in messages %}"
    + _CHECK_ROLE
    + "{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_LLAMA_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    + _CHECK_ROLE
    + "{{ '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n'"
    " + message.content + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Dialect:
    """The special tokens of a family of models and how they frame a conversation."""

    template: str
    special_tokens: tuple[str, ...]
    end_of_turn: str
    end_of_text: str
    begin_of_text: str | None = None

    def token_id(self, special_token: str) -> int:
        """Special tokens follow the bytes, in order."""
        return 256 + self.special_tokens.index(special_token)

    @property
    def bos_token_id(self) -> int | None:
        """The token that every text begins with, if there is one."""
        return None if self.begin_of_text is None else self.token_id(self.begin_of_text)

    @property
    def eos_token_ids(self) -> list[int]:
        """The tokens that end an answer; models are trained to give the first."""
        return [self.token_id(self.end_of_turn), self.token_id(self.end_of_text)]


CHATML = Dialect(
    template=_CHATML_TEMPLATE,
    special_tokens=("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    end_of_turn="<|im_end|>",
    end_of_text="<|endoftext|>",
)
LLAMA = Dialect(
    template=_LLAMA_TEMPLATE,
    special_tokens=(
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
    ),
    end_of_turn="<|eot_id|>",
    end_of_text="<|end_of_text|>",
    begin_of_text="<|begin_of_text|>",
)


def build_tokenizer(dialect: Dialect, max_length: int) -> PreTrainedTokenizerFast:
    """The tokenizer of a dialect, ready to be saved next to a model."""
    tokenizer = Tokenizer(models.BPE(vocab=_byte_vocabulary(), merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(_never_stripped(dialect.special_tokens))
    if dialect.begin_of_text is not None:
        bos = dialect.begin_of_text
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A",
            pair=f"{bos} $A {bos} $B",
            special_tokens=[(bos, dialect.token_id(bos))],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=dialect.begin_of_text,
        eos_token=dialect.end_of_turn,
        pad_token=dialect.end_of_text,
        chat_template=dialect.template,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )


def _never_stripped(tokens: Sequence[str]) -> list[AddedToken]:
    return [AddedToken(token, special=True, normalized=False) for token in tokens]


def _byte_vocabulary() -> dict[str, int]:
    """From the printable character that stands for a byte in a byte-level tokenizer to the byte."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + index): byte for index, byte in enumerate(others)
    }
