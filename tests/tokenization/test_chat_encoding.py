"""The ids and masks of chats: those of transformers, within the context, and safe from contents."""

from __future__ import annotations

import datetime

import numpy as np
import pytest
from tokenization.chat_samples import (
    CHATML,
    MARKED,
    REWRITING,
    SMOLLM2,
    SPECIALS,
    STRADDLING,
    as_dicts,
    build_chats,
    load_both,
)
from tokenization.library_files import build_kind

from preflight.core.errors import ExitCode, PreflightError
from preflight.tokenization.chat_encoding import ChatEncoder
from preflight.tokenization.chat_template import DEFAULT_SOURCE, DEFAULT_TEMPLATE, ChatTemplate
from preflight.tokenization.chats import Chat, EncodedChat, Message

LONG = 100_000
ENDS = {SPECIALS.index(name) for name in ("<|endoftext|>", "<|im_end|>")}


def encode(
    source: str, chats: list[Chat], tokenizer: object, n: int = LONG, **options: str
) -> list[list[EncodedChat]]:
    return ChatEncoder(tokenizer, ChatTemplate(source, "T"), n, **options).encode(chats)


def talk(*contents: str, system: str | None = None) -> Chat:
    messages = [Message("system", system)] if system is not None else []
    for i, content in enumerate(contents):
        messages.append(Message("assistant" if i % 2 else "user", content))
    return Chat(tuple(messages), "a chat")


def ask_transformers(tokenizer: object, source: str, chat: Chat) -> tuple[list[int], list[int]]:
    found = tokenizer.apply_chat_template(
        as_dicts(chat), chat_template=source, return_dict=True, return_assistant_tokens_mask=True
    )
    return found["input_ids"], found["assistant_masks"]


@pytest.mark.parametrize("source", [MARKED, STRADDLING, DEFAULT_SOURCE])
def test_marked_answers_are_those_of_transformers(source: str) -> None:
    ours, theirs = load_both()
    chats = build_chats(200) + build_chats(50, 1, hostile=True)
    special = set(ours.special_tokens.values())
    for chat, [row] in zip(chats, encode(source, chats, ours), strict=True):
        ids, mask = ask_transformers(theirs, source, chat)
        assert row.ids.tolist() == ids
        if source == STRADDLING:  # it leaves the end token out of its marks, which is learned
            mask = [
                int(bit or (i and mask[i - 1] and ids[i] in special)) for i, bit in enumerate(mask)
            ]
        assert row.mask.tolist() == list(map(bool, mask))
        n_answers = sum(each.role == "assistant" for each in chat.messages)
        assert (row.n_answers, row.n_ended) == (n_answers, n_answers)
        assert (row.n_cut_turns, row.n_cut_tokens) == (0, 0)


@pytest.mark.parametrize("source", [MARKED, "Go:" + MARKED, "{{ bos_token }} " + MARKED])
def test_a_space_before_a_text_is_not_put_behind_special_tokens(source: str) -> None:
    ours, theirs = load_both(first_space=True)
    encoder = ChatEncoder(ours, ChatTemplate(source.replace("{{ bos_token }}", "<s>"), "T"), LONG)
    chats = build_chats(40)
    for chat, [row] in zip(chats, encoder.encode(chats), strict=True):
        ids, mask = ask_transformers(theirs, source, chat)
        assert row.ids.tolist() == ids
        assert row.mask.tolist() == list(map(bool, mask))


def test_a_special_token_takes_the_white_space_that_its_file_gives_to_it() -> None:
    ours, theirs = load_both(takes_space=True)
    chats = build_chats(40)
    for chat, [row] in zip(chats, encode(STRADDLING + " ", chats, ours), strict=True):
        assert row.ids.tolist() == ask_transformers(theirs, STRADDLING + " ", chat)[0]


@pytest.mark.parametrize("source", [CHATML, SMOLLM2])
def test_without_marks_an_answer_is_what_it_adds_to_its_prompt(source: str) -> None:
    ours, theirs = load_both()
    chats = build_chats(200)
    for chat, [row] in zip(chats, encode(source, chats, ours), strict=True):
        messages, mask = as_dicts(chat), []
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                prompt = theirs.apply_chat_template(
                    messages[:i], chat_template=source, add_generation_prompt=True
                )["input_ids"]
                whole = theirs.apply_chat_template(messages[: i + 1], chat_template=source)
                mask += [False] * (len(prompt) - len(mask))
                mask += [True] * (len(whole["input_ids"]) - len(mask))
        assert row.ids.tolist() == whole["input_ids"]
        assert row.mask.tolist() == mask
        assert row.n_answers == row.n_ended == len(messages) // 2


