"""`cleave gateway`: listens for OpenAI's clients, in front of a worker elsewhere or a cluster of its own.

It starts whether the trusted worker is verified or not, and says which: /ready and every call tell the same. Logs of
the libraries go through the list of wire/logs.py, so no part of a request gets into one; requests are not logged.
"""

import argparse
import asyncio
import contextlib
import socket
import sys
import tempfile
import threading
from dataclasses import dataclass, replace
from pathlib import Path

import uvicorn

from client.gateway.app import Gateway
from client.gateway.exposure import Exposure
from client.gateway.generation import Generations, Model
from client.gateway.guard import Guard
from client.gateway.link import Link
from client.session import Request
from client.talk import settings
from client.terminal import Progress, note, red
from client.tokenizer import Tokenizer
from deploy.local.cluster import Cluster
from wire import logs
from wire.channel import is_local
from wire.errors import DeniedError, InvalidArgumentError, UnavailableError
from wire.model_config import ModelConfig

RECORDED_SEGMENTS = 2  # of 64 MiB
STOP_SECONDS = 2  # for answers under way, when the gateway ends
MAX_KEY_BYTES = 4096


def run(options: argparse.Namespace) -> int:
    """Serve until a signal ends it. Raises UnavailableError when a worker of its own cluster ends by itself."""
    config, tokenizer, key = ModelConfig.from_hf(options.model), Tokenizer(options.model), _key(options.api_key_file)
    base = Request(config.name, options.scheme, options.precision, model_folder=options.model)
    model = Model(base, config.max_context, tokenizer, options.credit, options.timeout)
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(_listen(options.http, options.insecure_listen))
        cluster, target, policy = None, options.connect, options.policy
        record = _record(stack) if options.record else None
        if target is None:
            progress = Progress(sys.stderr, rewrite=False)
            workers = replace(settings(options), record=record, record_keep=RECORDED_SEGMENTS)
            cluster = stack.enter_context(Cluster(workers, progress, log=sys.stderr))
            target, policy = cluster.target, cluster.policy
        door = Door(listener, key, options.insecure_listen)
        _warn(options.http, key)
        logs.setup("gateway", "text")
        asyncio.run(_serve(door, target, policy, model, Exposure(model, record), cluster))
        if cluster:
            cluster.check()  # a worker that died ended this, and explains itself
    return 0


@dataclass(frozen=True)
class Door:
    """Where clients come in, and what they need for it."""

    listener: socket.socket
    key: bytes | None
    any_host: bool


def _record(stack: contextlib.ExitStack) -> Path:
    """A folder for what the GPU worker sees, which goes when the gateway ends."""
    return Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="cleave-seen-")))  # mode 0700


async def _serve(
    door: Door, target: str, policy: Path, model: Model, exposure: Exposure, cluster: Cluster | None
) -> None:
    """Until a signal, or the end of a worker of `cluster`."""
    link = Link(target, policy, note)
    generations = Generations(link, model)
    app = Guard(Gateway(link, generations, model, exposure).app(), door.key, door.any_host)
    server = uvicorn.Server(_config(app))
    if cluster:
        _stop_with(cluster, server)
    keeper = asyncio.create_task(link.keep())
    _greet(door, model.base)
    try:
        await server.serve([door.listener])
    finally:
        keeper.cancel()
        generations.close()
        await asyncio.gather(keeper, return_exceptions=True)


def _config(app: Guard) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http="h11",
        loop="asyncio",
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=STOP_SECONDS,
    )


def _stop_with(cluster: Cluster, server: uvicorn.Server) -> None:
    """End the server when a worker ends by itself; answers under way first get their errors."""

    def watch() -> None:
        with contextlib.suppress(UnavailableError):
            cluster.wait()
        server.should_exit = True

    threading.Thread(target=watch, name="cluster", daemon=True).start()


def _greet(door: Door, base: Request) -> None:
    """The base URL, and two ways to try it."""
    host, port = door.listener.getsockname()[:2]
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"
    body = f'{{"model": "{base.model}", "messages": [{{"role": "user", "content": "What is Cleave?"}}]}}'
    header, key = (' -H "Authorization: Bearer $KEY"', "KEY") if door.key else ("", "none")
    print(f"listening on {url}; stop with Ctrl-C", flush=True)
    print(f"curl {url}/chat/completions -H 'Content-Type: application/json'{header} -d '{body}'")
    print(
        f"python -c \"from openai import OpenAI; print(OpenAI(base_url='{url}', api_key='{key}').chat.completions"
        f".create(model='{base.model}', messages=[dict(role='user', content='What is Cleave?')])"
        '.choices[0].message.content)"',
        flush=True,
    )
    print(f"or open {url.removesuffix('v1')} in a browser", flush=True)


def _listen(address: str, insecure: bool) -> socket.socket:
    """A socket that listens. Raises DeniedError beyond loopback, InvalidArgumentError, UnavailableError."""
    host, _, port = address.rpartition(":")
    if address.startswith("unix:") or not host or not port.isdecimal() or int(port) > 65535:
        raise InvalidArgumentError(f"--listen {address}: give HOST:PORT")
    if not (is_local(address) or insecure):
        raise DeniedError(
            f"--listen {address} can be reached from other machines, and prompts cross the network in the clear: "
            "listen on 127.0.0.1, or add --insecure-listen (and --api-key-file)"
        )
    host = host.strip("[]")
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, int(port)), family=family, backlog=256)
    except OSError:
        raise UnavailableError(f"cannot listen on {address}: is the address in use?") from None


def _warn(address: str, key: bytes | None) -> None:
    """Of an address that other machines reach."""
    if not is_local(address):
        note(
            red("INSECURE: other machines reach this gateway, and prompts cross the network in the clear")
            + ("" if key else red("; without --api-key-file whoever reaches it may use it"))
        )


def _key(path: Path | None) -> bytes | None:
    """The API key: what a file holds, without white space around it. Raises InvalidArgumentError."""
    if path is None:
        return None
    try:
        with path.open("rb") as file:
            key = file.read(MAX_KEY_BYTES + 1).strip()
    except OSError as error:
        raise InvalidArgumentError(f"--api-key-file {path} cannot be read") from error
    if not 0 < len(key) <= MAX_KEY_BYTES or len(key.split()) != 1:
        raise InvalidArgumentError(f"--api-key-file {path} must hold one key, without spaces")
    return key
