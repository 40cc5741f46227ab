"""Adapters in the server: a name is a model, and what it is may change under the requests that run.

The oracle is the same engine, which is told the adapter's folder for each call.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import pytest_asyncio

httpx = pytest.importorskip("httpx")
openai = pytest.importorskip("openai")
pytest.importorskip("fastapi")

from adapters import write_adapter  # noqa: E402
from prometheus_client.parser import text_string_to_metric_families  # noqa: E402
from servers import ServerProcess  # noqa: E402

import quire.demo  # noqa: E402
from quire import LLM, LoRARequest, SamplingParams  # noqa: E402
from quire.async_llm import AsyncLLM  # noqa: E402
from quire.server.app import build_app  # noqa: E402
from quire.server.service import Service  # noqa: E402
from quire.server.settings import ServerSettings  # noqa: E402

MODEL = Path(quire.demo.__file__).parent / "model"
PROMPT = "The capital of France is"
GREEDY = {"temperature": 0, "max_tokens": 12, "ignore_eos": True}
PARAMS = SamplingParams(**GREEDY)
HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three adapters; ``start/a`` and ``start/b`` are there from the start, ``more/c`` is not."""
    top = tmp_path_factory.mktemp("adapters").resolve()
    for seed, name in enumerate(("start/a", "start/b", "more/c")):
        write_adapter(top / name, MODEL, seed=seed, rank=2 + seed)
    return top


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    with LLM(
        "quire/demo",
        dtype="float32",
        num_gpu_blocks_override=512,
        max_num_seqs=8,
        enable_lora=True,
        max_loras=2,
        max_lora_rank=8,
        max_cpu_loras=2,  # fewer than there are
        lora_modules=[
            f"a={folder}/start/a",
            {"name": "org/b", "path": f"{folder}/start/b", "base_model_name": "their/model"},
        ],
    ) as llm:
        yield llm


@pytest.fixture
def expected(llm: LLM):
    """What an adapter answers, by its folder; None is the model."""

    def text(path: Path | None, prompt: str = PROMPT) -> str:
        request = None if path is None else LoRARequest("oracle", lora_path=str(path))
        [output] = llm.generate([prompt], PARAMS, use_tqdm=False, lora_request=request)
        return output.outputs[0].text

    return text


@pytest.fixture
def allowed(tmp_path: Path, folder: Path) -> Path:
    """A directory of this test's own, from which adapters may be loaded."""
    for name, source in (("a", "start/a"), ("b", "start/b"), ("c", "more/c")):
        shutil.copytree(folder / source, tmp_path / "allowed" / name)
    return tmp_path / "allowed"


def make_service(llm: LLM, **settings) -> Service:
    settings = ServerSettings(served_model_names=("demo", "quire/demo"), **settings)
    return Service(AsyncLLM.from_llm(llm), settings, llm.get_tokenizer())


def client_of(service: Service) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(build_app(service))
    return httpx.AsyncClient(transport=transport, base_url="http://server", timeout=60)


@pytest.fixture
def service(llm: LLM, allowed: Path) -> Iterator[Service]:
    """One whose clients may load adapters; what they have loaded is gone afterwards."""
    before = {each.lora_name for each in llm.list_loras()}
    yield make_service(llm, allow_runtime_lora_updating=True, allowed_lora_dirs=(str(allowed),))
    for each in llm.list_loras():
        if each.lora_name not in before:
            llm.unload_lora(each.lora_name)


@pytest_asyncio.fixture
async def http(service: Service) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(service) as client:
        yield client


async def complete(http: httpx.AsyncClient, model: str | None, prompt: object = PROMPT) -> str:
    answer = await http.post("/v1/completions", json={"model": model, "prompt": prompt, **GREEDY})
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["text"]


async def load(http: httpx.AsyncClient, name: str, path: str, **fields) -> httpx.Response:
    body = {"lora_name": name, "lora_path": path, **fields}
    return await http.post("/v1/load_lora_adapter", json=body)