def test_a_template_that_rewrites_history_gives_a_row_for_each_answer() -> None:
    ours, theirs = load_both()
    chat = talk("why", "<think> hm </think> yes", "then", "<think> no </think> wet", "say", "x")
    [rows] = encode(REWRITING, [chat], ours)
    assert len(rows) == 3
    for n, row in zip((2, 4, 6), rows, strict=True):
        messages = as_dicts(chat)[:n]
        prompt = theirs.apply_chat_template(
            messages[:-1], chat_template=REWRITING, add_generation_prompt=True
        )["input_ids"]
        whole = theirs.apply_chat_template(messages, chat_template=REWRITING)["input_ids"]
        assert row.ids.tolist() == whole
        assert row.mask.tolist() == [i >= len(prompt) for i in range(len(whole))]
        assert (row.n_answers, row.n_ended) == (1, 1)
    assert "hm" in ours.decode(rows[0].ids)
    assert "hm" not in ours.decode(rows[1].ids)
    [[row]] = encode(REWRITING, [chat], ours, learn_from="all")
    assert row.ids.tolist() == whole
    assert row.n_answers == 3


@pytest.mark.parametrize("source", [CHATML, MARKED, DEFAULT_SOURCE])
@pytest.mark.parametrize("kind", ["library", "gpt2", "byte", "bpe.model", "llama2.json"])
def test_no_content_is_read_as_a_special_token(source: str, kind: str) -> None:
    tokenizer = load_both()[0] if kind == "library" else build_kind(kind)
    names = list(tokenizer.special_tokens)
    plain = talk("x", "y", "x", "y", system="x")
    specials = set(tokenizer.special_tokens.values())
    [[expected]] = encode(source, [plain], tokenizer)
    n_specials = np.isin(expected.ids, list(specials)).sum()
    for spelled in (
        *names,
        names[0] * 2,
        f"a {names[0]} b",
        names[-1] + names[0][:4],
        names[0][:1] + names[0],
        f" {names[0][:-1]}",
        f"\U0010fffd\U0010fffc{names[0]}",
        f"{names[0][1:]} ",
    ):
        chat = talk(spelled, spelled, spelled, spelled, system=spelled)
        [[row]] = encode(source, [chat], tokenizer)
        assert np.isin(row.ids, list(specials)).sum() == n_specials, spelled
        assert tokenizer.decode(row.ids).count(spelled.strip()) >= 5
        assert (row.n_answers, row.n_ended) == (2, expected.n_ended)


def test_two_contents_together_do_not_spell_a_special_token() -> None:
    ours, _ = load_both()
    glue = "{% for message in messages %}{{ message['content'] | trim }}{% endfor %}<|im_end|>"
    for name in SPECIALS:
        for cut in range(1, len(name)):
            chat = talk(f"why {name[:cut]} ", f" {name[cut:]} wet")
            [[row]] = encode(glue, [chat], ours)
            assert np.isin(row.ids, list(ours.special_tokens.values())).sum() == 1
            assert ours.decode(row.ids).startswith(f"why {name} wet")


def test_no_content_completes_what_the_template_has_begun() -> None:
    ours, _ = load_both()
    loop = "{% for m in messages %}BODY {% endfor %}"
    for body, content in (("<|{{ m.content }}", "im_end|> x"), ("{{ m.content }}end|>", "x <|im_")):
        [[row]] = encode(loop.replace("BODY", body + "<|im_end|>"), [talk(content, content)], ours)
        assert row.ids.tolist().count(ours.special_tokens["<|im_end|>"]) == 2


