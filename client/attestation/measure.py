"""`cleave attest measure`: the launch measurement that SEV-SNP firmware will report for an image, as a policy entry.

The arithmetic is `sev-snp-measure`'s. The files are the caller's own; whoever rebuilds the image gets the same value.
"""

import argparse
import hashlib
import struct
from pathlib import Path
from types import ModuleType

from client.attestation.rules import SEV_SNP
from wire.errors import InvalidArgumentError

# What sev-snp-measure raises for firmware that it cannot read
_UNREADABLE = (RuntimeError, ValueError, AssertionError, KeyError, IndexError, TypeError, struct.error)


def run(options: argparse.Namespace) -> int:
    """Print or write the entry; 0. Raises InvalidArgumentError."""
    entry = _entry(options, _measure(options))
    if options.output is None:
        print(entry, end="")
        return 0
    try:
        options.output.write_text(entry, "utf-8")
    except OSError as error:
        raise InvalidArgumentError(f"{options.output} cannot be written") from error
    return 0


def _measure(options: argparse.Namespace) -> str:
    try:
        from sevsnpmeasure import guest, vcpu_types, vmm_types
        from sevsnpmeasure.sev_mode import SevMode
    except ModuleNotFoundError as error:
        raise InvalidArgumentError("the package sev-snp-measure is missing: pip install 'cleave[measure]'") from error
    if options.kernel is None and (options.initrd or options.append):
        raise InvalidArgumentError("--initrd and --append are measured with --kernel only")
    signature = vcpu_types.CPU_SIGS.get(options.vcpu_type)
    if signature is None:
        raise InvalidArgumentError(f"--vcpu-type must be one of {', '.join(vcpu_types.CPU_SIGS)}")
    try:
        return _digest(guest, SevMode.SEV_SNP, vmm_types.VMMType[options.vmm], signature, options)
    except OSError as error:
        raise InvalidArgumentError(f"{error.filename} cannot be read") from error
    except _UNREADABLE as error:
        raise InvalidArgumentError(f"{options.ovmf} cannot be measured: is it OVMF with SEV metadata?") from error


def _digest(guest: ModuleType, mode: object, vmm: object, signature: int, options: argparse.Namespace) -> str:
    files = [str(one) if one else None for one in (options.ovmf, options.kernel, options.initrd)]
    digest = guest.calc_launch_digest(
        mode, options.vcpus, signature, *files, options.append, options.guest_features, vmm_type=vmm
    )
    return bytes(digest).hex()


def _entry(options: argparse.Namespace, measurement: str) -> str:
    """Lines of a policy file. They name what was measured, so that somebody can measure it again."""
    files = {"ovmf": options.ovmf, "kernel": options.kernel, "initrd": options.initrd}
    lines = [f"# {name}: sha256 {_sha256(path)}" for name, path in files.items() if path]
    if options.append:
        lines.append(f"# append: {options.append!r}")
    lines.append(f"# {options.vcpus} x {options.vcpu_type}, {options.vmm}, guest features {options.guest_features:#x}")
    return "\n".join([f"[{SEV_SNP}]", *lines, f'measurements = ["{measurement}"]', ""])


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
