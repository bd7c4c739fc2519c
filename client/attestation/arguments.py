"""Flags of `cleave attest`. Standard library only, as all of the command line."""

import argparse
from datetime import UTC, datetime
from pathlib import Path

MAX_VCPUS = 4096
VMMS = ("QEMU", "ec2", "gce")


def add_attest(parser: argparse.ArgumentParser, parser_class: type[argparse.ArgumentParser]) -> None:
    """Add the flags of `cleave attest` itself, and its actions."""
    _add_connect(parser)
    actions = parser.add_subparsers(dest="action", parser_class=parser_class, metavar="ACTION")
    _add_verify(actions.add_parser("verify", help="judge a report or a quote in a file; nothing is sent anywhere"))
    _add_measure(actions.add_parser("measure", help="the measurement that an image must have, as a policy entry"))
    model = actions.add_parser("model", help="the digest that a worker must claim for a model, as a policy entry")
    model.add_argument("--model", type=Path, required=True, metavar="DIR", help="folder in Hugging Face layout")
    model.add_argument("--json", action="store_true", help="one JSON object: model, model_digest")


def check_attest(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Leave with status 2 when there is no action and nobody to ask, or both."""
    if options.action is None and (options.connect is None or options.policy is None):
        parser.error("give --connect HOST:PORT and --policy FILE, or an action: `cleave attest --help` lists them")
    if options.action is not None and (options.connect or options.save):
        parser.error("--connect and --save go without an action")


def _add_connect(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("a worker that runs").add_argument
    add("--connect", metavar="HOST:PORT", help="ask this trusted worker for evidence over a fresh nonce, and judge it")
    add("--policy", type=Path, metavar="FILE", help="what is accepted, in TOML; docs/attestation.md")
    add("--save", type=Path, metavar="FILE", help="write what it answered, for `cleave attest verify --evidence`")
    add("--json", action="store_true", help="one JSON object: verdict, provider, at, steps, advice")


def _add_verify(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--evidence",
        type=Path,
        required=True,
        metavar="FILE",
        help="a SEV-SNP report or TDX quote, binary or in hex; or a bundle that --save wrote",
    )
    add(
        "--certs",
        type=Path,
        nargs="+",
        action="extend",
        default=[],
        metavar="FILE",
        help="SEV-SNP: VCEK or VLEK, ASK and ARK, in PEM or DER, in any order",
    )
    add("--policy", type=Path, required=True, metavar="FILE", help="what is accepted, in TOML; docs/attestation.md")
    add("--at", type=_time, metavar="TIME", help="judge as of then: 2025-06-20 or 2025-06-20T12:00; default: now")
    add(
        "--collateral",
        type=Path,
        nargs="+",
        action="extend",
        default=[],
        metavar="FILE",
        help="TDX: one JSON object from Intel's PCS; SEV-SNP: revocation lists",
    )
    add("--report-data", type=_report_data, metavar="HEX", help="the 64 bytes that the evidence must be bound to")
    add("--json", action="store_true", help="one JSON object: verdict, provider, at, steps, advice")


def _add_measure(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--ovmf", type=Path, required=True, metavar="FILE", help="the firmware")
    add("--kernel", type=Path, metavar="FILE", help="with kernel-hashes=on: the kernel")
    add("--initrd", type=Path, metavar="FILE", help="and its initial RAM disk")
    add("--append", metavar="TEXT", help="and its command line")
    add("--vcpus", type=_vcpus, required=True, metavar="N", help="virtual CPUs of the guest: they are measured too")
    add("--vcpu-type", default="EPYC-v4", metavar="NAME", help="as QEMU's -cpu; default: %(default)s")
    add("--vmm", choices=VMMS, default="QEMU", help="who starts the guest; default: %(default)s")
    add("--guest-features", type=_features, default=1, metavar="N", help="SEV features of the guest; default: 0x1")
    add("--output", type=Path, metavar="FILE", help="write the entry there; default: stdout")


def _time(text: str) -> datetime:
    """UTC unless the text has a zone."""
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        raise argparse.ArgumentTypeError("must be a date or a time as in 2025-06-20T12:00") from None
    return time if time.tzinfo else time.replace(tzinfo=UTC)


def _report_data(text: str) -> bytes:
    try:
        value = bytes.fromhex(text)
    except ValueError:
        value = b""
    if len(value) != 64:
        raise argparse.ArgumentTypeError("must be 64 bytes in hexadecimal")
    return value


def _vcpus(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= MAX_VCPUS:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 to {MAX_VCPUS}")
    return int(text)


def _features(text: str) -> int:
    try:
        value = int(text, 0)
    except ValueError:
        value = -1
    if not 0 <= value < 1 << 64:
        raise argparse.ArgumentTypeError("must be a number as in 0x1")
    return value