async def unload(http: httpx.AsyncClient, name: str) -> httpx.Response:
    return await http.post("/v1/unload_lora_adapter", json={"lora_name": name})


async def names(http: httpx.AsyncClient) -> list[str]:
    return [card["id"] for card in (await http.get("/v1/models")).json()["data"]]


def message(answer: httpx.Response, status: int) -> str:
    assert answer.status_code == status, answer.text
    return answer.json()["error"]["message"]


@contextmanager
def standing_still(llm: LLM) -> Iterator[None]:
    """Hold the engine between two steps."""
    held, go_on = threading.Event(), threading.Event()

    def hold(engine: object) -> None:
        held.set()
        go_on.wait(20)

    thread = threading.Thread(target=llm._call, args=(hold,))
    thread.start()
    try:
        assert held.wait(20)
        yield
    finally:
        go_on.set()
        thread.join()


async def in_flight(service: Service, count: int) -> None:
    """Wait until the engine has been handed as many requests."""
    end = time.monotonic() + 20
    while service.llm.num_unfinished_requests < count:
        assert time.monotonic() < end
        await asyncio.sleep(0.005)


# -- by name ---------------------------------------------------------------------------------------


async def test_each_name_answers_with_its_adapter_alone_and_in_a_mixture(
    http, folder, expected
) -> None:
    """All at once, more adapters than a step has room for: each has what it has alone."""
    models = {"demo": None, "a": "start/a", "org/b": "start/b", "late": "more/c"}
    assert (await load(http, "late", "c")).status_code == 200
    wanted = {name: expected(path and folder / path) for name, path in models.items()}
    assert len(set(wanted.values())) == 4
    for name, text in wanted.items():
        assert await complete(http, name) == text
    many = [*models] * 4
    assert await asyncio.gather(*(complete(http, name) for name in many)) == [
        wanted[name] for name in many
    ]
    assert await complete(http, None) == wanted["demo"]


