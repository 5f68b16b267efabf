"""Templates render as in transformers and can access nothing else."""

import pytest

from engine.alignment.chat_template import ChatTemplate, TemplateRefusedError

MESSAGES = [
    {"role": "system", "content": "<b>&'\"</b>"},
    {"role": "user", "content": "Grüße", "name": "x"},
    {"role": "assistant", "content": "four", "reasoning": "2 + 2", "extra": {"a": [1, None, True]}},
]
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
TEMPLATES = [
    # trimmed blocks, loop variables, white space
    "{{ bos_token }}\n{% for m in messages %}\n    {% if loop.first %}\nFIRST\n    {% endif %}\n{{ m.content }}\n"
    "{% endfor %}",
    # tojson without HTML escaping, indentation
    "{{ messages | tojson }}{{ messages[2] | tojson(indent=2) }}{{ messages[0]|tojson(separators=(',',':')) }}",
    # loop controls, namespace, dict
    "{% set n = namespace(total=0) %}{% for m in messages %}{% if m.role == 'user' %}{% continue %}{% endif %}"
    "{% set n.total = n.total + m.content|length %}{% endfor %}{{ n.total }}{{ dict(a=1)['a'] }}",
    # names transformers defines as none
    "{% if tools is not none %}T{% endif %}{% if documents is none %}D{% endif %}{% if not tools %}N{% endif %}",
    # aliases of reasoning
    "{% for m in messages %}{{ m.reasoning_content }}|{{ m.thinking }};{% endfor %}",
    # generation blocks render as their content
    "{% for m in messages %}{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}\n{% endfor %}",
    "{{ add_generation_prompt }}{% macro f(x) %}[{{ x }}]{% endmacro %}{{ f(messages[1].content|upper|trim) }}",
]


@pytest.mark.parametrize("source", TEMPLATES)
@pytest.mark.parametrize("prompt", [True, False])
def test_templates_render_as_in_transformers(source: str, prompt: bool) -> None:
    reference = pytest.importorskip("transformers.utils.chat_template_utils")
    messages = MESSAGES
    if not hasattr(reference, "_REASONING_FIELDS"):  # 5.17 does not know the fields' other names, 5.23 does
        *others, last = MESSAGES
        messages = [*others, {"thinking": last["reasoning"], **last, "reasoning_content": last["reasoning"]}]
    expected, _ = reference.render_jinja_template(
        [messages], chat_template=source, add_generation_prompt=prompt, **TOKENS
    )
    assert ChatTemplate(source, TOKENS).render(MESSAGES, add_generation_prompt=prompt) == expected[0]


def test_a_template_with_the_date_renders_the_same_on_any_day() -> None:
    """Llama 3's template prints the date; a task that resumes on another day must see the same data."""
    asks = "{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}{% else %}26 Jul 2024{% endif %}"
    assert ChatTemplate(asks, {}).render([]) == "26 Jul 2024"
    assert ChatTemplate("{{ strftime_now('%H:%M:%S.%f') }}", {}).render([]) == "00:00:00.000000"


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('roles must alternate: ' + messages[1].content) }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ messages[9].content.x }}",
        "{{ 1 / 0 }}",
        "{{ messages[1].content + 1 }}",
        "{% set n = namespace(__init__=1) %}",
        "{{ dict.__class__.__base__ }}",
        "{% for m in messages %}{% for x in m.extra.a[0] %}{% endfor %}{% endfor %}",
    ],
)
def test_any_error_of_a_template_refuses_the_row_without_quoting_it(source: str) -> None:
    with pytest.raises(TemplateRefusedError) as caught:
        ChatTemplate(source, {}).render(MESSAGES)
    assert "Grüße" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_a_template_that_does_not_compile_is_refused() -> None:
    with pytest.raises(TemplateRefusedError, match="does not compile"):
        ChatTemplate("{% if %}", {})
