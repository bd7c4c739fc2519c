"""`cleave`: chat, up, gateway, budget, attest, doctor. Every error that we know of is one line on stderr and a non-zero
exit status.

Commands are imported when they run: `cleave doctor` and `cleave budget` must work where half of the packages are
missing.
"""

import argparse
import os
import sys

from client import flags
from client.terminal import one_line, unwind_on_signals

INTERRUPTED = 130


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    options = flags.parse(argv)
    if options.command == "doctor":
        from client import doctor

        return doctor.run(flags.DEMO_MODEL)
    unwind_on_signals()
    try:
        return _guarded(options)
    except ModuleNotFoundError as error:
        return _fail(options, f"the package {error.name} is missing: `cleave doctor` says what to install")
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the last flush complains as well
        return 1


def _guarded(options: argparse.Namespace) -> int:
    from wire.errors import CleaveError

    try:
        return _run(options)
    except CleaveError as error:
        return _fail(options, str(error))


def _run(options: argparse.Namespace) -> int:
    if options.command == "budget":
        from client import budget

        return budget.run(options)
    if options.command == "attest":
        from client.attestation import command

        return command.run(options)
    if options.command == "gateway":
        from client.gateway import command as gateway

        return gateway.run(options)
    from client import talk, up

    return talk.run(options) if options.command == "chat" else up.run(options)


def _fail(options: argparse.Namespace, text: str) -> int:
    print(f"cleave {options.command}: {one_line(text)}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