async def test_every_endpoint_takes_an_adapter_for_a_model(http, llm, folder) -> None:
    """Chats, responses, streams, vectors, tokens; the answer names what was asked for."""
    request = LoRARequest("oracle", lora_path=str(folder / "start/b"))
    [said] = llm.chat(HELLO, PARAMS, use_tqdm=False, lora_request=request)
    text = said.outputs[0].text
    client = openai.AsyncOpenAI(
        api_key="EMPTY", base_url="http://server/v1", http_client=http, max_retries=0
    )
    extra = {"extra_body": {"ignore_eos": True}}
    chat = await client.chat.completions.create(
        model="org/b", messages=HELLO, temperature=0, max_tokens=12, **extra
    )
    assert (chat.model, chat.choices[0].message.content) == ("org/b", text)
    pieces = [
        chunk
        async for chunk in await client.chat.completions.create(
            model="org/b", messages=HELLO, temperature=0, max_tokens=12, stream=True, **extra
        )
    ]
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == text
    assert {piece.model for piece in pieces} == {"org/b"}
    # Older clients have no responses.
    fields = {"model": "org/b", "input": "Hello", "temperature": 0, "max_output_tokens": 12}
    response = (await http.post("/v1/responses", json={**fields, "ignore_eos": True})).json()
    assert (response["model"], response["output"][0]["content"][0]["text"]) == ("org/b", text)
    [vector] = llm.embed([PROMPT], use_tqdm=False, lora_request=request)
    found = await client.embeddings.create(model="org/b", input=PROMPT, encoding_format="float")
    assert found.data[0].embedding == pytest.approx(vector.outputs.embedding, abs=1e-5)
    base = await client.embeddings.create(model="demo", input=PROMPT, encoding_format="float")
    assert found.data[0].embedding != pytest.approx(base.data[0].embedding, abs=1e-2)
    for path, body in (("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [5]})):
        assert (await http.post(path, json={"model": "a", **body})).status_code == 200


async def test_models_are_listed_with_their_parent(http, folder, allowed) -> None:
    """Those of the start and those that came later, with the path as it was written."""
    began = int(time.time())
    loaded = (await load(http, "late", "c")).json()
    listed = {card["id"]: card for card in (await http.get("/v1/models")).json()["data"]}
    assert list(listed) == ["demo", "quire/demo", "a", "org/b", "late"]
    assert listed["late"] == loaded
    assert loaded["created"] >= began
    assert {name: (card["parent"], card["root"]) for name, card in listed.items()} == {
        "demo": (None, "quire/demo"),
        "quire/demo": (None, "quire/demo"),
        "a": ("demo", f"{folder}/start/a"),
        "org/b": ("their/model", f"{folder}/start/b"),
        "late": ("demo", "c"),
    }
    for name, card in listed.items():
        assert (await http.get(f"/v1/models/{name}")).json() == card
    assert "late" in message(await http.get("/v1/models/nobody"), 404)


async def test_an_unknown_model_is_told_who_is_there(http) -> None:
    for path, body in (
        ("/v1/completions", {"prompt": "a"}),
        ("/v1/chat/completions", {"messages": HELLO}),
        ("/v1/responses", {"input": "a"}),
        ("/v1/embeddings", {"input": "a"}),
        ("/tokenize", {"prompt": "a"}),
    ):
        answer = await http.post(path, json={"model": "nobody", **body})
        assert message(answer, 404).endswith("this server has demo, quire/demo, a, org/b")
        assert answer.json()["error"]["code"] == "model_not_found"


# -- coming and going ------------------------------------------------------------------------------


async def test_an_adapter_comes_and_goes(http, folder, expected) -> None:
    assert (await load(http, "mine", "c")).status_code == 200
    assert await complete(http, "mine") == expected(folder / "more/c")
    gone = await unload(http, "mine")
    assert gone.json() == {"id": "mine", "object": "model", "deleted": True}
    answer = await http.post("/v1/completions", json={"model": "mine", "prompt": "a"})
    assert "'mine' is not served here" in message(answer, 404)
    assert "no adapter 'mine'" in message(await unload(http, "mine"), 404)
    assert (await load(http, "mine", "b")).status_code == 200
    assert await complete(http, "mine") == expected(folder / "start/b")


async def test_a_name_that_is_taken_is_replaced_only_on_demand(http, folder, expected) -> None:
    """And then at once, whether the folder is another one or the same with other content."""
    await load(http, "mine", "b")
    assert "loaded already" in message(await load(http, "mine", "c"), 400)
    assert "loaded already" in message(await load(http, "mine", "c", load_inplace=False), 400)
    assert await complete(http, "mine") == expected(folder / "start/b")
    assert (await load(http, "mine", "c", load_inplace=True)).status_code == 200
    assert await complete(http, "mine") == expected(folder / "more/c")
    assert (await names(http)).count("mine") == 1


async def test_a_name_means_what_was_read_until_it_is_loaded_again(http, allowed, expected) -> None:
    """Files that change under it change nothing, with prefixes in the cache or without."""
    await load(http, "mine", "c")
    before = await complete(http, "mine")
    write_adapter(allowed / "c", MODEL, seed=77, rank=3)
    assert await complete(http, "mine") == before
    assert (await load(http, "mine", "c", load_inplace=True)).status_code == 200
    after = await complete(http, "mine")
    assert after == expected(allowed / "c")
    assert after != before


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc/self/fd")
async def test_what_left_memory_is_read_again_from_the_files_that_were_checked(
    http, llm, allowed, tmp_path
) -> None:
    """Though its folder leads out by now; the others of the engine have taken its room."""
    await load(http, "mine", "c")
    before = await complete(http, "mine")
    write_adapter(tmp_path / "outside", MODEL, seed=78)
    (allowed / "c").rename(tmp_path / "away")
    (allowed / "c").symlink_to(tmp_path / "outside")
    for name in ("a", "org/b"):
        await complete(http, name)
    reads = llm._open_maker().adapters.num_reads
    assert await complete(http, "mine") == before
    assert llm._open_maker().adapters.num_reads == reads + 1


@pytest.mark.parametrize("how", ["replaced", "unloaded"])
async def test_requests_that_run_finish_on_what_they_began_with(
    http, service, llm, folder, expected, how
) -> None:
    """The new content, or nobody, has the name from the moment of the answer on."""
    old, new = expected(folder / "more/c"), expected(folder / "start/b")
    await load(http, "mine", "c")
    with standing_still(llm):
        running = [asyncio.ensure_future(complete(http, "mine")) for _ in range(3)]
        await in_flight(service, 3)
        if how == "replaced":
            assert (await load(http, "mine", "b", load_inplace=True)).status_code == 200
            later = asyncio.ensure_future(complete(http, "mine"))
        else:
            assert (await unload(http, "mine")).status_code == 200
            assert "mine" not in await names(http)
    assert await asyncio.gather(*running) == [old] * 3
    if how == "replaced":
        assert await later == new


async def test_the_prompts_of_one_request_are_answered_by_one_adapter(
    http, service, llm, folder, expected
) -> None:
    """Those, too, that were not yet in the engine when the name got another one."""
    prompts = [f"{PROMPT} {i}" for i in range(12)]  # the engine runs 8 at once
    wanted = [expected(folder / "more/c", prompt) for prompt in prompts]
    await load(http, "mine", "c")
    with standing_still(llm):
        body = {"model": "mine", "prompt": prompts, **GREEDY}
        running = asyncio.ensure_future(http.post("/v1/completions", json=body))
        await in_flight(service, 8)
        await load(http, "mine", "b", load_inplace=True)
    choices = (await running).json()["choices"]
    assert [choice["text"] for choice in choices] == wanted


async def test_changes_of_one_name_come_one_after_the_other(http, folder, expected) -> None:
    """Of many that load it at once one does; then it is whole, whatever came and went."""
    answers = await asyncio.gather(*(load(http, "mine", "c") for _ in range(6)))
    assert sorted(answer.status_code for answer in answers) == [200] + [400] * 5
    mixed = [
        *(load(http, "mine", path, load_inplace=True) for path in ("b", "c", "b", "c")),
        *(unload(http, "mine") for _ in range(3)),
        *(complete(http, "a") for _ in range(3)),
    ]
    for answer in await asyncio.gather(*mixed):
        assert isinstance(answer, str) or answer.status_code in (200, 404)
    assert (await load(http, "mine", "b", load_inplace=True)).status_code == 200
    assert await complete(http, "mine") == expected(folder / "start/b")


async def test_others_are_served_while_an_adapter_is_read(http, llm, monkeypatch) -> None:
    """Reading waits on a thread, with the name free for nobody else."""
    reading, go_on = threading.Event(), threading.Event()
    original = LLM.load_lora

    def slow(self, *args, **kwargs):
        reading.set()
        assert go_on.wait(20)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(LLM, "load_lora", slow)
    loading = asyncio.ensure_future(load(http, "mine", "c"))
    while not reading.is_set():
        await asyncio.sleep(0.005)
    assert await complete(http, "a")
    assert "mine" not in await names(http)
    go_on.set()
    assert (await loading).status_code == 200


async def test_a_client_that_goes_away_leaves_nothing_half_done(http, monkeypatch) -> None:
    """What it asked for happens; the name can be changed afterwards."""
    reading, go_on = threading.Event(), threading.Event()
    original = LLM.load_lora

    def slow(self, *args, **kwargs):
        reading.set()
        assert go_on.wait(20)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(LLM, "load_lora", slow)
    loading = asyncio.ensure_future(load(http, "mine", "c"))
    while not reading.is_set():
        await asyncio.sleep(0.005)
    loading.cancel()
    await asyncio.gather(loading, return_exceptions=True)
    go_on.set()
    assert (await unload(http, "mine")).status_code == 200
    assert "mine" not in await names(http)


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("", "not empty"),
        (" ", "not empty"),
        ("a\nb", "control characters"),
        ("a\0", "control characters"),
        ("\u202eevil", "control characters"),
        (" a", "spaces around"),
        ("x" * 257, "256 characters"),
        ("demo", "the model itself"),
        ("quire/demo", "the model itself"),
    ],
)
async def test_a_name_that_cannot_be_is_refused(http, name, word) -> None:
    answer = await load(http, name, "c", load_inplace=True)
    assert word in message(answer, 400)
    assert answer.json()["error"]["param"] == "lora_name"


