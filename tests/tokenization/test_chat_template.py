"""Chat templates: what they write is what transformers writes; hostile ones end in an error."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
from tokenization.chat_samples import (
    CHATML,
    MARKED,
    REWRITING,
    SMOLLM2,
    STRADDLING,
    as_dicts,
    build_chats,
)
from transformers.utils.chat_template_utils import render_jinja_template

from preflight.core.errors import ExitCode, PreflightError
from preflight.tokenization.chat_template import (
    DEFAULT_SOURCE,
    DEFAULT_TEMPLATE,
    ChatTemplate,
    load_chat_template,
    parse_chat_template,
)
from preflight.tokenization.chats import Chat, Message
from preflight.tokenization.template_process import Rendering, RenderJob, TemplateProcess

PROCESS = TemplateProcess()
VARIABLES = {"bos_token": "<s>", "eos_token": "</s>"}
TALK = Chat((Message("user", "hi"), Message("assistant", "yes")), "chats.jsonl, line 7")
# Jinja as published templates use it: whitespace control, loop controls, JSON, name spaces, macros.
UNUSUAL = """\
{{- bos_token }}
    {%- set ns = namespace(n=0, first='') %}
{%- macro tag(name) %}[{{ name | upper }}]{% endmacro %}
{% for message in messages %}
    {% if message.role == 'system' %}
        {% continue %}
    {% endif %}
    {% set ns.n = ns.n + 1 %}
{{ tag(message['role']) }} {{ message.content | trim | tojson }}{{ {'a': [ns.n, none]} | tojson }}
    {% if ns.n > 6 %}{% break %}{% endif %}
    {# a comment #}
{% endfor %}
{{ ns.n }}{{ messages[-1]['content'][:3] }}{{ tools is none }}{{ nothing is defined }}
{%- if add_generation_prompt %}{{ '[ASSISTANT]' }}{% endif %}
{{ dict(a=1) | length }}{{ eos_token }}
"""


def render(
    source: str, *chats: Chat, process: TemplateProcess = PROCESS, **options: object
) -> list[Rendering]:
    jobs = [RenderJob(chat.messages, chat.place, **options) for chat in chats]
    with process.rendering(ChatTemplate(source, "the template"), VARIABLES, jobs) as found:
        return list(found)


@pytest.mark.parametrize(
    "source", [CHATML, SMOLLM2, MARKED, STRADDLING, REWRITING, DEFAULT_SOURCE, UNUSUAL]
)
def test_texts_and_spans_are_those_of_transformers(source: str) -> None:
    chats = build_chats(60) + build_chats(60, 1, hostile=True)
    for prompt in (False, True):
        texts, spans = render_jinja_template(
            [as_dicts(chat) for chat in chats],
            chat_template=source,
            return_assistant_tokens_mask=True,
            add_generation_prompt=prompt,
            **VARIABLES,
        )
        found = render(source, *chats, prompt=prompt)
        assert [each.text for each in found] == texts
        assert [each.spans for each in found] == spans


def test_no_content_forges_the_marks_of_an_answer() -> None:
    [plain] = render(MARKED, TALK)
    spelled = "{% generation %}a{% endgeneration %}{{ eos_token }}\ue000" + "0" * 32 + "b\ue001"
    chat = Chat((Message("user", spelled), Message("assistant", "yes")))
    [found] = render(MARKED, chat)
    assert spelled in found.text
    assert [found.text[a:b] for a, b in found.spans] == [plain.text[a:b] for a, b in plain.spans]


def test_marks_within_marks_are_one_answer() -> None:
    opened, closed = "{% generation %}", "{% endgeneration %}"
    [found] = render(f"x{opened}a{opened}b{closed}c{closed}{opened}d{closed}", TALK)
    assert found.text == "xabcd"
    assert found.spans == [(1, 4), (4, 5)]


HOSTILE = {
    "multiplied text": ("{{ 'a' * 10**10 }}", "MemoryError"),
    "multiplied list": ("{{ [1] * 10**10 }}", "MemoryError"),
    "nested loops": (
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "1 s or 512 MiB",
    ),
    "long loop": ("{% for i in range(99999) %}aaaaaaaa{% endfor %}", "more than"),
    "too long a range": ("{% for i in range(10**9) %}{% endfor %}", "Range too big"),
    "doubling": (
        "{% set ns = namespace(a='a') %}{% for i in range(99) %}{% set ns.a = ns.a ~ ns.a %}"
        "{% endfor %}",
        "M",  # MemoryError, or on a busy machine the limit of time first: 1 s or 512 MiB
    ),
    "large number": ("{{ (10 ** (10 ** 9)) % 7 }}", "1 s or 512 MiB"),
    "padding": ("{{ 'a'.ljust(10**11) }}{{ '%09999999999d' % 1 }}", "MemoryError"),
    "class": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "SecurityError"),
    "globals": ("{{ cycler.__init__.__globals__ }}", "SecurityError"),
    "own globals": ("{{ raise_exception.__globals__.os }}", "SecurityError"),
    "lambda's code": ("{{ strftime_now.__code__.co_code }}", "SecurityError"),
    "format": ("{{ '{0.__class__.__mro__}'.format(1) }}", "SecurityError"),
    "name space": ("{% set ns = namespace() %}{% set ns.__class__ = 1 %}", "SecurityError"),
    "attr": ("{{ ('' | attr('__class__')).__mro__ }}", "SecurityError"),
    "changed chat": ("{{ messages.append(1) }}", "SecurityError"),
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    "files": ("{% include '/etc/passwd' %}", "no loader"),
    "deep source": ("{{ " + "(" * 30_000, "RecursionError"),
    "constant": ("{% if 9 ** (9 ** (9 ** 2)) %}{% endif %}", "1 s or 512 MiB"),
    "syntax": ("{% for %}", "TemplateSyntaxError"),
    "unknown name": ("{{ nothing.at.all }}", "undefined"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_ends_in_an_error(name: str) -> None:
    source, reason = HOSTILE[name]
    began = time.monotonic()
    with pytest.raises(PreflightError) as caught:
        render(source, TALK)
    assert time.monotonic() - began < 60  # a second of work, on a machine that is busy
    assert caught.value.code == ExitCode.FLAGS
    assert "the template does not work at chats.jsonl, line 7" in caught.value.lines[0]
    assert reason in caught.value.lines[0]
    assert render("{{ messages[0].content }}", TALK)[0].text == "hi"  # the next one works


def test_a_fault_in_one_chat_of_many_names_it() -> None:
    source = "{% if messages|length > 2 %}" + HOSTILE["nested loops"][0] + "{% endif %}"
    chats = [TALK, TALK, Chat((*TALK.messages, *TALK.messages), "line 9"), TALK]
    with pytest.raises(PreflightError, match="line 9"):
        render(source, *chats)


def test_a_chat_that_the_template_refuses_is_named() -> None:
    source = "{% if messages[0].role != 'system' %}{{ raise_exception('no system') }}{% endif %}"
    with pytest.raises(PreflightError) as caught:
        render(source, TALK)
    assert caught.value.code == ExitCode.TEXT
    assert "line 7: the template refuses it: no system" in caught.value.lines[0]


def test_a_chat_of_many_turns() -> None:
    chat = Chat(tuple(Message(("user", "assistant")[i % 2], f"x{i}") for i in range(30_000)))
    [found] = render(MARKED, chat)
    assert len(found.spans) == 15_000
    with pytest.raises(PreflightError, match="1 s or 512 MiB"):
        render("{% for a in messages %}{% for b in messages %}{% endfor %}{% endfor %}", chat)


def test_the_day_is_fixed_in_training_and_todays_in_a_conversation() -> None:
    source = "{{ strftime_now('%Y-%m-%d') }}"
    assert render(source, TALK)[0].text == "2024-07-26"
    jobs = [RenderJob(TALK.messages)]
    before = time.strftime("%Y-%m-%d")
    with PROCESS.rendering(ChatTemplate(source, "T"), {}, jobs, today=True) as found:
        [today] = found
    assert today.text in (before, time.strftime("%Y-%m-%d"))


def test_a_process_that_was_killed_is_started_again() -> None:
    process = TemplateProcess()
    render(CHATML, TALK, process=process)
    process._process.kill()
    process._process.join()
    with pytest.raises(PreflightError):
        render(CHATML, TALK, process=process)
    assert render(CHATML, TALK, process=process) == render(CHATML, TALK)
    process._end()


def test_a_reader_that_stops_half_way_leaves_nothing_behind() -> None:
    jobs = [RenderJob(chat.messages) for chat in build_chats(50)]
    with PROCESS.rendering(ChatTemplate(CHATML, "T"), {}, jobs) as found:
        next(found)
    assert render("{{ messages[0].content }}", TALK)[0].text == "hi"


def test_the_default_template() -> None:
    asked = (Message("system", "be kind "), Message("user", "\thi"), Message("assistant", " yes\n"))
    chat = Chat((*asked, Message("user", "why")))
    [found] = render(DEFAULT_SOURCE, chat, prompt=True)
    assert found.text == "System: be kind\nUser: hi\nAssistant: yes</s>User: why\nAssistant:"
    assert [found.text[a:b] for a, b in found.spans] == [" yes</s>"]
    assert DEFAULT_TEMPLATE.source == DEFAULT_SOURCE


def test_files_of_templates(tmp_path: Path) -> None:
    good = tmp_path / "good.jinja"
    good.write_text(CHATML, encoding="utf-8")
    (tmp_path / "link.jinja").symlink_to(good)
    for name in ("good.jinja", "link.jinja"):
        template = load_chat_template(str(tmp_path / name))
        assert template.source == CHATML
        assert template.code == ExitCode.FLAGS
        assert template.fingerprint == ChatTemplate(CHATML, "").fingerprint
    (tmp_path / "large").write_bytes(b"x" * (2**16 + 1))
    (tmp_path / "empty").write_bytes(b" \n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    os.mkfifo(tmp_path / "pipe")
    for name, reason in {
        "large": "larger than 64 KiB",
        "empty": "empty",
        "binary": "not UTF-8",
        "absent": "No such file",
        "pipe": "",
        ".": "",
        "nul\0": "",
    }.items():
        with pytest.raises(PreflightError) as caught:
            load_chat_template(str(tmp_path / name))
        assert caught.value.code == ExitCode.FLAGS
        assert "--chat-template" in caught.value.lines[0]
        assert reason in caught.value.lines[0]
    with pytest.raises(PreflightError) as caught:
        parse_chat_template(b"\xff", "a checkpoint", ExitCode.CHECKPOINT)
    assert caught.value.code == ExitCode.CHECKPOINT
    assert json.loads(json.dumps(caught.value.lines))[0].startswith("a checkpoint: not UTF-8")
