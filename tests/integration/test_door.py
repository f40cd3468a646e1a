"""What comes through the door of a federation (scripts/deploy/door.py), and what does not."""

from __future__ import annotations

import asyncio
import importlib.util
from collections.abc import AsyncIterator, Sequence
from types import ModuleType

import httpx
import pytest

from fedlabel.hardware import PACKAGE_ROOT

NODE = "/v1/fleet/push-messages"


@pytest.fixture
def door(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The program as a module, for requests of at most 100 bytes."""
    found = importlib.util.spec_from_file_location("door", PACKAGE_ROOT / "scripts" / "deploy" / "door.py")
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    monkeypatch.setattr(module, "LARGEST", 100)
    return module


class SuperLink(httpx.AsyncBaseTransport):
    """Reads whole requests, and answers with their size."""

    def __init__(self) -> None:
        self.paths: list[str] = []

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        size = len(await request.aread())
        self.paths.append(request.url.path)
        return httpx.Response(200, stream=httpx.ByteStream(str(size).encode()))


def ask(door: ModuleType, path: str, body: bytes | Sequence[bytes] = b"") -> tuple[int, str, list[str]]:
    """Returns status and text of the door's answer, and the paths that came through; a list of bytes is sent without
    saying how many there are.
    """
    superlink = SuperLink()

    async def parts() -> AsyncIterator[bytes]:
        for part in body:
            assert isinstance(part, bytes)
            yield part

    async def asked() -> httpx.Response:
        behind = httpx.AsyncClient(base_url="https://superlink", transport=superlink)
        transport = httpx.ASGITransport(door.application(behind))
        async with behind, httpx.AsyncClient(base_url="https://door", transport=transport) as client:
            return await client.post(path, content=body if isinstance(body, bytes) else parts())

    answer = asyncio.run(asked())
    return answer.status_code, answer.text, superlink.paths


def test_what_nodes_send_comes_through_whole(door: ModuleType) -> None:
    assert ask(door, NODE, b"x" * 100) == (200, "100", [NODE])
    assert ask(door, NODE, [b"x" * 60, b"y" * 40]) == (200, "100", [NODE])


@pytest.mark.parametrize("body", [b"x" * 101, [b"x" * 60, b"y" * 41]], ids=["said to be", "found to be"])
def test_what_is_too_large_does_not_come_through(door: ModuleType, body: bytes | list[bytes]) -> None:
    status, text, through = ask(door, NODE, body)
    assert status == 413
    assert text == door.TOO_LARGE
    assert through == []


@pytest.mark.parametrize("path", ["/v1/control/start-run", "/v1/fleet/../control/start-run", "/v1/fleet/%2e%2e/x", "/"])
def test_nothing_but_the_way_of_nodes_comes_through(door: ModuleType, path: str) -> None:
    assert ask(door, path)[::2] == (403, [])
