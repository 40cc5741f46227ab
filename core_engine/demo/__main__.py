"""``python -m quire.demo``: the embedded model answers through LangChain, and in a chat."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from quire.demo import MODEL_NAME

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
        right = expected in answer
        self.wrong += not right
        mark = "✓" if right else f"✗ expected {expected!r}"
        print(f"    {asked:<38} → {answer.strip()}  {mark}", flush=True)

    def took(self, what: str = "") -> None:
        """Tell the time since the step began."""
        print(f"    [{(time.perf_counter() - self._start) * 1000:.0f} ms{what}]", flush=True)


def langchain_part(show: Show) -> Callable[[], None]:
    """Answer, batch, stream and chain through LangChain's interface; return what closes it."""
    from langchain_core.output_parsers import StrOutputParser
    from langchain_core.prompts import PromptTemplate

    from quire.integrations.langchain import VLLM

    show.step("Load the model", f'llm = VLLM(model="{MODEL_NAME}", max_new_tokens=64)')
    llm = VLLM(model=MODEL_NAME, max_new_tokens=64, temperature=0.0)
    show.took()

    question = "What is the capital of France ?"
    show.step("Ask", f'llm.invoke("{question}")')
    show.line(question, llm.invoke(question), "Paris")
    show.took()

    expected = {
        "Japan": "Tokyo", "Kenya": "Nairobi", "Peru": "Lima", "Italy": "Rome",
        "Norway": "Oslo", "Egypt": "Cairo", "Canada": "Ottawa", "Fiji": "Suva",
    }  # fmt: skip
    questions = [f"What is the capital of {country} ?" for country in expected]
    show.step("Ask eight at once, in one running batch", "llm.batch(questions)")
    for asked, answer, capital in zip(
        questions, llm.batch([*questions]), expected.values(), strict=True
    ):
        show.line(asked, answer, capital)
    show.took(f", {len(questions)} answers")

    chain = (
        PromptTemplate.from_template("Question: {question}\n\nAnswer: Let's think step by step.")
        | llm
        | StrOutputParser()
    )
    question = "Who was the US president in the year the first Pokemon game was released?"
    show.step("Chain and stream", 'for piece in (prompt | llm | parser).stream({"question": …}):')
    print(f"    {question}\n    → ", end="", flush=True)
    pieces = []
    for piece in chain.stream({"question": question}):
        pieces.append(piece)
        print(piece.lstrip() if len(pieces) == 1 else piece, end="", flush=True)
    right = "Bill Clinton" in "".join(pieces)
    show.wrong += not right
    print("  ✓" if right else "  ✗ expected 'Bill Clinton'")
    show.took(f", {len(pieces)} pieces")
    return llm.close if hasattr(llm, "close") else lambda: None


def chat_part(show: Show) -> None:
    """Hold a conversation of two turns, and ask for a JSON record."""
    import json

    from quire import LLM, SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=64)
    with LLM(MODEL_NAME) as llm:
        show.step("Chat, two turns", "LLM.chat(messages)")
        messages: list[dict[str, str]] = []
        for asked, expected in (("My name is Ada.", "Ada"), ("What is my name?", "Ada")):
            messages.append({"role": "user", "content": asked})
            (output,) = llm.chat(messages, params, use_tqdm=False)
            answer = output.outputs[0].text
            messages.append({"role": "assistant", "content": answer})
            show.line(asked, answer, expected)
        show.took()

        asked = "Write a JSON record of a person."
        show.step("Write JSON", "json.loads(LLM.generate(…))")
        (output,) = llm.generate(asked, params, use_tqdm=False)
        text = output.outputs[0].text
        try:
            record = json.loads(text)
        except ValueError:
            record = None
        show.line(asked, text, "name" if isinstance(record, dict) else "valid JSON")
        show.took()


def main() -> int:
    """Run the show.

    Returns
    -------
    int
        0 when every answer was right, 1 otherwise.
    """
    try:
        import langchain_core  # noqa: F401
    except ImportError:
        print("this demo shows LangChain: pip install 'quire[langchain]'", file=sys.stderr)
        return 1
    print(f"{_RULE}\nquire: {MODEL_NAME} through LangChain, on this machine alone\n{_RULE}")
    start = time.perf_counter()
    show = Show()
    close = langchain_part(show)
    close()
    chat_part(show)
    seconds = time.perf_counter() - start
    verdict = "every answer right" if not show.wrong else f"{show.wrong} answers wrong"
    print(f"\n{_RULE}\n{verdict}, {seconds:.1f} s in all\n{_RULE}")
    return 1 if show.wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
