"""The command line of `cleave`: flags, their ranges, and which of them go together. Standard library only."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from client.attestation.arguments import add_attest, check_attest
from client.values import absolute, bandwidth, integer, named_folder, number, token_ids
from wire.profiles import PROFILES

DEMO_MODEL = Path(__file__).resolve().parents[1] / "models" / "demo"
DEFAULT_LISTEN = "127.0.0.1:7750"
DEFAULT_HTTP = "127.0.0.1:8080"
SCHEMES = ("secure-infer", "kv-shield", "split", "plain", "tee-only")
DEFAULT_SCHEME = "secure-infer"
_LOCAL_DEFAULTS = {"memory_budget": None, "pad_bank": "64MiB", "device": "auto", "more": ()}


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Print one line and leave with status 2."""
        hint = f"; `{self.prog} --help` lists what there is" if message.startswith("unrecognized") else ""
        self.exit(2, f"{self.prog}: {message}{hint}\n")


class _More(argparse.Action):
    """Passed on to the trusted worker as it is: collected in `more`."""

    def __call__(self, parser: object, namespace: argparse.Namespace, values: Any, option: str | None = None) -> None:
        given = [] if values == [] else [str(values)]
        namespace.more = (*(namespace.more or ()), str(option), *given)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line; leaves with status 2 when it makes no sense."""
    parser = Parser(allow_abbrev=False, prog="cleave", description="Private LLM inference, split between two workers.")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser, metavar="COMMAND")
    chat = commands.add_parser("chat", help="talk to a model, or ask it once with --prompt")
    _add_chat(chat)
    up = commands.add_parser("up", help="run both workers until stopped, for `cleave chat --connect`")
    _add_up(up)
    gateway = commands.add_parser("gateway", help="an OpenAI API on this machine, in front of a verified worker")
    _add_gateway(gateway)
    _add_budget(commands.add_parser("budget", help="what a model costs under every scheme; runs nothing"))
    attest = commands.add_parser("attest", help="ask a worker for evidence, verify evidence, measure images")
    add_attest(attest, Parser)
    commands.add_parser("doctor", help="say what this machine can do and what is missing")
    options, unknown = parser.parse_known_args(argv)
    if unknown:
        commands.choices[options.command].error(f"unrecognized arguments: {' '.join(unknown)}")
    if options.command in ("chat", "up", "gateway"):
        _check_cluster({"chat": chat, "up": up, "gateway": gateway}[options.command], options)
    if options.command == "gateway" and bool(options.connect) != bool(options.policy):
        gateway.error("--connect and --policy go together; without them a cluster is started, with a policy of its own")
    if options.command == "gateway" and options.connect and options.record:
        gateway.error("--record needs a cluster of its own: with --connect the GPU worker is somebody else's")
    if options.command == "chat":
        _check_chat(chat, options)
    if options.command == "attest":
        check_attest(attest, options)
    return options


def _add_chat(parser: argparse.ArgumentParser) -> None:
    _add_cluster(parser)
    _add_one_shot(parser)
    _add_generation(parser)
    _add_connection(parser)


def _add_up(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--listen", default=DEFAULT_LISTEN, metavar="HOST:PORT", help="default: %(default)s")
    parser.add_argument(
        "--insecure-plaintext",
        action="store_true",
        help="listen on an address that other machines reach, without evidence: clients cannot tell who answers them",
    )
    parser.add_argument(
        "--policy-file",
        type=Path,
        metavar="FILE",
        help="where the policy for `cleave chat --connect` is written; default: a private temporary folder",
    )
    _add_cluster(parser)


def _add_gateway(parser: argparse.ArgumentParser) -> None:
    _add_cluster(parser)
    add = parser.add_argument_group("connection").add_argument
    add("--connect", metavar="HOST:PORT", help="the trusted worker; default: start a cluster")
    add("--policy", type=Path, metavar="FILE", help="with --connect: what it must prove, in TOML; docs/attestation.md")
    add("--credit", type=integer(1, 4096), default=8, metavar="N", help="most tokens in flight; default: %(default)s")
    add("--timeout", type=number(1, 86400), default=120.0, metavar="SECONDS", help="longest wait for a token")
    add = parser.add_argument_group("HTTP").add_argument
    add("--listen", dest="http", default=DEFAULT_HTTP, metavar="HOST:PORT", help="default: %(default)s; port 0: any")
    add(
        "--record",
        action="store_true",
        help="the web page shows what the GPU worker sees: at most 192 MiB in a private temporary folder",
    )
    add("--insecure-listen", action="store_true", help="listen where other machines read prompts on their way")
    add("--api-key-file", type=Path, metavar="FILE", help="clients must send the key in it as a bearer token")


def _add_budget(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", required=True, metavar="MODEL", help="a model folder, a config.json, or shape:NAME (shape:? lists)")
    add("--context", type=integer(1, 1 << 31), required=True, metavar="N", help="tokens, prompt and answer together")
    add("--scheme", choices=SCHEMES, help="default: all")
    add("--precision", choices=("float32", "int8"), help="default: int8 where a scheme has both")
    add("--rope", choices=("trusted", "worker"), default="trusted", help="of kv-shield; default: %(default)s")
    add("--projections", choices=("trusted", "gpu"), default="gpu", help="of secure-infer; default: %(default)s")
    add("--stock", type=integer(1, 1 << 31), default=64, metavar="N", help="pads in the bank; default: %(default)s")
    add("--rtt-us", type=number(0, 1e9), metavar="T", help="round trip to the GPU worker, microseconds")
    add("--bandwidth", type=bandwidth, metavar="RATE", help="of that link, per second: 10Gbit, 500MB, 1GiB")
    add("--json", action="store_true", help="one JSON object, in bytes and numbers")


def _add_cluster(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("model and scheme").add_argument
    add("--model", type=Path, default=DEMO_MODEL, metavar="DIR", help="a folder in Hugging Face layout; default: demo")
    add("--scheme", choices=SCHEMES, default=DEFAULT_SCHEME, help="default: %(default)s")
    add("--precision", choices=("float32", "int8"), help="default: int8; float32 for kv-shield")
    add("--device", choices=("auto", "cpu", "cuda"), help="of the GPU worker; default: auto")
    add(
        "--data-plane",
        action=_More,
        dest="more",
        choices=("grpc", "stream"),
        help="between the workers; default: stream, a socket beside gRPC",
    )
    add(
        "--model-key-file",
        action=_More,
        dest="more",
        type=absolute,
        metavar="FILE",
        help="key of a model that `seal-model` sealed",
    )
    _add_memory(parser.add_argument_group("memory of the trusted worker").add_argument)
    _add_adapters(parser.add_argument_group("adapters and released logits").add_argument)
    _add_kv_shield(parser.add_argument_group("kv-shield").add_argument)


def _add_memory(add: Callable[..., argparse.Action]) -> None:
    """Those of `more` are read by the trusted worker, which says what is wrong with them."""
    add("--memory-budget", metavar="SIZE", help="secure memory, exactly; default: 64MiB")
    add("--pad-bank", metavar="SIZE", help="sealed pads parked outside the budget; default: 64MiB")
    for flag, choices, metavar, text in (
        (
            "--tee-profile",
            PROFILES,
            "NAME",
            f"secure memory as a TEE has it: {', '.join(PROFILES)} (with --memory-budget)",
        ),
        ("--process-memory", None, "SIZE", "most memory of the whole process; 0: no limit; default: what it needs"),
        ("--kv-dtype", None, "T", "elements of KV caches: float32, float16, int8; default: float32"),
        ("--projections", None, "WHERE", "of secure-infer, qkv and o: gpu, trusted, or auto: measure; default: gpu"),
        ("--embed", None, "WHO", "client: embeddings of the tokens come from here; default: auto"),
        ("--switch-us", None, "N", "charge N microseconds for each exchange, as a world switch; default: 0"),
    ):
        add(flag, action=_More, dest="more", choices=choices, metavar=metavar, help=text)
    add(
        "--insecure-unchecked-tiles",
        action=_More,
        dest="more",
        nargs=0,
        help="weights from disk are used without comparing their digests: to measure what that costs",
    )


def _add_adapters(add: Callable[..., argparse.Action]) -> None:
    """Flags that the trusted worker reads; it says what is wrong with them."""
    for flag, reader, metavar, text in (
        ("--adapter-memory", None, "SIZE", "of the budget, for LoRA adapters; default: what --adapter needs"),
        (
            "--insecure-clear-adapter",
            named_folder,
            "NAME=DIR",
            "one for every client, in the clear on this disk",
        ),
        ("--least-perturbation", None, "B", "of all released logits; default: 0"),
    ):
        add(flag, action=_More, dest="more", type=reader, metavar=metavar, help=text)


def _add_kv_shield(add: Callable[..., argparse.Action]) -> None:
    """Flags that the trusted worker reads; it says what is wrong with them."""
    add(
        "--rope",
        action=_More,
        dest="more",
        metavar="WHERE",
        help="worker: permute V only, one crossing a layer; default: trusted",
    )
    add(
        "--rotate-every", action=_More, dest="more", metavar="N", help="new permutations every N tokens; default: never"
    )
    add("--seal-idle", action=_More, dest="more", nargs=0, help="park the cache of an idle conversation, sealed")


def _add_one_shot(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("one shot").add_argument
    add(
        "--prompt",
        metavar="TEXT",
        help="answer this and leave",
    )
    add("--token-ids", type=token_ids, metavar="1,2,3", help="a prompt that needs no tokenizer")
    add(
        "--json",
        action="store_true",
        help="with --prompt or --token-ids: one JSON object in the last line of stdout. tokens_per_second is the "
        "decode rate: (completion_tokens - 1) / (time after the first token); null for fewer than two tokens. Counters "
        "are differences over the answer, of all sessions of the trusted worker",
    )
    add("--logprobs", type=integer(1, 64), default=0, metavar="N", help="report N log-probabilities per token")


def _add_generation(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("generation").add_argument
    add("--max-new-tokens", type=integer(1, 1 << 20), default=256, metavar="N", help="default: %(default)s")
    add("--max-context", type=integer(1, 1 << 24), default=0, metavar="N", help="default: the most there is")
    add("--temperature", type=number(0, 100), default=0.0, metavar="T", help="default: 0, greedy")
    add("--top-p", type=number(0, 1), default=0.0, metavar="P", help="default: off")
    add("--top-k", type=integer(0, 1 << 20), default=0, metavar="K", help="default: off")
    add("--repetition-penalty", type=number(0.01, 100), default=0.0, metavar="R", help="default: off")
    add("--seed", type=integer(0, (1 << 64) - 1), metavar="N", help="default: from the operating system")
    add("--adapter", type=Path, metavar="DIR", help="a LoRA adapter that PEFT saved; the trusted worker alone sees it")
    add("--served-adapter", metavar="NAME", help="one that the worker's operator has loaded")
    add("--perturbation", type=number(0, 8), default=0.0, metavar="B", help="logits are off by at most B; default: 0")
    add("--stop", action="append", default=[], metavar="TEXT", help="end the answer before this text; repeatable")


def _add_connection(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("connection").add_argument
    add("--connect", metavar="HOST:PORT", help="use this trusted worker; default: start a cluster for this chat")
    add(
        "--policy",
        type=Path,
        metavar="FILE",
        help="with --connect: what the worker must prove, in TOML; docs/attestation.md",
    )
    add("--credit", type=integer(1, 4096), default=8, metavar="N", help="most tokens in flight; default: %(default)s")
    add("--timeout", type=number(1, 86400), default=120.0, metavar="SECONDS", help="longest wait for a token")
    add(
        "--insecure-unattested",
        action="store_true",
        help="with --connect: talk to another machine that proves nothing; whoever answers there reads your prompts",
    )


def default_precision(scheme: str) -> str:
    """What a scheme computes in when nothing is said."""
    return "float32" if scheme == "kv-shield" else "int8"


def _check_cluster(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    options.precision = options.precision or default_precision(options.scheme)
    if options.scheme == "secure-infer" and options.precision != "int8":
        parser.error("--scheme secure-infer computes in integers: it needs --precision int8")
    if options.scheme == "kv-shield" and options.precision != "float32":
        parser.error("--scheme kv-shield computes in float32: leave --precision out")
    for name, default in _LOCAL_DEFAULTS.items():
        if getattr(options, name) is None:
            setattr(options, name, default)
        elif options.command != "up" and options.connect:
            flag = options.more[0] if name == "more" else f"--{name.replace('_', '-')}"
            parser.error(f"{flag} belongs to `cleave up`, not to --connect")


def _check_chat(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    if options.prompt is not None and options.token_ids is not None:
        parser.error("give --prompt or --token-ids, not both")
    one_shot = options.prompt is not None or options.token_ids is not None
    if not one_shot and (options.json or options.logprobs):
        parser.error("--json and --logprobs need --prompt or --token-ids")
    if options.adapter and options.served_adapter:
        parser.error("give --adapter or --served-adapter, not both")
    if options.logprobs and not options.json:
        parser.error("--logprobs needs --json")
    if options.policy and not options.connect:
        parser.error("--policy needs --connect: a cluster that this command starts comes with a policy of its own")
    if options.insecure_unattested and not options.connect:
        parser.error("--insecure-unattested needs --connect: a cluster that this command starts comes with evidence")
    if options.policy and options.insecure_unattested:
        parser.error("--policy wants evidence, --insecure-unattested wants none: leave one out")