@pytest.mark.parametrize("name", ["org/mine", "../c", "mine?x=1&y#z", "日本語", "a=b", "x" * 256])
async def test_names_may_be_strange(http, folder, expected, name) -> None:
    assert (await load(http, name, "c")).status_code == 200
    assert await complete(http, name) == expected(folder / "more/c")
    assert (await unload(http, name)).status_code == 200


async def test_an_adapter_that_does_not_fit_is_refused_with_the_readers_words(
    http, allowed, llm
) -> None:
    """In the client's own words for the path, and nothing stays behind."""
    write_adapter(allowed / "big", MODEL, rank=16)
    for name in ("corrupt", "short", "odd", "pickled"):
        shutil.copytree(allowed / "c", allowed / name)
    (allowed / "corrupt" / "adapter_config.json").write_text("{")
    tensors = allowed / "short" / "adapter_model.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-100])
    write_adapter(allowed / "odd", MODEL, peft_type="IA3")
    (allowed / "pickled" / "adapter_model.safetensors").rename(
        allowed / "pickled" / "adapter_model.bin"
    )
    descriptors = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    for path, word in (
        ("big", "16"),
        ("corrupt", "JSON"),
        ("short", "truncated"),
        ("odd", "IA3"),
        ("pickled", "adapter_model.bin"),
    ):
        answer = await load(http, "mine", path)
        text = message(answer, 400)
        assert word in text
        assert path in text
        assert "quire-adapter-" not in text
        assert str(allowed) not in text
        assert answer.json()["error"]["param"] == "lora_path"
    assert "mine" not in await names(http)
    if descriptors:
        assert len(os.listdir("/proc/self/fd")) <= descriptors
    # A failure in place leaves what was there.
    await load(http, "mine", "c")
    before = await complete(http, "mine")
    message(await load(http, "mine", "corrupt", load_inplace=True), 400)
    assert await complete(http, "mine") == before


