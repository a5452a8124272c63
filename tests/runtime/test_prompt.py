"""Messages become the prompt that transformers or LLaVA's tools make of them; anything else is refused by its place."""

import json
import subprocess
import sys

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from llava_deploy.engines.errors import PromptError
from llava_deploy.engines.manifest import ChatRecipe
from llava_deploy.runtime.prompt import images_of, render_chat

LLAVA_HF = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{# Render all images first #}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{# Render all text next #}"
    "{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}"
    "{% endfor %}{% else %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
TEXT_ONLY = """
{{- bos_token -}}
{% for message in messages %}
    {% if message['role'] == 'user' %}
        {{- '[INST] ' + message['content'] + ' [/INST]' -}}
    {% elif message['role'] == 'assistant' %}
        {{- ' ' + message['content'] | trim + eos_token -}}
    {% else %}
        {{- raise_exception('Only user and assistant roles are supported!') }}
    {% endif %}
{% endfor %}
"""
BOTH = (
    "{%- set state = namespace(count=0) -%}{% for m in messages %}{% if loop.index > 20 %}{% break %}{% endif %}"
    "{% if m.content is string %}T:{{ m.content }}{% else %}P:{% for c in m.content %}"
    "{% if c.type == 'image' %}{% set state.count = state.count + 1 %}<image>{% else %}{{ c.text }}{% endif %}"
    "{% endfor %}{% endif %}|{% endfor %}{{ state.count }}{{ strftime_now('%Y')[:2] }}"
    "{{ {'a': '<é>'} | tojson }}{{ dict(b=1)['b'] }}{% if tools %}tools{% endif %}"
)


def recipe(template=None, conversation="vicuna_v1", placeholder="<image>"):
    return ChatRecipe(template, conversation, placeholder, "split", None, 1, "<s>", "</s>", (2,), ())


def text(value):
    return {"type": "text", "text": value}


def image(value):
    return {"type": "image", "image": value}


def user(*parts):
    return {"role": "user", "content": list(parts)}


def by_transformers(template, messages):
    prompts, _ = render_jinja_template(
        [messages], chat_template=template, add_generation_prompt=True, bos_token="<s>", eos_token="</s>"
    )
    return prompts[0]


ANSWER = {"role": "assistant", "content": [text("A cat.")]}
TALKS = {
    "one": [user(image("p"), text("What?"))],
    "picture last": [user(text("What?"), image("p"))],
    "two turns": [user(image("p"), text("What?")), ANSWER, user(text("Sure?"))],
    "two pictures": [
        user(image("p"), text("Compare"), image("q"), text("them")),
        ANSWER,
        user(image("r"), text("And?")),
    ],
    "system": [{"role": "system", "content": [text("Be brief.")]}, user(text("Hi <b>"))],
}


@pytest.mark.parametrize("talk", TALKS)
@pytest.mark.parametrize("template", [LLAVA_HF, BOTH])
def test_parts_through_a_template_as_transformers(template, talk):
    assert render_chat(TALKS[talk], recipe(template)) == by_transformers(template, TALKS[talk])


def test_texts_through_a_template_as_transformers():
    talk = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": " Oh "},
        {"role": "user", "content": "?"},
    ]
    for template in (TEXT_ONLY, BOTH):
        assert render_chat(talk, recipe(template)) == by_transformers(template, talk)
    assert render_chat(talk, recipe(TEXT_ONLY)) == "<s>[INST] Hi [/INST] Oh</s>[INST] ? [/INST]"


def test_contents_are_turned_into_what_the_template_takes():
    talk = [{"role": "user", "content": "Hi"}]
    assert render_chat(talk, recipe(LLAVA_HF)) == "USER: Hi ASSISTANT:"
    assert render_chat(TALKS["two pictures"], recipe(TEXT_ONLY)) == (
        "<s>[INST] <image>\n<image>\nCompare them [/INST] A cat.</s>[INST] <image>\nAnd? [/INST]"
    )


def test_placeholders_in_the_text_stay_where_they_are():
    talk = [user(image("p"), image("q"), text("Is <image> like <image>?"))]
    assert render_chat(talk, recipe()).endswith("USER: Is <image> like <image>? ASSISTANT:")
    assert render_chat(talk, recipe(LLAVA_HF)) == "USER: Is <image> like <image>? ASSISTANT:"
    assert render_chat(talk, recipe(TEXT_ONLY)) == "<s>[INST] Is <image> like <image>? [/INST]"
    for template in (None, LLAVA_HF, TEXT_ONLY):
        with pytest.raises(
            PromptError, match=r"message 0: its text has 1 placeholders '<image>' and it has 2 pictures"
        ):
            render_chat([user(image("p"), image("q"), text("Is <image>?"))], recipe(template))


