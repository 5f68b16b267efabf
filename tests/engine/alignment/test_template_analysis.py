"""Templates that write one message after another: one rendering equals the renderings of all prefixes."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.alignment.chat_template import ChatTemplate, TemplateRefusedError
from tests.thoroughness import examples
from tests.tiny_tokenizer import CHATML

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
# Parts of templates: the first of each kind are recognised by syntax, the others are not.
BEFORE = ["", "{{ bos_token }}", "a {{ eos_token ~ 1 }}", "{% set x = messages[0].content %}", "{{ messages|length }}"]
PLAIN = [
    "{{ m.content }}",
    "{{ '<' + m['role'] + '>' + m.content|trim + eos_token }}\n",
    "{% if loop.first and messages[0]['role'] != 'system' %}S{% endif %}",
    "{{ 'U' if m.role == 'user' else 'A' }}{{ loop.index0 }}{{ loop.index }}",
    "{% if m.name is defined %}{{ m.name }}{% elif m.role == 'tool' %}T{% else %}{{ bos_token }}{% endif %}",
    "{{ messages[0].content }}",
    "message begins",
    "{% if tools %}T{% endif %}{{ m.content[0] }}{{ m }}",
]
FORWARD = [
    "{{ loop.last }}",
    "{{ messages|length }}",
    "{{ messages[-1].role }}",
    "{{ messages[1].content }}",
    "{{ messages }}",
    "{{ loop.nextitem.content if loop.nextitem }}",
    "{{ loop['last'] }}",
    "{{ loop }}",
    "{% if add_generation_prompt %}G{% endif %}",
    "{% set n.count = n.count + 1 %}{{ n.count }}",
    "{% if m.role == 'user' %}{% continue %}{% endif %}",
    "{% for other in messages %}{{ other.role }}{% endfor %}",
    "{{ m.content|tojson }}{{ unknown }}",
]
AFTER = [
    "",
    "{% if add_generation_prompt %}{{ 'assistant' ~ bos_token }}\n{% endif %}",
    "{{ eos_token }}",
    "{% if add_generation_prompt %}a{% else %}b{% endif %}",
    "{% if messages|length > 1 %}x{% endif %}",
]
LOOPS = [
    *["for m in messages"] * 3,
    "for m in messages[1:]",
    "for m in messages recursive",
    "for m in messages if m.name",
]
contents = st.sampled_from(["", " hi ", "message begins", "🙂", "<s>", "\n"])
message = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant", "tool"]), "content": contents},
    optional={"name": contents, "reasoning": contents},
)


@given(
    before=st.sampled_from(BEFORE),
    loop=st.sampled_from(LOOPS),
    inside=st.lists(st.sampled_from([*PLAIN, *PLAIN, *FORWARD]), max_size=4),
    after=st.sampled_from(AFTER),
    messages=st.lists(message, max_size=5),
)
@settings(max_examples=examples(500), deadline=None)
def test_prefixes_equal_separate_renderings(
    before: str, loop: str, inside: list[str], after: str, messages: list[dict[str, str]]
) -> None:
    source = "{% set n = namespace(count=0) %}" if any("n.count" in part for part in inside) else ""
    source += f"{before}{{% {loop} %}}{''.join(inside)}{{% endfor %}}{after}"
    template = ChatTemplate(source, TOKENS)
    try:
        rendered = template.render_marked(messages)
    except TemplateRefusedError:
        with pytest.raises(TemplateRefusedError):
            template.render(messages)
        return
    text, starts, prompt = rendered
    assert text == template.render(messages)
    if starts is None:
        assert loop != LOOPS[0] or before in BEFORE[3:] or after in AFTER[2:] or set(inside) & set(FORWARD)
        return
    assert len(starts) == len(messages)
    for index, start in enumerate(starts):
        assert text[:start] == template.render(messages[:index])
        assert text[:start] + prompt == template.render(messages[:index], add_generation_prompt=True)


@pytest.mark.parametrize(
    ("source", "is_plain"),
    [
        (CHATML, True),
        ("{% for message in messages %}{{ message.content }}{% endfor %}", True),
        ("{% for m in messages %}{{ m.content }}{{ eos_token if loop.last }}{% endfor %}", False),
        ("{% for m in messages %}{{ m.content }}{% endfor %}{% for m in messages %}{% endfor %}", False),
        ("{% for m in messages %}{{ m.content }}{% else %}none{% endfor %}", False),
        ("{% for messages in messages %}{{ messages[0] }}{% endfor %}", False),
        ("{% for loop in messages %}{{ loop.first }}{% endfor %}", False),
        ("{% for a, b in messages %}{{ a }}{% endfor %}", False),
        ("{% macro f(m) %}{{ m.content }}{% endmacro %}{% for m in messages %}{{ f(m) }}{% endfor %}", False),
        ("no loop", False),
    ],
)
def test_templates_are_recognised_by_syntax(source: str, is_plain: bool) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    try:
        assert (ChatTemplate(source, TOKENS).render_marked(messages).starts is not None) == is_plain
    except TemplateRefusedError:
        assert not is_plain


def test_a_prompt_that_cannot_be_rendered_refuses_rows_and_not_the_template() -> None:
    broken = "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}{{ 1 + 'a' }}{% endif %}"
    template = ChatTemplate(broken, {})
    assert template.render_marked([{"role": "user", "content": "a"}]) == ("a", None, "")
    with pytest.raises(TemplateRefusedError, match="TypeError"):
        template.render([], add_generation_prompt=True)