async def test_paths_that_lead_out_are_refused(http, allowed, folder) -> None:
    """See test_adapter_directories.py for all the ways; here they end in an answer."""
    (allowed / "out").symlink_to(folder / "start" / "a")
    (allowed / "half").mkdir()
    for file in (folder / "start" / "a").iterdir():
        (allowed / "half" / file.name).symlink_to(file)
    for path in (
        "out",
        "half",
        str(folder / "start" / "a"),
        "/nothing",
        "../allowed/c",
        "~",
        "a\0",
    ):
        message(await load(http, "mine", path), 400)
    assert "mine" not in await names(http)
    assert (await load(http, "mine", str(allowed / "c"))).status_code == 200


async def test_clients_change_nothing_unless_they_may(llm, folder) -> None:
    """The answer is the same whatever they name, and says what would let them."""
    async with client_of(make_service(llm)) as http:
        for path in ("c", str(folder / "more/c"), "/nothing"):
            text = message(await load(http, "mine", path), 403)
            assert "--allow-runtime-lora-updating" in text
        assert "--allowed-lora-dirs" in message(await unload(http, "a"), 403)
        assert await complete(http, "a")


async def test_keys_guard_adapters_as_they_guard_the_rest(llm, allowed) -> None:
    service = make_service(
        llm,
        api_keys=("right",),
        allow_runtime_lora_updating=True,
        allowed_lora_dirs=(str(allowed),),
    )
    async with client_of(service) as http:
        message(await load(http, "mine", "c"), 401)
        message(await unload(http, "a"), 401)
        http.headers["Authorization"] = "Bearer right"
        assert (await load(http, "mine", "c")).status_code == 200
        assert (await unload(http, "mine")).status_code == 200


