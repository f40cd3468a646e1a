"""The only port of a SuperLink that others reach: forwards what nodes ask (/v1/fleet/) to it, and refuses all else.

Flower 1.41 has one port for nodes, for its own processes, and for whoever runs apps and registers keys (/v1/control/),
and asks only nodes who they are. So the SuperLink listens on this machine alone, and nodes come through here. A reverse
proxy such as nginx can do the same, see docs/deployment.md. Needs what Flower needs.

    python door.py --port 9092 --certificate server.crt --key server.key --superlink https://127.0.0.1:9091 --ca ca.crt
"""

from __future__ import annotations

import argparse
import ssl
from collections.abc import AsyncIterator

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

ALLOWED = "/v1/fleet/"
LARGEST = 2**31
"""Bytes of a request."""
TOO_LARGE = f"A request may have {LARGEST} bytes."
_OF_ONE_LEG = ("host", "connection", "transfer-encoding", "keep-alive", "te", "upgrade", "proxy-connection")
"""Headers that hold for one connection only."""


class TooLarge(Exception):
    """A request turns out to have more than `LARGEST` bytes."""


def application(client: httpx.AsyncClient) -> Starlette:
    """Returns the door; client: sends to the SuperLink."""

    async def forward(request: Request) -> Response:
        # The path as it was sent: decoded, "%2e%2e" or "//" could mean another one to the SuperLink.
        raw = request.scope["raw_path"].decode("latin-1").partition("?")[0]
        parts = raw.split("/")
        if not raw.startswith(ALLOWED) or "%" in raw or {".", ".."} & {*parts} or "" in parts[1:-1]:
            return PlainTextResponse("This door is for nodes alone.", 403)
        if int(request.headers.get("content-length", "0")) > LARGEST:
            return PlainTextResponse(TOO_LARGE, 413)
        headers = [(name, value) for name, value in request.headers.items() if name not in _OF_ONE_LEG]
        asked = client.build_request(
            request.method, raw, params=request.query_params, headers=headers, content=_body(request)
        )
        try:
            answer = await client.send(asked, stream=True)
        except TooLarge:
            return PlainTextResponse(TOO_LARGE, 413)
        except httpx.ConnectError:
            return PlainTextResponse("The SuperLink does not answer.", 503)
        kept = {name: value for name, value in answer.headers.items() if name not in _OF_ONE_LEG}
        return StreamingResponse(_answer(answer), answer.status_code, kept)

    return Starlette(routes=[Route("/{path:path}", forward, methods=["GET", "POST", "PUT", "DELETE"])])


async def _body(request: Request) -> AsyncIterator[bytes]:
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > LARGEST:
            raise TooLarge
        yield chunk


async def _answer(answer: httpx.Response) -> AsyncIterator[bytes]:
    try:
        async for chunk in answer.aiter_raw():
            yield chunk
    finally:
        await answer.aclose()


def main() -> None:
    """Listens until it is stopped."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--host", default="0.0.0.0", help="address to listen on")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--certificate", required=True, help="of the server, PEM")
    parser.add_argument("--key", required=True, help="its key, PEM")
    parser.add_argument("--superlink", required=True, help="e.g. https://127.0.0.1:9091")
    parser.add_argument("--ca", required=True, help="certificate authority of the SuperLink's certificate, PEM")
    given = parser.parse_args()
    trusted = ssl.create_default_context(cafile=given.ca)
    client = httpx.AsyncClient(base_url=given.superlink, verify=trusted, timeout=600.0, trust_env=False)
    uvicorn.run(
        application(client),
        host=given.host,
        port=given.port,
        ssl_certfile=given.certificate,
        ssl_keyfile=given.key,
        log_level="warning",
    )


if __name__ == "__main__":
    main()
