"""Chat templates render as Hugging Face renders them, and cannot do anything else."""

import pytest

from edgert.chat import ChatTemplate
from edgert.errors import CorruptError, EdgertError, InvalidArgumentError, UnsupportedError

HELLO = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]


def render(source: str, **variables: object) -> str:
    return ChatTemplate(source, bos_token="<s>", eos_token="</s>").render(HELLO, **variables)  # type: ignore[arg-type]


def test_the_usual_form() -> None:
    source = """
{%- for m in messages %}
    {{- '<|im_start|>' + m['role'] + '\n' + m.content | trim + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}"""
    expected = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n"
    assert render(source) == expected + "<|im_start|>assistant\n"
    assert render(source, add_generation_prompt=False) == expected


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ bos_token }}x{{ eos_token }}", "<s>x</s>"),
        ("{% if true %}\n  a\n{% endif %}", "  a\n"),  # trim_blocks
        ("  {% if true %}a{% endif %}", "a"),  # lstrip_blocks
        ("{{ {'b': 'é<', 'a': 1} | tojson }}", '{"b": "é<", "a": 1}'),  # no HTML escapes, order kept
        ("{{ [1] | tojson(indent=2) }}", "[\n  1\n]"),
        ("{% for m in messages %}{% if loop.last %}{% break %}{% endif %}{{ m.role }}{% endfor %}", "system"),
        (
            "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
            "2",
        ),
        ("{% macro f(x) %}[{{ x }}]{% endmacro %}{{ f(1) }}", "[1]"),
        ("{% generation %}a{% endgeneration %}", "a"),
        ("{{ messages[0].content ~ 1 ~ none }}{{ 1 < 2 < 3 }}", "Be brief.1NoneTrue"),
        ("{{ tools is none }}{{ enable_thinking is defined }}", "TrueFalse"),
        ("{{ 'a,b'.split(',') | join('-') }}{{ ' x '.strip() }}", "a-bx"),
        (
            "{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | list }}",
            "['Hello']",
        ),
        ("{% for k, v in {'a': 1}.items() %}{{ k }}{{ v }}{% endfor %}", "a1"),
    ],
)
def test_what_templates_use(source: str, text: str) -> None:
    assert render(source) == text


def test_variables_reach_the_template() -> None:
    source = "{{ tools[0].name }} {{ enable_thinking }} {{ strftime_now('%Y') | length }}"
    assert render(source, tools=[{"name": "clock"}], enable_thinking=False) == "clock False 4"


def test_content_in_parts_is_one_text() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    template = ChatTemplate("{{ messages[0].content }}")
    assert template.render([{"role": "user", "content": parts}]) == "one\ntwo"


def test_a_template_may_refuse_a_conversation() -> None:
    with pytest.raises(InvalidArgumentError, match="no system message, please"):
        render("{{ raise_exception('no system message, please') }}")


@pytest.mark.parametrize(
    "messages",
    [
        "Hello",
        [],
        [{}],
        ["Hello"],
        [{"role": 1}],
        {"role": "user"},
        [{"role": "user", "content": object()}],
        [{"role": "user", "content": 1j}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
        [{"role": "user", "content": ["text"]}],
    ],
)
def test_messages_are_plain_data(messages: object) -> None:
    with pytest.raises(InvalidArgumentError, match="messages"):
        ChatTemplate("x").render(messages)  # type: ignore[arg-type]


REACHING_FOR_PYTHON = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ namespace.__init__.__globals__.os.system('true') }}",
    "{{ messages.append({'role': 'user'}) }}",
    "{{ dict.mro() }}",
    "{{ cycler.__init__ }}",
    "{{ self._TemplateReference__context.environment }}",
    "{{ environment.steps }}",
    "{{ lipsum() }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
    "{{ '{0.__class__}'.format(1) }}",
    "{{ strftime_now('%1000000000d') }}",
]


@pytest.mark.parametrize("source", REACHING_FOR_PYTHON)
def test_there_is_no_way_to_python(source: str) -> None:
    with pytest.raises(UnsupportedError, match="chat template: "):
        render(source)