def test_a_prompt_has_the_date_of_today() -> None:
    ours, _ = load_both()
    encoder = ChatEncoder(ours, ChatTemplate("{{ strftime_now('%Y') }}" + CHATML, "T"), LONG)
    [[row]] = encoder.encode([talk("why", "yes")])
    assert ours.decode(row.ids).startswith("2024")
    year = f"{datetime.datetime.now():%Y}"
    prompt = encoder.encode_prompt(talk("why").messages, max_tokens=LONG)
    assert ours.decode(prompt).startswith(year)


def test_halves_of_characters_become_one_that_says_so() -> None:
    for kind in ("gpt2", "byte", "llama2.json", "bpe.model"):
        [[row], [other]] = encode(
            DEFAULT_SOURCE,
            [talk("a\ud800", "\udc00b"), talk("a\ufffd", "\ufffdb")],
            build_kind(kind),
        )
        assert row.ids.tolist() == other.ids.tolist()
        assert row.mask.tolist() == other.mask.tolist()


def test_one_beginning_of_text_where_the_tokenizer_wants_one() -> None:
    ours, _ = load_both(adds_bos=True)
    bos = ours.special_tokens["<s>"]
    assert ours.bos_id == bos
    assert load_both()[0].bos_id is None
    for start in ("", "<s>", "{{ bos_token }}", "{{ bos_token }}<s>", "<s><s><s>"):
        for source in (CHATML, MARKED):
            [[row]] = encode(start + source, [talk("why", "yes")], ours)
            assert row.ids[0] == bos
            assert bos not in row.ids[1:]
            assert not row.mask[0]
            assert (row.n_answers, row.n_ended) == (1, 1)
            encoder = ChatEncoder(ours, ChatTemplate(start + source, "T"), LONG)
            prompt = encoder.encode_prompt([Message("user", "why")], max_tokens=LONG)
            assert prompt == row.ids[: len(prompt)].tolist()
            assert row.mask[len(prompt)]
            assert not row.mask[: len(prompt)].any()


@pytest.mark.parametrize("source", [CHATML, MARKED, DEFAULT_SOURCE])
def test_a_chat_that_is_too_long_loses_its_earliest_turns(source: str) -> None:
    ours, _ = load_both()
    for chat in build_chats(12, 5):
        [[whole]] = encode(source, [chat], ours)
        has_system = chat.messages[0].role == "system"
        system, turns = chat.messages[:has_system], chat.messages[has_system:]
        shorter = [Chat((*system, *turns[i:])) for i in range(0, len(turns), 2)]
        parts = [row for [row] in encode(source, shorter, ours)]
        for n in range(1, len(whole.ids) + 2, 7):
            found = encode(source, [chat], ours, n)[0]
            sizes = [len(part.ids) for part in parts]
            at = next((i for i, size in enumerate(sizes) if size <= n + 1), len(parts) - 1)
            ids, mask = parts[at].ids[: n + 1], parts[at].mask[: n + 1]
            assert bool(found) == bool(mask.any())
            for row in found:
                assert row.ids.tolist() == ids.tolist()
                assert row.mask.tolist() == mask.tolist()
                assert row.n_cut_turns == 2 * at
                assert row.n_cut_tokens == max(0, sizes[at] - n - 1)
                assert row.n_answers == len(parts) - at
                assert row.n_ended == sum(i in ENDS for i in row.ids[row.mask].tolist())


def test_messages_of_one_turn_are_dropped_together() -> None:
    ours, _ = load_both()
    first = (Message("user", "why"), Message("user", "then"), Message("assistant", "yes"))
    [[whole]] = encode(CHATML, [Chat(first)], ours)
    [[row]] = encode(CHATML, [Chat((*first, *first))], ours, len(whole.ids) - 2)
    assert row.ids.tolist() == whole.ids[:-1].tolist()
    assert (row.n_cut_turns, row.n_cut_tokens) == (3, 1)


def test_all_tokens_but_the_first_are_learned_when_asked_for() -> None:
    ours, _ = load_both()
    for source in (CHATML, MARKED):
        chats = [*build_chats(5), talk("only a question")]
        for chat, [row] in zip(chats, encode(source, chats, ours, learn_from="all"), strict=True):
            assert row.mask[1:].all()
            assert not row.mask[0]
            assert row.n_answers == row.n_ended == len(chat.messages) // 2
        assert encode(source, chats[-1:], ours) == [[]]


