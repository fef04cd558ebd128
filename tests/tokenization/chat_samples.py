"""Chats, templates and tokenizers that the tests of templates and of their encoding share."""

from __future__ import annotations

import functools
import random
import tempfile
from pathlib import Path

import tokenizers
from tokenization.hostile_texts import UNITS
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from preflight.tokenization import Tokenizer, load_tokenizer
from preflight.tokenization.chats import Chat, Message

WORDS = [*"ask the cat why rain is wet , then say yes ! 12 x = 1".split(), "caf\u00e9"]
WORDS += ["\u4f60\u597d", "\U0001f600"]
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "<|user|>"]

CHATML = (
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# With SmolLM2's own first lines: a system message of its own where the chat has none.
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are helpful<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "<|im_start|>assistant\n{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}\n"
    "{% else %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n'}}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# The marks' borders lie within tokens, and leave the end token out.
STRADDLING = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "A:{{ ' ' }}{% generation %}{{ message['content'] }}{% endgeneration %}<|im_end|>"
    "{% else %}Q: {{ message['content'] }} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}A:{% endif %}"
)
# As Qwen3 and DeepSeek: thoughts stay in the last answer alone.
REWRITING = (
    "{% for message in messages %}{% set content = message['content'] %}"
    "{% if message['role'] == 'assistant' and not loop.last and '</think>' in content %}"
    "{% set content = content.split('</think>')[-1] | trim %}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + content + '<|im_end|>\n'}}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@functools.cache
def build_library_file(
    *, adds_bos: bool = False, first_space: bool = False, takes_space: bool = False
) -> str:
    """A ``tokenizer.json`` with these special tokens, trained on a few words."""
    built = tokenizers.Tokenizer(models.BPE())
    if first_space:  # as Mistral's: a space before the text, and none after a special token
        built.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        built.decoder = decoders.Metaspace(prepend_scheme="first")
        alphabet = sorted({*"".join(WORDS), *"<|>/_:\u2581\n", *map(chr, range(33, 127))})
    else:
        built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        built.decoder = decoders.ByteLevel()
        built.post_processor = processors.ByteLevel(trim_offsets=False)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    draw = random.Random(3)
    text = [" ".join(draw.choices([*WORDS, "assistant", "user"], k=40)) for _ in range(200)]
    built.train_from_iterator(text, trainer)
    if takes_space:  # as Phi-3's
        built.add_special_tokens([tokenizers.AddedToken("<|im_end|>", lstrip=True, rstrip=True)])
    if adds_bos:
        built.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", built.token_to_id("<s>"))]
        )
    return built.to_str()


def load_both(**options: bool) -> tuple[Tokenizer, PreTrainedTokenizerFast]:
    """The same file, read by this program and by transformers."""
    content = build_library_file(**options)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.json"
        path.write_text(content, encoding="utf-8")
        ours = load_tokenizer.__wrapped__(str(path))  # the folder's name is no key to keep
    theirs = PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(content),
        eos_token="<|endoftext|>",
        bos_token="<s>",
    )
    return ours, theirs


def build_chats(n: int, seed: int = 0, *, hostile: bool = False) -> list[Chat]:
    """Chats of one to five exchanges; hostile ones hold half-characters, marks and white space."""
    draw = random.Random(seed)
    units = [unit for unit in UNITS if "<|" not in unit]  # special tokens have tests of their own

    def say() -> str:
        words = draw.choices([*WORDS, *units] if hostile else WORDS, k=draw.randrange(1, 12))
        return draw.choice(["", " ", "\n"]) + " ".join(words) + draw.choice(["", " ", "\n\n"])

    chats = []
    for number in range(n):
        messages = [Message("system", say())] if draw.random() < 0.4 else []
        for _ in range(draw.randrange(1, 6)):
            messages += [Message("user", say()), Message("assistant", say())]
        chats.append(Chat(tuple(messages), f"chats.jsonl, line {number + 1}"))
    return chats


def as_dicts(chat: Chat) -> list[dict[str, str]]:
    """The messages as other programs have them."""
    return [{"role": each.role, "content": each.content} for each in chat.messages]
