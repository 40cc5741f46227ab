"""The adapter's README says what happens, and Outlines' own examples run on quire."""

import json
import re
from enum import Enum
from pathlib import Path
from typing import Annotated, Literal, Optional, Union

import pytest

pytest.importorskip("outlines", reason="the extra `outlines` is not installed")

import outlines
from pydantic import BaseModel, Field

from quire.integrations.outlines import models


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # what Outlines compiles with
def test_examples_run(repo_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every example of the README runs, one after the other, and prints what it promises."""
    text = (repo_root / "integrations" / "outlines" / "README.md").read_text()
    examples = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    scope: dict[str, object] = {}
    for example in examples:
        exec(compile(example, "README.md", "exec"), scope)
        printed = capsys.readouterr().out
        for promised in re.findall(r"# prints (.*)", example):
            assert promised in printed, (example, printed)
    assert len(examples) >= 6


# -- what Outlines' README does with a model -----------------------------------------------------


@pytest.fixture(scope="module")
def model():
    with models.vllm("quire/demo", chat=True) as model:
        yield model


def test_quickstart(model) -> None:
    """A choice, a number, and a review that is read by its class."""
    sentiment = model("Analyze: 'This changed my life!'", Literal["Positive", "Negative"])
    assert sentiment in ("Positive", "Negative")
    assert isinstance(int(model("What is 40 + 2 ?", int, max_tokens=20)), int)

    class Rating(Enum):
        poor = 1
        fair = 2
        good = 3

    class ProductReview(BaseModel):
        rating: Rating
        pros: list[Annotated[str, Field(max_length=20)]] = Field(max_length=2)
        summary: str = Field(max_length=60)

    review = model("Review: it has great battery life.", ProductReview, max_new_tokens=200)
    assert ProductReview.model_validate_json(review).rating in Rating


def test_a_ticket_is_routed(model) -> None:
    class TicketPriority(str, Enum):
        low = "low"
        urgent = "urgent"

    class ServiceTicket(BaseModel):
        priority: TicketPriority
        category: str = Field(max_length=20)
        requires_manager: bool
        action_items: list[Annotated[str, Field(max_length=20)]] = Field(max_length=1)

    ticket = model("My account is locked.", ServiceTicket, max_new_tokens=500)
    assert ServiceTicket.model_validate_json(ticket).priority in ("low", "urgent")


def test_a_list_of_prompts_is_a_batch(model) -> None:
    """Outlines' README hands a list to the model itself."""

    class ProductCategory(BaseModel):
        main_category: str = Field(max_length=20)
        brand_match: Optional[bool]

    template = outlines.Template.from_string("Categorize this product: {{ description }}")
    prompts = [template(description=text) for text in ("a phone", "a shirt", "a mixer")]
    categories = model(prompts, ProductCategory, max_new_tokens=200)
    assert len([ProductCategory.model_validate_json(category) for category in categories]) == 3


def test_an_event_or_a_way_out(model) -> None:
    class EventInfo(BaseModel):
        name: str = Field(max_length=20)
        registration_required: bool

    event = Union[EventInfo, Literal["I don't know"]]
    for seed in range(4):
        text = model("Tech event next week.", event, max_new_tokens=200, temperature=1, seed=seed)
        assert text == "I don't know" or EventInfo.model_validate_json(text)


def test_a_function_is_called_with_what_was_generated(model) -> None:
    def schedule_meeting(
        confirmed: bool, duration_minutes: Literal[30, 60, 90], location: Optional[bool] = None
    ):
        return confirmed, duration_minutes, location

    arguments = json.loads(model("Set up a meeting.", schedule_meeting, max_new_tokens=200))
    assert schedule_meeting(**arguments)[1] in (30, 60, 90)


def test_a_template_from_a_file(model, tmp_path: Path) -> None:
    path = tmp_path / "few_shot.txt"
    path.write_text(
        "{% for text, label in examples %}{{ text }}: {{ label }}\n{% endfor %}{{ query }}:"
    )
    template = outlines.Template.from_file(path)
    prompt = template(examples=[("The food was cold", "Negative")], query="Service was slow")
    assert model(prompt, Literal["Positive", "Negative"], chat=False) in ("Positive", "Negative")
