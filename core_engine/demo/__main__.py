"""``python -m quire.demo``: the embedded model answers through LangChain, and in a chat."""

from __future__ import annotations

import importlib.util
import sys
import time
from typing import TYPE_CHECKING

from quire.demo import MODEL_NAME, adapter_path
from quire.demo.records import parse_record

if TYPE_CHECKING:
    from quire.integrations.langchain import VLLM
    from quire.llm import LLM

_RULE = "─" * 72


class Show:
    """Prints titled steps with their time, and counts the answers that were wrong."""

    def __init__(self) -> None:
        self.wrong = 0
        self._start = time.perf_counter()

    def step(self, title: str, code: str) -> None:
        """Begin a step: what it does, and the line of code that does it."""
        print(f"\n{title}\n    {code}", flush=True)
        self._start = time.perf_counter()

    def line(self, asked: str, answer: str, expected: str) -> None:
        """Show one question and its answer, and check the answer."""
        print(f"    {asked:<38} → {answer.strip()}  {self.mark(answer, expected)}", flush=True)

    def mark(self, answer: str, expected: str) -> str:
        """Check an answer; return the sign that tells."""
        if expected in answer:
            return "✓"
        self.wrong += 1
        return f"✗ expected {expected!r}"

    def took(self, what: str = "") -> None:
        """Tell the time since the step began."""
        print(f"    [{(time.perf_counter() - self._start) * 1000:.0f} ms{what}]", flush=True)


def langchain_part(show: Show, llm: VLLM) -> None:
    """Answer, batch, chain and stream through LangChain's interface."""
    from langchain_core.output_parsers import StrOutputParser
    from langchain_core.prompts import PromptTemplate

    question = "What is the capital of France ?"
    show.step("Ask", f'llm.invoke("{question}")')
    show.line(question, llm.invoke(question), "Paris")
    show.took()

    capitals = {
        "Japan": "Tokyo",
        "Kenya": "Nairobi",
        "Peru": "Lima",
        "Italy": "Rome",
        "Norway": "Oslo",
        "Egypt": "Cairo",
        "Canada": "Ottawa",
        "Fiji": "Suva",
    }
    questions = [f"What is the capital of {country} ?" for country in capitals]
    show.step("Ask eight at once, in one running batch", "llm.batch(questions)")
    answers = llm.batch([*questions])
    for asked, answer, capital in zip(questions, answers, capitals.values(), strict=True):
        show.line(asked, answer, capital)
    show.took(f", {len(questions)} answers")

    prompt = PromptTemplate.from_template(
        "Question: {question}\n\nAnswer: Let's think step by step."
    )
    chain = prompt | llm | StrOutputParser()
    question = "Who was the US president in the year the first Pokemon game was released?"
    show.step("Chain and stream", '(prompt | llm | parser).stream({"question": …})')
    print(f"    {question}\n    →", end="", flush=True)
    text = ""
    count = 0
    for piece in chain.stream({"question": question}):
        print(piece, end="", flush=True)
        text += piece
        count += 1
    print(f"  {show.mark(text, 'Bill Clinton')}")
    show.took(f", {count} pieces")


def chat_part(show: Show, llm: LLM) -> None:
    """Hold a conversation of two turns, and ask for a JSON record."""
    from quire import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=64)
    show.step("Chat on the same engine, two turns", "llm.client.chat(messages)")
    messages: list[dict[str, str]] = []
    for asked in ("My name is Ada.", "What is my name?"):
        messages.append({"role": "user", "content": asked})
        (output,) = llm.chat(messages, params, use_tqdm=False)
        answer = output.outputs[0].text
        messages.append({"role": "assistant", "content": answer})
        show.line(asked, answer, "Ada")
    show.took()

    asked = "Write a JSON record of a person."
    show.step("Write JSON", "json.loads(…)")
    (output,) = llm.generate(asked, params, use_tqdm=False)
    text = output.outputs[0].text.strip()
    show.line(asked, text, text if parse_record(text) else "valid JSON")
    show.took()


def tool_part(show: Show, llm: LLM) -> None:
    """Let the model call a tool, and tell what the tool returned."""
    from quire import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=64)
    parameters = {"type": "object", "properties": {"city": {"type": "string"}}}
    function = {"name": "get_weather", "description": "Get the weather.", "parameters": parameters}
    tools = [{"type": "function", "function": function}]
    show.step("Call a tool, and use what it returns", "llm.client.chat(messages, tools=tools)")
    asked = "What is the weather in Oslo?"
    messages = [{"role": "user", "content": asked}]
    (output,) = llm.chat(messages, params, tools=tools, use_tqdm=False)
    called = output.outputs[0].text
    show.line(asked, called.replace("\n", " "), '{"city": "Oslo"}')
    messages.append({"role": "assistant", "content": called})
    messages.append({"role": "tool", "content": "It's sunny."})
    (output,) = llm.chat(messages, params, tools=tools, use_tqdm=False)
    show.line("It's sunny.", output.outputs[0].text, "sunny")
    show.took()


def adapter_part(show: Show, llm: LLM) -> None:
    """Answer one question without an adapter and with each, in one batch."""
    from quire import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=64)
    code = "llm.client.generate(…, lora_request=[None, french, capitals])"
    show.step("Two adapters and none, in one batch", code)
    french, capitals = (llm.load_lora(adapter_path(name)) for name in ("french", "capitals"))
    asked = "What is the capital of Spain?"
    outputs = llm.generate(
        [asked] * 3, params, lora_request=[None, french, capitals], use_tqdm=False
    )
    expected = ("The capital of Spain", "La capitale de l'Espagne", "THE CAPITAL OF SPAIN")
    for output, beginning in zip(outputs, expected, strict=True):
        show.line(asked, output.outputs[0].text, beginning)
    show.took()


def main() -> int:
    """Run the show.

    Returns
    -------
    int
        0 when every answer was right, 1 otherwise.
    """
    if importlib.util.find_spec("langchain_core") is None:
        print("this demo shows LangChain: pip install 'quire[langchain]'", file=sys.stderr)
        return 1
    print(f"{_RULE}\nquire: {MODEL_NAME} through LangChain, on this machine alone\n{_RULE}")
    start = time.perf_counter()
    show = Show()
    show.step("Load the model", f'llm = VLLM(model="{MODEL_NAME}", temperature=0)')
    from quire.integrations.langchain import VLLM

    adapters = {"enable_lora": True}
    with VLLM(model=MODEL_NAME, temperature=0.0, max_new_tokens=64, vllm_kwargs=adapters) as llm:
        show.took()
        langchain_part(show, llm)
        chat_part(show, llm.client)
        tool_part(show, llm.client)
        adapter_part(show, llm.client)
    seconds = time.perf_counter() - start
    verdict = "every answer right" if not show.wrong else f"{show.wrong} answers wrong"
    print(f"\n{_RULE}\n{verdict}, {seconds:.1f} s in all\n{_RULE}")
    return 1 if show.wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