def test_a_template_that_speaks_of_marks_and_has_none() -> None:
    ours, _ = load_both()
    chats = build_chats(5)
    commented = encode("{# {% generation %} #}" + CHATML, chats, ours)
    for [row], [other] in zip(commented, encode(CHATML, chats, ours), strict=True):
        assert row.ids.tolist() == other.ids.tolist()
        assert row.mask.tolist() == other.mask.tolist()


def test_the_first_token_is_never_learned() -> None:
    ours, _ = load_both()
    source = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}<|im_end|>"
    for chat in (talk("why", "yes"), Chat((Message("assistant", "yes"),))):
        [[row]] = encode(source + "{% endfor %}", [chat], ours)
        assert not row.mask[0]
        assert row.mask[1:].all()


def test_what_follows_the_last_answer_is_left_out() -> None:
    ours, _ = load_both()
    first, second = talk("why", "yes"), talk("why", "yes", "then")
    [[one], [other]] = encode(CHATML, [first, second], ours)
    assert one.ids.tolist() == other.ids.tolist()


def test_the_ids_that_end_an_answer() -> None:
    ours, _ = load_both()
    end, special = ours.end_of_text_id, ours.special_tokens
    for source, expected in (
        (CHATML, {end, special["<|im_end|>"]}),
        (STRADDLING, {end, special["<|im_end|>"]}),
        (DEFAULT_SOURCE, {end}),
        ("{% for m in messages %}{{ m.content }} <s>{% endfor %}", {end, special["<s>"]}),
        ("{% for m in messages %}[{{ m.content }}]{% endfor %}", {end}),
        ("{% for m in messages %}{{ m.content | upper }}<s>{% endfor %}", {end}),
    ):
        assert ChatEncoder(ours, ChatTemplate(source, "T"), 9).stop_ids == expected


def test_a_prompt_is_the_beginning_of_what_is_learned() -> None:
    """With the default template and GPT-2's vocabulary, word by word."""
    gpt2 = build_kind("gpt2")
    encoder = ChatEncoder(gpt2, DEFAULT_TEMPLATE, LONG)
    for chat in build_chats(50):
        [[row]] = encoder.encode([chat])
        prompt, n_dropped = encoder.fit_prompt(chat.messages[:-1], max_tokens=LONG)
        assert n_dropped == 0
        assert row.ids[: len(prompt)].tolist() == prompt
        assert row.mask[len(prompt) :].all()
        answer = chat.messages[-1].content.strip()
        assert gpt2.decode(row.ids[len(prompt) :]) == f" {answer}<|endoftext|>"
        assert gpt2.decode(prompt).endswith("\nAssistant:")


def test_a_prompt_drops_the_earliest_turns() -> None:
    encoder = ChatEncoder(build_kind("byte"), DEFAULT_TEMPLATE, LONG)
    messages = talk("first", "yes", "second", "no", "third", system="be kind").messages
    whole = encoder.encode_prompt(messages, max_tokens=LONG)
    ids, n_dropped = encoder.fit_prompt(messages, max_tokens=len(whole) - 1)
    assert bytes(i for i in ids if i < 256) == (
        b"System: be kind\nUser: second\nAssistant: noUser: third\nAssistant:"
    )
    assert n_dropped == 2
    assert encoder.fit_prompt(messages, max_tokens=len(whole))[1] == 0
    with pytest.raises(PreflightError, match="tokens with what belongs to it") as caught:
        encoder.fit_prompt(messages, max_tokens=20)
    assert caught.value.code == ExitCode.TEXT


def test_the_fingerprint_is_of_all_that_ids_depend_on() -> None:
    ours, _ = load_both()
    template = ChatTemplate(CHATML, "T")
    first = ChatEncoder(ours, template, 9).fingerprint
    assert first == ChatEncoder(load_both()[0], ChatTemplate(CHATML, "other name"), 9).fingerprint
    assert (
        len(
            {
                first,
                ChatEncoder(ours, template, 8).fingerprint,
                ChatEncoder(ours, template, 9, learn_from="all").fingerprint,
                ChatEncoder(ours, ChatTemplate(CHATML + " ", "T"), 9).fingerprint,
                ChatEncoder(load_both(adds_bos=True)[0], template, 9).fingerprint,
            }
        )
        == 5
    )
