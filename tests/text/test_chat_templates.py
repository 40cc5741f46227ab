"""Chat templates, against transformers' rendering of the same ones."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.errors import InvalidRequestError
from quire.tokenizer import load_tokenizer
from quire.tokenizer.chat_template import render

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}"
    "{% set loop_messages = messages %}{% set system_message = false %}{% endif %}"
    "{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message %}"
    "{% set content = '<<SYS>>' + system_message + '<</SYS>>' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}"
    "{% endif %}{% endfor %}"
)
TOOLS = """\
{%- if tools %}
    {{- '# Tools\n' }}
    {%- for tool in tools %}
        {{- tool | tojson }}
        {%- if not loop.last %},{% endif %}
    {%- endfor %}
    {{- '\n' }}
    {{- tools | tojson(indent=2) }}
{%- endif %}
{%- set ns = namespace(count=0) %}
{%- for message in messages %}
    {%- if message.role == 'skip' %}{% continue %}{% endif %}
    {%- if message.content is string %}
        {{- message.role ~ ': ' ~ message.content }}
    {%- else %}
        {%- for part in message.content %}
            {%- if part.type == 'text' %}{{- part.text }}{%- else %}<|image|>{%- endif %}
        {%- endfor %}
    {%- endif %}
    {%- if message.tool_calls %}{{- message.tool_calls[0].function.arguments | tojson }}{%- endif %}
    {%- if message.reasoning_content %}<think>{{ message.reasoning_content }}</think>{%- endif %}
    {%- set ns.count = ns.count + loop.length %}
{%- endfor %}
{{- ns.count }}
{%- for d in documents or [] %}{{ loop.index ~ d.title ~ ':' ~ d.text }}{% endfor %}
{%- if enable_thinking is defined and not enable_thinking %}<no-think>{% endif %}
{{- dict(a=1)['a'] }}{{ strftime_now('%Y') | length }}
"""
GENERATION = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{% set inner = 1 %}{% endgeneration %}{% else %}{{ m.content }}{% endif %}|{% endfor %}"
    "{{ inner is defined }}"
)

CHAT = [
    {"role": "system", "content": "Be brief. "},
    {"role": "user", "content": " What is 1 < 2 & 'x'? é東"},
    {"role": "assistant", "content": "True. ", "reasoning": "compare"},
    {"role": "user", "content": "Thanks"},
]
PARTS = [{"role": "user", "content": [{"type": "text", "text": "Look: "}, {"type": "image"}]}]
CALL = [
    {"role": "user", "content": "Weather?", "name": None},
    {
        "role": "assistant",
        "content": "x",
        "tool_calls": [{"function": {"name": "f", "arguments": {"city": "Köln <b>"}}}],
    },
    {"role": "skip", "content": "y"},
]
SCHEMA = {
    "type": "function",
    "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": {}}}},
}


def add(a: int, b: int) -> int:
    """
    Add two numbers.

    Args:
        a: The first.
        b: The second.
    """
    return a + b


@pytest.fixture(scope="session")
def tokenizer(loaded):
    return loaded["llama2"]


@pytest.fixture(scope="session")
def oracle(folders):
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(folders["llama2"])


class TestAgainstTransformers:
    @pytest.mark.parametrize("template", [CHATML, LLAMA2, TOOLS, GENERATION])
    @pytest.mark.parametrize("chat", [CHAT, PARTS, CALL, CHAT[1:]])
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"add_generation_prompt": False},
            {"tools": [SCHEMA, add]},
            {"documents": [{"title": "T", "text": "x"}], "enable_thinking": False},
            {"bos_token": "<another>"},
        ],
    )
    def test_a_template_writes_the_same(self, template, chat, options, tokenizer, oracle):
        """Or both refuse: text, parts, tools, documents, variables, system messages."""
        settings = {"chat_template": template, "add_generation_prompt": True, **options}
        try:
            expected = oracle.apply_chat_template(chat, tokenize=False, **settings)
        except Exception:
            with pytest.raises(InvalidRequestError):
                tokenizer.apply_chat_template(chat, **settings)
            return
        assert tokenizer.apply_chat_template(chat, **settings) == expected
        assert tokenizer.apply_chat_template(
            chat, tokenize=True, **settings
        ) == oracle.apply_chat_template(chat, tokenize=True, return_dict=False, **settings)

    @pytest.mark.parametrize("template", [CHATML, LLAMA2, TOOLS])
    @given(text=st.text("ab \n.", max_size=8), parts=st.booleans(), field=st.booleans())
    def test_continuing_the_final_message_leaves_it_open(
        self, template, text, parts, field, tokenizer, oracle
    ):
        content = [{"type": "text", "text": text}] if parts else text
        chat = [
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": content, "reasoning_content": text},
        ]
        settings = {
            "chat_template": template,
            "continue_final_message": "reasoning_content" if field else True,
            "add_generation_prompt": False,
        }
        try:
            expected = oracle.apply_chat_template(chat, tokenize=False, **settings)
        except Exception:
            with pytest.raises(InvalidRequestError):
                tokenizer.apply_chat_template(chat, **settings)
            return
        assert tokenizer.apply_chat_template(chat, **settings) == expected

    def test_the_caller_s_messages_stay_as_they_are(self, tokenizer):
        chat = json.loads(json.dumps(CHAT[:3]))
        tokenizer.apply_chat_template(
            chat, chat_template=CHATML, continue_final_message=True, add_generation_prompt=False
        )
        assert chat == CHAT[:3]


class TestWhereTemplatesComeFrom:
    def write(self, folder, source, config=None, **files):
        (folder / "tokenizer.json").write_bytes((source / "tokenizer.json").read_bytes())
        (folder / "tokenizer_config.json").write_text(json.dumps(config or {}))
        (folder / "config.json").write_text('{"model_type": "llama"}')
        for name, text in files.items():
            path = folder / name.replace("__", "/")
            path.parent.mkdir(exist_ok=True)
            path.with_suffix(".jinja").write_text(text)
        return load_tokenizer(folder)

    def test_a_file_of_its_own_goes_before_the_configuration(self, tmp_path, folders):
        tokenizer = self.write(
            tmp_path, folders["gpt2"], {"chat_template": "config"}, chat_template="file"
        )
        assert tokenizer.chat_template == "file"

    def test_further_files_are_named_templates(self, tmp_path, folders):
        tokenizer = self.write(
            tmp_path,
            folders["gpt2"],
            chat_template="default",
            additional_chat_templates__rag="the rag template",
        )
        transformers = pytest.importorskip("transformers")
        oracle = transformers.AutoTokenizer.from_pretrained(tmp_path)
        assert tokenizer.chat_template == oracle.chat_template
        assert tokenizer.apply_chat_template(CHAT, chat_template="rag") == "the rag template"
        assert tokenizer.apply_chat_template(CHAT) == "default"

    def test_a_list_in_the_configuration_is_named_templates(self, tmp_path, folders):
        named = [
            {"name": "default", "template": "plain"},
            {"name": "tool_use", "template": "with tools"},
        ]
        tokenizer = self.write(tmp_path, folders["gpt2"], {"chat_template": named})
        assert tokenizer.apply_chat_template(CHAT) == "plain"
        assert tokenizer.apply_chat_template(CHAT, tools=[SCHEMA]) == "with tools"
        assert tokenizer.apply_chat_template(CHAT, chat_template="{{ 1 + 1 }}") == "2"

    def test_without_a_default_the_names_are_listed(self, tmp_path, folders):
        named = [{"name": "a", "template": "1"}, {"name": "b", "template": "2"}]
        tokenizer = self.write(tmp_path, folders["gpt2"], {"chat_template": named})
        with pytest.raises(InvalidRequestError, match=re.escape("['a', 'b']")):
            tokenizer.apply_chat_template(CHAT)

    def test_no_template_at_all_is_said_so(self, tokenizer):
        with pytest.raises(InvalidRequestError, match="no chat template"):
            tokenizer.apply_chat_template(CHAT)


@dataclass
class Message:
    role: str
    content: str


class Secret:
    """Has a method that a template must not reach."""

    def leak(self):
        raise AssertionError("a template called it")


def render_one(template, content="x"):
    return render(template, [{"role": "user", "content": content}], special_tokens={})


class TestTemplatesFromOutside:
    @pytest.mark.parametrize(
        "template",
        [
            "{{ ''.__class__.__mro__[1].__subclasses__() }}",
            "{{ messages.append(1) }}",
            "{{ cycler.__init__.__globals__ }}",
            "{% include '/etc/passwd' %}",
            "{% import 'os' as os %}",
            "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
            "{{ namespace(_x=1) }}",
            "{{ messages[0].content.leak() }}",
            "{{ dict.__init__.__globals__ }}{{ raise_exception('x') }}",
        ],
    )
    def test_a_template_gets_at_nothing_but_its_values(self, template):
        """No attribute that starts with an underscore, no file, no change of what it is given."""
        try:
            text = render_one(template, Secret())
        except InvalidRequestError:
            return
        assert text == ""

    def test_what_a_template_raises_is_the_message(self):
        with pytest.raises(InvalidRequestError, match="Roles must alternate"):
            render_one("{{ raise_exception('Roles must alternate!') }}")

    @pytest.mark.parametrize(
        ("template", "message"),
        [
            ("{% for %}", "line 1"),
            ("{{ 1 // 0 }}", "zero"),
            ("{{ missing.attribute.of }}", "missing"),
            ("{{ 'a' + 1 }}", "str"),
            ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "without end"),
        ],
    )
    def test_a_template_that_fails_says_how(self, template, message):
        with pytest.raises(InvalidRequestError, match=message):
            render_one(template)

    @pytest.mark.parametrize(
        "template",
        [
            "{% for a in [1] %}" * 30 + "{% endfor %}" * 30,
            "{% if 1 %}" * 150 + "{% endif %}" * 150,
            "{{ " + "(" * 250 + "1" + ")" * 250 + " }}",
            "{{ " + "9" * 5000 + " }}",
        ],
        ids=["for", "if", "parentheses", "digits"],
    )
    def test_a_template_that_no_compiler_takes_is_refused(self, template):
        """Jinja makes Python of it, which has bounds of its own."""
        with pytest.raises(InvalidRequestError, match="chat template"):
            render_one(template)

    @pytest.mark.parametrize(
        "template",
        [
            "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
            "{{ 'a' * 9999999999 }}",
            "{{ [0] * 9999999999 }}",
            "{{ 9 ** 99999999 }}",
            "{% for a in range(999999999) %}{% endfor %}",
            "{% set s = (range(99999) | map('string')) %}{% for a in range(99) %}"
            "{% for c in range(99999) | list | batch(1) %}{% endfor %}{% endfor %}",
        ],
    )
    def test_a_template_without_end_is_ended(self, template):
        with pytest.raises(InvalidRequestError, match="template failed"):
            render_one(template)

    def test_loops_keep_their_variables(self):
        """Counting iterations changes nothing for generators, lists and nested loops."""
        template = (
            "{% for x in [1, 2, 3] | map('string') %}{{ loop.index }}/{{ loop.length }}"
            "{{ ',' if not loop.last }}{% endfor %}|"
            "{% for k, v in {'a': 1, 'b': 2}.items() %}{{ k }}{{ v }}{% endfor %}|"
            "{% for x in missing %}x{% else %}none{% endfor %}|"
            "{% for x in [[1, [2]]] recursive %}"
            "{{ x if x is not iterable else loop(x) }}{% endfor %}|"
            "{% for x in 'abc' if x != 'b' %}{{ loop.revindex }}{{ x }}{% endfor %}"
        )
        assert render_one(template) == "1/3,2/3,3/3|a1b2|none|12|2a1c"


class TestMessages:
    @pytest.mark.parametrize(
        "messages",
        ["Hello", {"role": "user", "content": "x"}, [], ["Hello"], [{"content": "x"}], [None], 3],
    )
    def test_what_is_no_conversation_is_refused(self, messages, tokenizer):
        with pytest.raises(InvalidRequestError, match="messages"):
            tokenizer.apply_chat_template(messages, chat_template=CHATML)

    def test_dataclasses_and_models_are_messages(self, tokenizer):
        expected = tokenizer.apply_chat_template(
            [{"role": "user", "content": "x"}], chat_template=CHATML
        )

        class Model:
            def model_dump(self):
                return {"role": "user", "content": "x"}

        for message in (Message("user", "x"), Model()):
            assert tokenizer.apply_chat_template([message], chat_template=CHATML) == expected

    @pytest.mark.parametrize("name", ["messages", "variable", "documents", "tools"])
    @pytest.mark.parametrize("depth", [2000, None])
    def test_data_without_a_bottom_is_refused_by_name(self, name, depth, tokenizer):
        """A value that contains itself, or so many others in each other as no chat has."""
        value = {}
        if depth is None:
            value["self"] = value
        for _ in range(depth or 0):
            value = {"inner": value}
        message = {"role": "user", "content": value if name == "messages" else "x"}
        options = {} if name == "messages" else {name: value if name == "variable" else [value]}
        with pytest.raises(InvalidRequestError, match=f"{name}.* nested too deeply"):
            tokenizer.apply_chat_template([message], chat_template=CHATML, **options)

    def test_an_object_that_cannot_be_read_is_refused_by_name(self, tokenizer):
        class Broken:
            def model_dump(self):
                raise KeyError("no such field")

        with pytest.raises(InvalidRequestError, match=r"messages\[0\].*no such field"):
            tokenizer.apply_chat_template([Broken()], chat_template=CHATML)

    @pytest.mark.parametrize("content", [5, True, 1.5, {"text": "x"}, [5]])
    def test_only_text_can_be_continued(self, content, tokenizer):
        chat = [{"role": "assistant", "content": content}]
        with pytest.raises(InvalidRequestError, match="no text to continue"):
            tokenizer.apply_chat_template(
                chat,
                chat_template=CHATML,
                continue_final_message=True,
                add_generation_prompt=False,
            )

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("add_generation_prompt", "no"),
            ("add_generation_prompt", 0),
            ("continue_final_message", 5),
            ("continue_final_message", None),
        ],
    )
    def test_a_switch_is_true_or_false(self, name, value, tokenizer):
        """A "no" is not taken for yes."""
        options = {"add_generation_prompt": False, name: value}
        with pytest.raises(InvalidRequestError, match=f"^{name} must be .*{value!r}"):
            tokenizer.apply_chat_template(CHAT, chat_template=CHATML, **options)

    def test_a_tool_that_describes_nothing_is_refused_by_name(self, tokenizer):
        """A schema is made of a function's type hints and docstring."""

        def silent(a: int):
            return a

        def untyped(a):
            """
            Do it.

            Args:
                a: The first.
            """

        for tool in (silent, untyped):
            with pytest.raises(InvalidRequestError, match=rf"^tools\[1\].*{tool.__name__}"):
                tokenizer.apply_chat_template(CHAT, chat_template=CHATML, tools=[SCHEMA, tool])

    def test_continuing_and_beginning_an_answer_exclude_each_other(self, tokenizer):
        with pytest.raises(InvalidRequestError, match="exclude each other"):
            tokenizer.apply_chat_template(CHAT, chat_template=CHATML, continue_final_message=True)

    @pytest.mark.parametrize(
        "options",
        [
            {"tools": [3]},
            {"tools": [10**5000]},
            {"documents": ["x"]},
            {"documents": 5},
            {"documents": "x"},
            {"documents": [10**5000]},
            {"chat_template": 3},
            {"chat_template": 10**5000},
        ],
        ids=range(8),
    )
    def test_wrong_options_are_refused(self, options, tokenizer):
        with pytest.raises(InvalidRequestError, match=next(iter(options))):
            tokenizer.apply_chat_template(CHAT, **{"chat_template": CHATML, **options})


@pytest.mark.parametrize("template", ["{{ '%20000000d' % 1 }}", "{{ 'a'.center(20000000) }}"])
def test_a_text_of_many_megabytes_is_refused(template):
    """The tokenizers library would end the process where memory runs out."""
    with pytest.raises(InvalidRequestError, match="20000000 characters"):
        render(template, [{"role": "user", "content": "a"}], special_tokens={})


def test_bytes_are_no_content():
    with pytest.raises(InvalidRequestError, match="bytes"):
        render(CHATML, [{"role": "user", "content": b"a"}], special_tokens={})


def test_tools_are_a_list():
    with pytest.raises(InvalidRequestError, match="tools"):
        render(CHATML, [{"role": "user", "content": "a"}], special_tokens={}, tools=5)