GROW = "{% set ns = namespace(x='a', y=[1]) %}{% for i in range(99) %}"
GROW_TWO = (
    GROW.replace("'a'", "[1]") + "{% set ns.x = [ns.x, ns.x] %}{% set ns.y = [ns.y, ns.y] %}{% endfor %}"
)
LONG = "{% set ns = namespace(x='a' * 99999) %}"
LOOP = "{% for i in range(99999) %}"
WITHOUT_END = {
    "a long range": "{% for i in range(10**9) %}{% endfor %}",
    "nested loops": "{% for i in range(9**5) %}{% for j in range(9**5) %}{% endfor %}{% endfor %}",
    "a recursive macro": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "a macro that calls itself twice": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(99) }}",
    "a recursive loop": "{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "doubling by ~": GROW + "{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "doubling by +": GROW + "{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "doubling by a block": GROW + "{% set b %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = b %}{% endfor %}",
    "growth by replace": GROW + "{% set ns.x = ns.x.replace('a', 'aaaa') %}{% endfor %}",
    "growth by the filter": GROW + "{% set ns.x = ns.x | replace('a', 'aaaa') %}{% endfor %}",
    "a list within itself, shown": GROW + "{% set ns.y = [ns.y, ns.y] %}{% endfor %}{{ ns.y }}",
    "a list within itself, as JSON": GROW + "{% set ns.y = [ns.y, ns.y] %}{% endfor %}{{ ns.y | tojson }}",
    "a list within itself, compared": GROW + "{% set ns.y = [ns.y, ns.y] %}{% endfor %}{{ ns.y == [1] }}",
    "a tuple within itself, as a key": GROW + "{% set ns.x = (ns.x, ns.x) %}{% endfor %}{{ {ns.x: 1} }}",
    "a product": "{{ 'a' * 10**10 }}",
    "a power": "{{ 9 ** 9 ** 9 ** 9 }}",
    "a width": "{{ '%9999999999d' % 1 }}",
    "a format's width": "{{ '{:9999999999}'.format(1) }}",
    "a padding": "{{ 'a'.ljust(10**10) }}",
    "a join": "{{ range(99999) | list | join('x' * 99999) }}",
    "an indent": "{{ [1] | tojson(indent=10**9) }}",
    "bytes": "{{ (1).to_bytes(10**10) }}",
    "a precision": "{{ 5 | round(-(10**9)) }}",
    "a precision, rounding down": "{{ 5 | round(10**9, 'floor') }}",
    "large integers": "{% set n = ('7' ~ 'f' * 99999) | int(0, 16) %}"
    + LOOP
    + "{% set m = n // (n - 1) %}{% endfor %}",
    "the template's own text": LOOP + "x" * 99999 + "{% endfor %}",
    "a macro's own text": "{% macro f() %}" + "x" * 99999 + "{% endmacro %}" + LOOP + "{{ f() }}{% endfor %}",
    "a list within itself, tested": GROW_TWO + "{{ ns.x is eq(ns.y) }}",
    "a list within itself, selected": GROW_TWO + "{{ [ns.x] | select('in', [ns.y]) | list }}",
    "a list within itself, sought": GROW_TWO + "{{ [ns.x].index(ns.y) }}",
    "a mapping within itself, as items": GROW_TWO.replace("[", "{1: ")
    .replace(", ns", ", 2: ns")
    .replace("]", "}")
    + "{{ ns.x.items() == ns.y.items() }}",
    "text that is searched": LONG + LOOP + "{% set n = ns.x.count('ab') %}{% endfor %}",
    "text that is tested": LONG + LOOP + "{% set n = ns.x is lower %}{% endfor %}",
    "text that is compared": LONG + LOOP + "{% set n = 'ab' in ns.x %}{% endfor %}",
    "text that is stripped": "{{ ('a' * 99999).strip('b' * 99999 + 'a') }}",
    "a range that is searched": "{% set r = range(99999) %}"
    + LOOP
    + "{% set n = r.count(0.5) %}{% endfor %}",
    "a join of what a filter gives": LONG + "{{ ([{'a': ns.x}] * 99999) | map(attribute='a') | join }}",
}


@pytest.mark.parametrize("source", WITHOUT_END.values(), ids=WITHOUT_END.keys())
def test_work_and_size_are_bounded(source: str) -> None:
    with pytest.raises(UnsupportedError, match="chat template: "):
        render(source)


def test_a_namespace_does_not_show_what_it_holds() -> None:
    assert render(GROW_TWO + "{{ ns }}") == "<namespace>"


def test_a_template_that_went_too_far_can_be_asked_again() -> None:
    template = ChatTemplate("{% if messages | length > 1 %}{{ 'a' * 10**10 }}{% endif %}fine")
    with pytest.raises(UnsupportedError):
        template.render(HELLO)
    assert template.render(HELLO[:1]) == "fine"


def test_a_long_conversation_is_no_attack() -> None:
    messages = [{"role": "user", "content": "word " * 2000} for _ in range(100)]
    source = (
        "{% for m in messages %}"
        "{% if m.content is string and '<think>' not in m.content and m.content.split('</think>')[-1] != '' %}"
        "{{ m.role ~ ': ' ~ m.content | trim }}\n{% endif %}{% endfor %}"
    )
    assert len(ChatTemplate(source).render(messages)) > 1_000_000 - 600


@pytest.mark.parametrize(
    "source",
    [
        "{% for %}",
        "{{ x",
        "{{" + "(" * 5000 + "1" + ")" * 5000 + "}}",
        "{% if 1 %}" * 5000,
        "x" * 10**6,
    ],
)
def test_what_is_no_template_is_refused_when_loaded(source: str) -> None:
    with pytest.raises(CorruptError, match="chat template: "):
        ChatTemplate(source)


def test_a_filter_that_is_not_offered_is_named() -> None:
    with pytest.raises(UnsupportedError, match="line 2: No filter named 'pprint'"):
        ChatTemplate("\n{{ messages | pprint }}")


def test_errors_are_of_the_family() -> None:
    with pytest.raises(EdgertError, match="division by zero"):
        render("{{ 1 / 0 }}")
