"""What a notebook shows of engines and outputs: short, as text alone, and at no cost."""

from __future__ import annotations

import subprocess
import sys
from html.parser import HTMLParser

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from quire import LLM, AsyncLLM, SamplingParams
from quire.html import card
from quire.outputs import (
    CompletionOutput,
    EmbeddingOutput,
    EmbeddingRequestOutput,
    RequestOutput,
)

OURS = {"div", "b", "table", "tr", "th", "td"}


class Reader(HTMLParser):
    """Collects the tags, the attributes and the texts of the cells."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.cells = [], set(), []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag in ("th", "td", "b"):
            self.cells.append("")

    def handle_data(self, data):
        self.cells[-1] += data

    def handle_comment(self, data):
        raise AssertionError("a comment")

    handle_decl = handle_pi = unknown_decl = handle_comment


TEXTS = st.text(max_size=60) | st.sampled_from(
    ["<script>alert(1)</script>", "</td><img src=x onerror=alert(1)>", "&lt;b&gt;", "<!--", '" x="']
)


@given(title=TEXTS, rows=st.lists(st.tuples(TEXTS, TEXTS), max_size=4))
@example(title="a", rows=[("<script>", "</table><script>")])
def test_text_is_shown_and_never_obeyed(title, rows):
    """Whatever the texts are, the markup is ours, and the cells hold the texts."""
    read = Reader(card(title, rows))
    assert read.tags == ["div", "b", "table", *["tr", "th", "td"] * len(rows)]
    assert read.attributes <= {"style"}
    assert read.cells == [title, *(text for row in rows for text in row)]


def test_a_lone_surrogate_can_be_saved_with_the_notebook():
    assert "a?b" in card("t", [("x", "a\ud800b")]).encode().decode()


@given(st.integers(401, 10**6))
def test_long_texts_are_shown_by_their_ends(length):
    text = "<" + "x" * (length - 2) + ">"
    shown = card("t", [("prompt", text)])
    assert len(shown) < 1000
    cell = Reader(shown).cells[-1]
    assert cell.startswith("<x")
    assert cell.endswith("x>")


EVIL = "<script>alert('x')</script>"


def request_output(text, samples=1):
    completions = [CompletionOutput(i, text, [1, 2], finish_reason="stop") for i in range(samples)]
    return RequestOutput(EVIL, text, [5, 6, 7], outputs=completions, finished=True)


@pytest.mark.parametrize(
    "output",
    [
        request_output(EVIL),
        CompletionOutput(0, EVIL, [1], finish_reason="stop", stop_reason=EVIL),
        EmbeddingRequestOutput(EVIL, EmbeddingOutput([0.5] * 3), [1]),
    ],
    ids=lambda output: type(output).__name__,
)
def test_outputs_escape_what_users_and_models_wrote(output):
    shown = output._repr_html_()
    assert set(Reader(shown).tags) <= OURS
    assert "&lt;script&gt;" in shown


def test_outputs_are_short_however_much_there_is_to_them():
    """Long texts, many samples, long vectors, prompts of ids."""
    assert len(request_output("x" * 10**6, samples=1000)._repr_html_()) < 10_000
    vector = EmbeddingRequestOutput("1", EmbeddingOutput([0.5] * 10**5), [1] * 1000)
    assert len(vector._repr_html_()) < 1000
    ids = RequestOutput("1", None, list(range(10**5)))
    assert len(ids._repr_html_()) < 2000


def test_an_output_shows_what_it_says():
    cells = Reader(request_output("Paris", samples=2)._repr_html_()).cells
    assert cells.count("Paris") == 3  # the prompt, too
    assert "2 tokens, stop" in cells


def test_an_engine_is_shown_without_being_started(tiny_llama):
    """Its thread is not started; a closed one is shown as closed."""
    llm = LLM(tiny_llama, block_size=8, num_gpu_blocks_override=20)
    engine = AsyncLLM.from_llm(llm)
    for shown in (llm._repr_html_(), engine._repr_html_()):
        cells = Reader(shown).cells
        assert str(tiny_llama) in cells
        assert "open" in cells
        assert "19 blocks of 8 tokens" in cells
    assert llm.engine_loop._thread is None
    engine.close()
    assert "closed" in engine._repr_html_()
    assert "open" in llm._repr_html_()
    llm.close()
    for shown in (llm._repr_html_(), engine._repr_html_()):
        assert "closed" in Reader(shown).cells


def test_a_broken_engine_says_why(tiny_llama):
    with LLM(tiny_llama) as llm:
        llm.engine_loop._breakdown = RuntimeError(EVIL)
        assert "broke down: RuntimeError: &lt;script&gt;" in llm._repr_html_()


def test_a_langchain_model_shows_its_settings(tiny_llama):
    langchain = pytest.importorskip("quire.integrations.langchain")
    with langchain.VLLM(model=str(tiny_llama), temperature=0.25, stop=[EVIL]) as llm:
        read = Reader(llm._repr_html_())
        assert set(read.tags) <= OURS
        assert "0.25" in read.cells
        assert any(EVIL in cell.replace("\\'", "'") for cell in read.cells)
    assert "closed" in Reader(llm._repr_html_()).cells


NOTEBOOK = """
import sys, types, warnings
sys.modules["ipykernel"] = types.ModuleType("ipykernel")
sys.modules["ipykernel.zmqshell"] = types.ModuleType("ipykernel.zmqshell")
sys.modules["IPython"] = types.ModuleType("IPython")
sys.modules["IPython"].get_ipython = lambda: None
sys.modules["ipywidgets"] = None
sys.modules["IPython.html"] = None
warnings.simplefilter("error")
from quire.utils.progress import auto_tqdm
auto_tqdm()(total=1).close()
"""


def test_the_progress_bar_of_a_notebook_without_widgets_does_not_warn():
    """tqdm.auto warns on its first import there; the bar of text takes its place."""
    done = subprocess.run([sys.executable, "-c", NOTEBOOK], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr


def test_a_finished_stream_does_not_keep_its_engine(llm):
    """A variable may keep the stream for as long as the session lasts; an unread one does."""
    stream = llm.stream("ab", SamplingParams(max_tokens=2))
    assert stream._keep_alive is llm
    list(stream)
    assert stream._keep_alive is None