def test_built_in_formats_put_pictures_first():
    talk = [user(text("What is"), image("p"), text("this?"), image("q"))]
    assert render_chat(talk, recipe(conversation="mistral")) == "[INST] <image>\n<image>\nWhat is this? [/INST]"
    assert render_chat(talk, recipe(conversation="plain", placeholder="<img>")) == "<img>\n<img>\nWhat is this?\n"
    assert render_chat([user(image("p"))], recipe(conversation="plain")) == "<image>\n\n"


def test_images_come_in_the_order_of_their_placeholders():
    assert images_of(TALKS["two pictures"]) == ["p", "q", "r"]
    assert images_of(TALKS["system"]) == []
    assert images_of([{"role": "user", "content": "text"}]) == []


def test_tokens_that_the_tokenizer_lacks_are_undefined():
    bare = ChatRecipe("{{ bos_token }}[{{ eos_token }}]", "plain", "<image>", "split", None, None, None, None, (), ())
    assert render_chat([user(text("x"))], bare) == "[]"


@pytest.mark.parametrize(
    ("messages", "parts"),
    [
        ([], ["no message"]),
        ("Hi", ["want a list of messages, got str"]),
        ({"role": "user", "content": "x"}, ["want a list of messages, got dict"]),
        (["Hi"], ["message 0", "got str"]),
        ([{"role": "user"}], ["message 0", "['role']"]),
        ([{"role": "user", "content": "x", "name": "n"}], ["message 0", "'name'"]),
        ([user(text("x")), {"role": "tool", "content": "x"}], ["message 1", "'tool'"]),
        ([{"role": ["user"], "content": "x"}], ["message 0", "['user']"]),
        ([{"role": "user", "content": None}], ["message 0", "NoneType"]),
        ([{"role": "user", "content": {"type": "text", "text": "x"}}], ["message 0", "dict"]),
        ([user("x")], ["message 0, part 0", "got str"]),
        ([user(text("x"), {"type": "image"})], ["message 0, part 1", "'image'", "picture"]),
        ([user({"type": "image_url", "image_url": "u"})], ["message 0, part 0", "'image_url'"]),
        ([user({"type": "text", "text": "a", "image": "p"})], ["message 0, part 0"]),
        ([user({"text": "a"})], ["message 0, part 0", "None"]),
        ([user({"type": ["text"], "text": "a"})], ["message 0, part 0"]),
        ([user(text(3))], ["message 0, part 0", "want text, got int"]),
        ([user(text("x")), ANSWER], ["user's message last", "'assistant' last"]),
    ],
)
def test_messages_of_another_form_are_refused_by_their_place(messages, parts):
    for template in (None, LLAVA_HF):
        with pytest.raises(PromptError) as caught:
            render_chat(messages, recipe(template))
        assert all(part in str(caught.value) for part in parts), str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__ }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__ }}",
        "{{ raise_exception.__globals__ }}",
        "{{ dict.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ (messages | map(attribute='__class__') | list)[0] }}",
        "{{ '{0.__class__}'.format(messages) }}",
        "{{ messages.append('x') }}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
        "{{ namespace(__init__=1) }}",
        "{% for i in range(10 ** 12) %}{% endfor %}",
        "{{ 'x' * 10 ** 18 }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{{ raise_exception('no') }}",
        "{% break %}",
        "{{ undefined.attribute }}",
        "{{ 1 / 0 }}",
        "{{ messages[0] + 1 }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{% if %}",
        "{% generation %}",
    ],
)
def test_templates_that_fail_or_reach_inside_are_refused(template):
    with pytest.raises(PromptError, match=r"^chat template: ") as caught:
        render_chat([user(text("x"))], recipe(template))
    assert "\n" not in str(caught.value)


def test_a_template_sees_no_picture_object():
    class Picture:
        def __str__(self):
            raise AssertionError("the template touched the picture")

    shown = render_chat([user(image(Picture()), text("x"))], recipe("{{ messages | tojson }}"))
    assert json.loads(shown) == [user({"type": "image"}, text("x"))]


def test_importing_the_modules_loads_neither_jinja2_nor_pillow_nor_tokenizers():
    names = [
        "pictures",
        "pixels",
        "preprocess",
        "prompt",
        "conversations",
        "chat_template",
        "tokenize",
        "sampling",
        "textstream",
    ]
    program = (
        "import sys, types; package = types.ModuleType('llava_deploy.runtime'); import llava_deploy\n"
        "import importlib.util as u; spec = u.find_spec('llava_deploy.engines')\n"
        "package.__path__ = [spec.submodule_search_locations[0].replace('engines', 'runtime')]\n"
        "sys.modules['llava_deploy.runtime'] = package\n"
        f"for name in {names}: __import__('llava_deploy.runtime.' + name)\n"
        "print([n for n in ('jinja2', 'PIL', 'tokenizers', 'torch') if n in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