async def test_bodies_are_read_strictly(http) -> None:
    for body in ({"lora_name": "a"}, {"lora_path": "c"}, {"lora_name": 3, "lora_path": "c"},
                 {"lora_name": "mine", "lora_path": ["c"]},
                 {"lora_name": "mine", "lora_path": "c", "load_inplace": "yes"}):  # fmt: skip
        message(await http.post("/v1/load_lora_adapter", json=body), 400)
    message(await http.post("/v1/unload_lora_adapter", json={"lora_int_id": 1}), 400)
    answer = await http.post(
        "/v1/load_lora_adapter", json={"lora_name": "mine", "lora_path": "c", "odd": 1}
    )
    assert answer.headers["x-quire-unknown-fields"] == "odd"


# -- what is counted -------------------------------------------------------------------------------


async def test_metrics_name_the_adapters_of_requests(http, llm) -> None:
    """One sample, as vLLM's, whatever adapters there have been."""

    async def sample():
        text = (await http.get("/metrics")).text
        [family] = [
            family
            for family in text_string_to_metric_families(text)
            if family.name == "quire:lora_requests_info"
        ]
        [found] = family.samples
        assert abs(found.value - time.time()) < 30
        return found.labels

    nobody = {"max_lora": "2", "running_lora_adapters": "", "waiting_lora_adapters": ""}
    assert await sample() == nobody
    long = {"prompt": PROMPT, "max_tokens": 120, "ignore_eos": True}
    tasks = [
        asyncio.ensure_future(http.post("/v1/completions", json={"model": name, **long}))
        for name in ("a", "org/b", "demo")
    ]
    seen = set()
    while not all(task.done() for task in tasks):
        labels = await sample()
        seen |= {labels["running_lora_adapters"], labels["waiting_lora_adapters"]}
        await asyncio.sleep(0.01)
    assert "a,org/b" in seen
    assert await sample() == nobody


# -- a whole server --------------------------------------------------------------------------------


def test_a_server_with_adapters_from_its_command_line(folder, expected) -> None:
    """A process of its own, OpenAI's client, a key."""
    server = ServerProcess(
        "quire/demo", "--dtype", "float32", "--enable-lora", "--max-lora-rank", "8",
        "--lora-modules", f"a={folder}/start/a", "--api-key", "k",
        "--allow-runtime-lora-updating", "--allowed-lora-dirs", str(folder / "more"),
    )  # fmt: skip
    try:
        client = openai.OpenAI(api_key="k", base_url=f"{server.url}/v1", max_retries=0)
        assert [model.id for model in client.models.list()] == ["quire/demo", "a"]
        http = httpx.Client(base_url=server.url, headers={"Authorization": "Bearer k"}, timeout=60)
        body = {"lora_name": "c", "lora_path": str(folder / "start/b")}
        assert http.post("/v1/load_lora_adapter", json=body).status_code == 400
        body["lora_path"] = "c"
        assert http.post("/v1/load_lora_adapter", json=body).status_code == 200
        for name, path in (("quire/demo", None), ("a", "start/a"), ("c", "more/c")):
            done = client.completions.create(
                model=name, prompt=PROMPT, temperature=0, max_tokens=12,
                extra_body={"ignore_eos": True},
            )  # fmt: skip
            assert done.choices[0].text == expected(path and folder / path)
        client.close()
        http.close()
    finally:
        assert server.stop() == 0
    assert "Traceback" not in server.log
