"""Readers of what follows a flag. Each raises argparse.ArgumentTypeError, which says what is expected."""

import argparse
import math
import re
from collections.abc import Callable
from pathlib import Path

RATES = {"Mbit": 1e6 / 8, "Gbit": 1e9 / 8, "MB": 1e6, "GB": 1e9, "MiB": 1 << 20, "GiB": 1 << 30}  # bytes


def integer(low: int, high: int) -> Callable[[str], int]:
    """A reader of whole numbers from `low` to `high`."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"must be a whole number from {low} to {high}")
        return value

    return read


def number(low: float, high: float) -> Callable[[str], float]:
    """A reader of numbers from `low` to `high`."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"must be a number from {low:g} to {high:g}")
        return value

    return read


def absolute(path: str) -> str:
    """A path that a process in another folder understands."""
    return str(Path(path).resolve())


def named_folder(text: str) -> str:
    """NAME=DIR, with such a path."""
    name, _, folder = text.partition("=")
    return f"{name}={absolute(folder)}" if folder else text  # which the trusted worker refuses


def bandwidth(text: str) -> float:
    """Bytes per second."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([A-Za-z]+)", text)
    if match is None or match[2] not in RATES or not float(match[1]):
        raise argparse.ArgumentTypeError(f"must be a number and one of {', '.join(RATES)}")
    return float(match[1]) * RATES[match[2]]


def token_ids(text: str) -> list[int]:
    """Ids with commas between them."""
    try:
        ids = [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError("must be whole numbers with commas between them") from None
    if not all(0 <= token_id < 1 << 32 for token_id in ids):
        raise argparse.ArgumentTypeError("a token id is out of range")
    return ids
