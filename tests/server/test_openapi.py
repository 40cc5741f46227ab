"""Whatever the server's own description lets a client send, the answer is no 5xx."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from servers import ServerProcess

schemathesis = pytest.importorskip("schemathesis")
pytest.importorskip("uvicorn")


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    """Answers are short there."""
    server = ServerProcess("quire/demo", "--max-model-len", "48")
    yield server
    assert "Traceback" not in server.log
    server.stop()


def check(case) -> None:
    response = case.call(timeout=120)
    assert response.status_code < 500, response.text
    if response.status_code >= 400:
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    "num_examples", [5, pytest.param(60, marks=pytest.mark.slow)], ids=["few", "many"]
)
@pytest.mark.parametrize("mode", ["positive", "negative"])
def test_every_operation_with_what_fits_its_description_and_what_does_not(
    server: ServerProcess, mode: str, num_examples: int
) -> None:
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    generation_mode = schemathesis.GenerationMode(mode)
    num_operations = 0
    for result in schema.get_all_operations():
        operation = result.ok()
        num_operations += 1

        @settings(max_examples=num_examples, suppress_health_check=list(HealthCheck), deadline=None)
        @given(case=operation.as_strategy(generation_mode=generation_mode))
        def run(case) -> None:
            check(case)

        with contextlib.suppress(Unsatisfiable):  # nothing can be wrong with what takes nothing
            run()
    assert num_operations >= 10
