"""The JSON-Schema-Test-Suite, token by token: no library lets an invalid instance through.

The suite lies in the source distribution of jsonschema, which is fetched for the test.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import pytest

from quire.errors import InvalidRequestError
from quire.structured.backends import load_constraint_backend
from quire.structured_outputs import StructuredOutputsParams

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def suite(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("suite")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:"]
    done = subprocess.run(
        [*command, "jsonschema==4.26.0", "-d", str(folder)], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip("the source of jsonschema cannot be fetched")
    cases = []
    with tarfile.open(next(folder.glob("jsonschema-*.tar.gz"))) as archive:
        for member in sorted(archive.getnames()):
            path = Path(member)
            if path.match("json/tests/draft2020-12/*.json"):
                file = archive.extractfile(member)
                assert file is not None
                cases += json.load(file)
    return cases


@pytest.mark.parametrize("name", ["llguidance", "outlines_core", "xgrammar"])
def test_no_invalid_instance_is_accepted(name, suite, vocabulary, tokenizer, capsys):
    pytest.importorskip(name)
    backend = load_constraint_backend(name, vocabulary, 30.0)
    counts: Counter[str] = Counter()
    wrong = []
    for case in suite:
        schema = case["schema"]
        try:
            params = StructuredOutputsParams(
                json=json.dumps(schema) if isinstance(schema, bool) else schema,
                disable_any_whitespace=True,
            )
            compiled = backend.compile(params.spec)
        except InvalidRequestError:
            counts["refused"] += 1
            continue
        counts["compiled"] += 1
        for test in case["tests"]:
            text = json.dumps(test["data"], separators=(",", ":"), ensure_ascii=False)
            walker = compiled.start()
            try:
                walker.accept(tokenizer.encode_fragment(text))
                accepted = walker.is_accepting()
            except InvalidRequestError:
                accepted = False
            counts[f"{accepted} {test['valid']}"] += 1
            if accepted and not test["valid"]:
                wrong.append((case["description"], text))
    with capsys.disabled():
        print(
            f"\n{name}: {counts['compiled']} schemas compiled, {counts['refused']} refused; "
            f"{counts['False True']} valid instances refused, {counts['True True']} accepted"
        )
    assert not wrong
    assert counts["compiled"] > 20
    assert counts["True True"] > counts["False True"]
