"""Settings of a worker: flags over environment variables over a TOML file. One parser reads all three.

A key of the file is a flag's name without its dashes (`memory-budget = "64MiB"`), a variable is the prefix and the
same name in capitals (`CLEAVE_TRUSTED_MEMORY_BUDGET`). Both become words of a command line, put before the real one,
so that a bad value gets the flag's own error. Keys and variables that name no flag are refused; an empty variable is
none. Of a flag that may be repeated the file may hold a list, and a variable holds one value; the first source that
has any decides. Secrets are never settings: flags name files that hold them.
"""

import argparse
import json
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_TRUTH = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
_META = ("help", "config", "print_config")


def parse(parser: argparse.ArgumentParser, arguments: list[str], prefix: str) -> dict[str, Any]:
    """Every setting by its name. Exits with 2 for what makes no sense, with 0 after --help and --print-config.

    The parser takes no abbreviations and has long flags only.
    """
    parser.add_argument("--config", metavar="FILE", help=f"TOML; flags and {prefix}* variables go before it")
    parser.add_argument("--print-config", action="store_true", help="print what the settings come to, and leave")
    actions = {one.option_strings[-1][2:]: one for one in parser._actions if one.dest not in _META}
    words: list[str] = []
    if not {"-h", "--help"}.intersection(arguments):
        for key, value in _around(parser, arguments, prefix).items():
            if key not in actions:
                parser.error(f"there is no setting {key}; --help lists them")
            if not any(word.partition("=")[0] == f"--{key}" for word in arguments):
                words += _words(parser, key, value, actions[key])
    resolved = vars(parser.parse_args([*words, *arguments]))
    if resolved["print_config"]:
        print(as_toml({key: resolved[action.dest] for key, action in actions.items()}))
        parser.exit()
    return {name: value for name, value in resolved.items() if name not in _META}


def stream_address(text: str) -> str:
    """`text` itself: unix:PATH or vsock:CID:PORT. Raises ValueError for anything else."""
    kind, _, rest = text.partition(":")
    numbers = rest.split(":")
    vsock = len(numbers) == 2 and all(one.isascii() and one.isdecimal() and int(one) < 1 << 32 for one in numbers)
    if not (kind == "unix" and rest) and not (kind == "vsock" and vsock):
        raise ValueError(f"{text!r} is neither unix:PATH nor vsock:CID:PORT")
    return text


def stream_beside(listen: str) -> str | None:
    """The stream socket of a GPU worker that listens there for gRPC, where no other is named."""
    return f"{listen}.stream" if listen.startswith("unix:") else None


def as_toml(settings: Mapping[str, Any]) -> str:
    """The settings as a file that `--config` reads; what is not set is left out."""
    given = {key: value for key, value in settings.items() if value is not None}
    return "\n".join(f"{key} = {json.dumps(value, default=str, ensure_ascii=False)}" for key, value in given.items())


def _around(parser: argparse.ArgumentParser, arguments: list[str], prefix: str) -> dict[str, Any]:
    """What the environment says, and below it the file that the command line or the environment names."""
    first = argparse.ArgumentParser(prog=parser.prog, usage=argparse.SUPPRESS, add_help=False, allow_abbrev=False)
    first.add_argument("--config", default=os.environ.get(f"{prefix}CONFIG") or None)
    settings = _from_file(parser, first.parse_known_args(arguments)[0].config)
    for name, value in os.environ.items():
        if name.startswith(prefix) and name != f"{prefix}CONFIG" and value:
            settings[name.removeprefix(prefix).lower().replace("_", "-")] = value
    return settings


def _from_file(parser: argparse.ArgumentParser, path: str | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        return tomllib.loads(Path(path).read_text("utf-8"))
    except (OSError, ValueError) as error:
        parser.error(f"{path} is not a readable TOML file: {error}")


def _words(parser: argparse.ArgumentParser, key: str, value: Any, action: argparse.Action) -> list[str]:
    """The setting as words of a command line."""
    if action.nargs == 0:
        truth = _TRUTH.get(str(value).lower())
        if truth is None:
            parser.error(f"{key} must be true or false")
        return [f"--{key}"] if truth else []
    values = value if isinstance(value, list) and isinstance(action, argparse._AppendAction) else [value]
    if any(isinstance(one, bool | list | dict) for one in values):
        parser.error(f"{key} must be one string or number")
    return [f"--{key}={one}" for one in values]
