"""`TenSafeAsyncEngine` without vLLM: who is asked, what is refused, what happens to embedded services."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.outputs import CompletionOutput, RequestOutput

from tensorguard.backends.vllm import TenSafeAsyncEngine, TenSafeVLLMConfig, sources
from tensorguard.backends.vllm import engine as engine_module
from tensorguard.backends.vllm.config import AdapterConnection
from tensorguard.backends.vllm.routing import ModelRoute, ServedAdapter
from tensorguard.backends.vllm.rows import ADAPTER_ARGUMENT
from tensorguard.errors import (
    AbortedError,
    ConfigurationError,
    EvidenceRefusedError,
    InvalidInputError,
    NotFoundError,
    PackageError,
)
from tensorguard.stack.services import PackagedAdapter, TlsFiles
from tensorguard.stack.stack import Trust

KEYS = (Path("/publisher.pem"),)


class Tokenizer:
    def apply_chat_template(self, messages: list[dict[str, str]], **options: Any) -> str:
        assert options == {"add_generation_prompt": True, "tokenize": False}
        return "".join(f"<{m['role']}>{m['content']}" for m in messages) + "<assistant>"

    def __call__(self, text: str, add_special_tokens: bool) -> Any:
        assert not add_special_tokens
        return SimpleNamespace(input_ids=[ord(character) for character in text])


class Llm:
    """Answers with the given pieces; notes what it was asked."""

    vllm_config = model_config = renderer = input_processor = None

    def __init__(self) -> None:
        self.pieces: list[tuple[str, str | None]] = [("Hello", None), (" you", "stop")]
        self.asked: list[tuple[dict[str, Any], Any, str]] = []
        self.aborted: list[str] = []

    async def generate(self, prompt: Any, parameters: Any, request_id: str) -> AsyncIterator[RequestOutput]:
        self.asked.append((prompt, parameters, request_id))
        for text, finish in self.pieces:
            choice = CompletionOutput(0, text, [1], None, None, finish_reason=finish)
            yield RequestOutput("r", None, [1], None, [choice], finished=finish is not None)

    async def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)

    def get_tokenizer(self) -> Tokenizer:
        return Tokenizer()


class Core:
    """In the place of EngineCore."""

    def __init__(self, on_detached: Any = None, he_lora: bool = True) -> None:
        self.llm, self.he_lora, self.on_detached = Llm(), he_lora, on_detached
        self.adapters: dict[str, ServedAdapter] = {}
        self.added: list[AdapterConnection] = []
        self.refuse: Exception | None = None
        self.asked, self.go = asyncio.Event(), asyncio.Event()
        self.go.set()
        self.stopped = 0

    async def add_adapter(self, connection: AdapterConnection) -> ServedAdapter:
        self.added.append(connection)
        self.asked.set()
        await self.go.wait()
        if self.refuse is not None:
            raise self.refuse
        replaced = self.adapters.get(connection.name)
        served = ServedAdapter(connection.name, connection.expected_digest or "00" * 32, 1)
        self.adapters[connection.name] = served
        if replaced is not None:
            asyncio.get_running_loop().create_task(self.on_detached(replaced))
        return served

    async def remove_adapter(self, name: str) -> None:
        if name not in self.adapters:
            raise NotFoundError(name)
        await self.on_detached(self.adapters.pop(name))

    def route(self, adapter: str | None) -> ModelRoute:
        if adapter is not None and adapter not in self.adapters:
            raise NotFoundError(adapter)
        return ModelRoute(self.llm, None if adapter is None else self.adapters[adapter])  # type: ignore[arg-type]

    def shutdown(self) -> None:
        self.stopped += 1


class Services:
    """In the place of embedded services."""

    def __init__(self, adapters: list[PackagedAdapter]) -> None:
        self.adapters, self.added, self.removed, self.closed = adapters, [], [], 0  # type: ignore[var-annotated]
        self.trust = Trust("attestor:1", "thumbprint", "first:1", Path("/root.pem"))

    def add(self, adapter: PackagedAdapter) -> Trust:
        self.added.append(adapter.digest)
        return Trust("attestor:1", "thumbprint", f"added-{len(self.added)}:1", Path("/root.pem"))

    def remove(self, adapter: PackagedAdapter) -> None:
        self.removed.append(adapter.digest)

    def close(self) -> None:
        self.closed += 1


class Bench:
    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.folder = folder
        self.cores: list[Core] = []
        self.services: list[Services] = []
        self.told: dict[str, Any] = {}
        monkeypatch.setattr(engine_module.EngineCore, "start", self._start)
        monkeypatch.setattr(sources, "find_adapter", self._find)
        monkeypatch.setattr(sources, "start_embedded", self._embedded)

    def package(self, name: str) -> Path:
        """A package whose digest is made of its file name; "red-2" is another release of "red"."""
        path = self.folder / f"{name}.tssp"
        path.touch()
        return path

    def engine(self, **options: Any) -> TenSafeAsyncEngine:
        given = {"model": "m", "enable_he_lora": True, "state_dir": self.folder / "state"}
        return TenSafeAsyncEngine(TenSafeVLLMConfig(**{**given, **options}))

    async def _start(self, _options: Any, connections: Any = (), **told: Any) -> Core:
        self.told = told
        core = Core(told.get("on_detached"), told.get("he_lora", True))
        for connection in connections:
            await core.add_adapter(connection)
        self.cores.append(core)
        return core

    def _find(self, path: Path, _state: Any, name: str | None, *_: Any) -> PackagedAdapter:
        found = path.stem.partition("-")[0]
        return PackagedAdapter(name or found, path, "tenant", digest(path.stem), KEYS)

    def _embedded(self, _settings: Any, adapters: list[PackagedAdapter]) -> Services:
        self.services.append(Services(adapters))
        return self.services[-1]


def digest(stem: str) -> str:
    return stem.encode().hex().ljust(64, "0")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Bench:
    return Bench(monkeypatch, tmp_path)


def adapter_asked(core: Core) -> str | None:
    extra = core.llm.asked[-1][1].extra_args
    return None if extra is None else str(extra[ADAPTER_ARGUMENT]).partition("@")[0]


async def test_several_packages_share_one_embedded_coprocessor(bench: Bench) -> None:
    engine = bench.engine(tssp_package_path=bench.package("red"), adapters=(bench.package("blue"),))
    core: Any = await engine.start()
    assert [c.name for c in core.added] == ["red", "blue"] == list(engine.adapters)
    assert {c.coprocessor_endpoint for c in core.added} == {"first:1"}
    assert bench.told["simulated_root_key"] == Path("/root.pem") and not bench.told["require_attestation"]
    await engine.shutdown()
    assert (core.stopped, bench.services[0].closed, engine.adapters) == (1, 1, ())


@pytest.mark.parametrize("permitted", [False, True])
async def test_plaintext_to_other_machines_is_as_configured(bench: Bench, permitted: bool) -> None:
    engine = bench.engine(tssp_package_path=bench.package("red"), plaintext_network=permitted)
    await engine.start()
    assert bench.told["plaintext_network"] is permitted
    await engine.shutdown()


async def test_embedded_services_with_tls_are_reached_with_it(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    tls = TlsFiles(Path("/authority.pem"), Path("/secret"), Path("/gateway"))
    trust = Trust("attestor:1", "thumbprint", "first:1", Path("/root.pem"), tls)
    monkeypatch.setattr(Services, "add", lambda *_: trust)
    engine = bench.engine(tssp_package_path=bench.package("red"))
    core: Any = await engine.start()
    await engine.add_adapter(bench.package("blue"))
    assert [connection.attestor_authority for connection in core.added] == [None, tls.authority]
    await engine.shutdown()


async def test_a_package_that_is_given_twice_is_refused(bench: Bench) -> None:
    with pytest.raises(ConfigurationError, match="red is given twice"):
        await bench.engine(adapters=(bench.package("red"), bench.package("red-2"))).start()
    assert not bench.services


async def test_requests_choose_an_adapter_by_name_and_never_quietly_the_base_model(bench: Bench) -> None:
    engine = bench.engine(adapters=(bench.package("red"), bench.package("blue")))
    core: Any = await engine.start()
    assert await engine.generate("x", adapter="blue") == "Hello you"
    assert adapter_asked(core) == "blue"
    await engine.generate("x", use_adapter=False)
    assert adapter_asked(core) is None
    with pytest.raises(InvalidInputError, match=r"red, blue"):
        await engine.generate("x")
    with pytest.raises(NotFoundError):
        await engine.generate("x", adapter="green")
    await engine.remove_adapter("red")
    await engine.generate("x")
    assert adapter_asked(core) == "blue"
    await engine.remove_adapter("blue")
    asked = len(core.llm.asked)
    with pytest.raises(NotFoundError, match="use_adapter=False"):
        await engine.generate("x")
    assert len(core.llm.asked) == asked


async def test_an_engine_without_adapters_answers_with_the_base_model(bench: Bench) -> None:
    engine = bench.engine(enable_he_lora=False)
    assert await engine.generate("x") == "Hello you"
    assert adapter_asked(bench.cores[0]) is None
    with pytest.raises(ConfigurationError, match="enable_he_lora"):
        await engine.add_adapter(bench.package("red"))


async def test_chat_puts_messages_into_the_template(bench: Bench) -> None:
    engine = bench.engine(adapters=(bench.package("red"),))
    messages = [{"role": "user", "content": "Hi"}]
    assert await engine.chat(messages, max_tokens=3) == "Hello you"
    assert [piece async for piece in engine.chat_stream(messages)] == ["Hello", " you"]
    prompt, parameters, _ = bench.cores[0].llm.asked[0]
    assert "".join(map(chr, prompt["prompt_token_ids"])) == "<user>Hi<assistant>"
    assert parameters.max_tokens == 3
    with pytest.raises(InvalidInputError, match="template"):
        await engine.chat([{"content": "no role"}])


async def test_an_aborted_request_is_not_a_short_answer(bench: Bench) -> None:
    engine = bench.engine(adapters=(bench.package("red"),))
    core: Any = await engine.start()
    core.llm.pieces = [("Hel", None), ("", "abort")]
    received = []
    with pytest.raises(AbortedError):
        async for piece in engine.generate_stream("x", request_id="mine"):
            received.append(piece)
            await engine.abort("mine")
    assert (received, core.llm.aborted, core.llm.asked[0][2]) == (["Hel"], ["mine"], "mine")


async def test_what_vllm_refuses_is_a_typed_error(bench: Bench) -> None:
    engine = bench.engine(adapters=(bench.package("red"),))
    with pytest.raises(InvalidInputError, match="temperature"):
        await engine.generate("x", temperature=-1.0)


async def test_an_added_package_has_a_coprocessor_of_its_own_until_it_is_replaced(bench: Bench) -> None:
    engine = bench.engine(adapters=(bench.package("red"),))
    core: Any = await engine.start()
    services = bench.services[0]
    assert await engine.add_adapter(str(bench.package("blue"))) == "blue"
    assert core.added[-1].coprocessor_endpoint == "added-1:1"
    assert await engine.add_adapter(bench.package("blue-2"), name="blue") == "blue"
    await asyncio.sleep(0.05)
    assert (services.added, services.removed) == ([digest("blue"), digest("blue-2")], [digest("blue")])
    await engine.remove_adapter("blue")
    assert services.removed == [digest("blue"), digest("blue-2")]
    await engine.remove_adapter("red")  # of the coprocessor that all started with
    assert len(services.removed) == 2


async def test_a_refused_package_leaves_no_coprocessor(bench: Bench) -> None:
    engine = bench.engine(adapters=(bench.package("red"),))
    core: Any = await engine.start()
    core.refuse = PackageError("another base model")
    with pytest.raises(PackageError):
        await engine.add_adapter(bench.package("blue"))
    assert bench.services[0].removed == [digest("blue")]


@pytest.mark.parametrize("refused", [False, True])
async def test_an_addition_is_finished_without_the_caller_that_asked_for_it(bench: Bench, refused: bool) -> None:
    engine = bench.engine(adapters=(bench.package("red"),))
    core: Any = await engine.start()
    core.refuse = PackageError("another base model") if refused else None
    core.asked.clear()
    core.go.clear()
    adding = asyncio.create_task(engine.add_adapter(bench.package("blue")))
    await core.asked.wait()
    adding.cancel()
    await asyncio.wait([adding])
    assert (adding.cancelled(), bench.services[0].removed) == (True, [])
    core.go.set()
    await asyncio.sleep(0.05)
    assert ("blue" not in core.adapters) is refused
    assert bench.services[0].removed == ([digest("blue")] if refused else [])


async def test_the_same_release_is_not_served_twice(bench: Bench) -> None:
    engine = bench.engine(adapters=(bench.package("red"),))
    await engine.add_adapter(bench.package("blue"))
    with pytest.raises(ConfigurationError, match="already"):
        await engine.add_adapter(bench.package("blue"))
    assert bench.services[0].removed == []


@pytest.mark.parametrize(("required", "hardware_only"), [(None, True), (False, False)])
async def test_a_running_coprocessor_may_simulate_only_where_that_was_said(
    bench: Bench, required: bool | None, hardware_only: bool
) -> None:
    engine = bench.engine(adapters=(bench.package("red"),), require_attestation=required)
    core: Any = await engine.start()
    connection = AdapterConnection(
        name="blue", coprocessor_endpoint="c:1", attestor_endpoint="a:1", publisher_keys=KEYS
    )
    assert await engine.add_adapter(connection) == "blue"
    assert core.added[-1].require_attestation is hardware_only
    with pytest.raises(ConfigurationError, match="'blue'"):
        await engine.add_adapter(connection, name="green")


async def test_packages_need_services_that_may_simulate(bench: Bench) -> None:
    connection = AdapterConnection(
        name="blue", coprocessor_endpoint="c:1", attestor_endpoint="a:1", publisher_keys=KEYS
    )
    engine = bench.engine(adapters=(connection,))
    await engine.start()
    assert bench.told["require_attestation"] and not bench.services
    with pytest.raises(EvidenceRefusedError, match="require_attestation=False"):
        await engine.add_adapter(bench.package("red"))
    mixed = bench.engine(adapters=(connection, bench.package("red")))
    with pytest.raises(EvidenceRefusedError, match="require_attestation=False"):
        await mixed.start()
