"""Test rendering.py: templates are as transformers renders them, and can neither read files nor run for ever."""

import os
import time

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from fuselm.models.chat import rendering
from fuselm.models.chat.rendering import TemplateFailure, TemplateRefusal, render

TALK = [{"role": "user", "content": "Hi, <b> & 'you' ✓"}, {"role": "assistant", "content": "Yes"}]
SAME = [
    "{% for m in messages %}{{ m.role | title }}: {{ m['content'] | tojson }}\n{% endfor %}",
    "{%- for m in messages -%}\n  {% if loop.first %}{% continue %}{% endif %}\n  {{ m.role | upper }}\n{%- endfor %}",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "{{ dict(a=1) | tojson(indent=2) }}{{ messages[-1].content.split('e')[-1] }}{{ messages[::-1][0].role }}",
    "{% macro f(x) %}<{{ x }}>{% endmacro %}{{ f('a') }}{{ bos_token }}{{ undefined_name }}\n\n",
    "{% if tools is none %}none{% endif %}{% for m in messages %}{{ m.content | trim }}{% break %}{% endfor %}",
]


@pytest.mark.parametrize("template", SAME)
def test_a_template_is_rendered_as_by_transformers(template):
    theirs, _ = render_jinja_template([TALK], chat_template=template, bos_token="<s>")
    assert render(template, [TALK], {"bos_token": "<s>", "tools": None}) == list(theirs)


def test_every_day_is_the_same_day():
    assert render("{{ strftime_now('%d %b %Y') }}", [TALK], {}) == ["26 Jul 2024"]


def test_marks_show_what_is_generated():
    template = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %};{% endfor %}"
    assert render(template, [TALK], {}) == ["Hi, <b> & 'you' ✓;Yes;"]
    assert render(template, [TALK], {}, marks=("[", "]")) == ["[Hi, <b> & 'you' ✓];[Yes];"]


def test_a_refusal_has_the_words_of_the_template_and_others_are_rendered():
    template = (
        "{% if messages | length == 1 %}{{ raise_exception('needs an answer') }}{% endif %}{{ messages[0].role }}"
    )
    refused, answered = render(template, [TALK[:1], TALK], {})
    assert isinstance(refused, TemplateRefusal) and str(refused) == "needs an answer"
    assert answered == "user"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% if %}", "Expected an expression, got 'end of statement block'"),
        ("{{ messages[0].nothing.more }}", "'dict object' has no attribute 'nothing'"),
        ("{% include '/etc/passwd' %}", "TypeError: no loader for this environment specified"),
        (
            "{{ ''.__class__.__mro__[1].__subclasses__() }}",
            "access to attribute '__class__' of 'str' object is unsafe.",
        ),
        ("{{ messages.append(1) }}", "access to attribute 'append' of 'list' object is unsafe."),
        ("{{ cycler.__init__.__globals__.os.popen('id').read() }}", "access to attribute '__init__'"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "OverflowError: Range too big"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    ],
)
def test_what_a_template_must_not_do_is_refused(template, reason):
    try:
        (refused,) = render(template, [TALK], {})
    except TemplateRefusal as error:
        refused = error
    assert isinstance(refused, TemplateRefusal) and str(refused).startswith(reason)
    assert render("{{ messages[0].role }}", [TALK], {}) == ["user"]


def test_a_template_that_does_not_end_is_ended():
    loop = "{% for i in range(99999) %}" * 4 + "{% endfor %}" * 4
    began = time.monotonic()
    with pytest.raises(TemplateFailure, match=r"^took longer than 0.5 seconds$"):
        render(loop, [TALK], {}, seconds=0.5)
    assert time.monotonic() - began < 20
    assert render("{{ messages[0].role }}", [TALK], {}) == ["user"]


@pytest.mark.parametrize(
    "template",
    [
        "{% set ns = namespace(s='a') %}{% for i in range(40) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s }}",
        "{{ 'a' * 10 ** 10 }}",
        "{% for i in range(99999) %}{{ 'a' * 9999 }}{% endfor %}",
    ],
)
def test_a_template_that_writes_too_much_is_refused(template):
    (refused,) = render(template, [TALK], {})
    assert isinstance(refused, TemplateRefusal) and "more than" in str(refused)
    assert render("{{ messages[0].role }}", [TALK], {}) == ["user"]


def test_the_process_that_renders_can_open_no_file():
    """Escape the sandbox on purpose, as an unknown hole of it might: the process's own limits hold."""
    render("{{ 1 }}", [TALK], {})
    pid = rendering._WORKER_PROCESS._process.pid
    with open(f"/proc/{pid}/limits") as file:
        limits = {line[:26].strip(): line[26:47].strip() for line in file}
    assert limits["Max open files"] == limits["Max file size"] == limits["Max processes"] == "0"
    assert len(os.listdir(f"/proc/{pid}/fd")) <= 3


def test_a_forked_process_renders_with_a_process_of_its_own():
    assert render("{{ messages[0].role }}", [TALK], {}) == ["user"]
    before = rendering._WORKER_PROCESS._process.pid
    pid = os.fork()
    if pid == 0:  # no assertion here may reach pytest
        fine = render("{{ messages[1].role }}", [TALK], {}) == ["assistant"]
        rendering._WORKER_PROCESS.close()
        os._exit(0 if fine else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert rendering._WORKER_PROCESS._process.pid == before
    assert render("{{ messages[0].role }}", [TALK], {}) == ["user"]
