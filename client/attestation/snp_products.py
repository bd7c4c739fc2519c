"""AMD's product lines: how to tell them, where the parts of their TCB lie, and which root certificate is theirs.

Roots are pinned by the SHA-256 of the certificate (DER), one ARK for each line; VCEK and VLEK share it. AMD publishes
them at kdsintf.amd.com/{vcek,vlek}/v1/{Milan,Genoa,Turin}/cert_chain. The certificates travel with the evidence.
"""

from collections.abc import Mapping

PRODUCTS = ("Milan", "Genoa", "Turin")
AMD_ROOTS: Mapping[str, str] = {
    "Milan": "69d063b45344d26a2e94e1f4210de49ef555308287d4c174445c95639a540bcd",
    "Genoa": "4c6598d19c18719c5dfd4a7d335f674e5bfe1d8f800cea2cf270c10d103db2f1",
    "Turin": "1f084161a44bb6d93778a904877d4819cafa5d05ef4193b2ded9dd9c73dd3f6a",
}
_OLD_LAYOUT = ("bl", "tee", "", "", "", "", "snp", "ucode")  # byte by byte; reserved bytes have no name
TCB_LAYOUTS: Mapping[str, tuple[str, ...]] = {
    "Milan": _OLD_LAYOUT,
    "Genoa": _OLD_LAYOUT,
    "Turin": ("fmc", "bl", "tee", "snp", "", "", "", "ucode"),
}
CHIP_ID_BYTES: Mapping[str, int] = {"Milan": 64, "Genoa": 64, "Turin": 8}  # of the hardware id in a VCEK
_BY_CPUID = {  # family, high half of the model
    (0x19, 0x0): "Milan",
    (0x19, 0x1): "Genoa",
    (0x19, 0xA): "Genoa",  # Bergamo and Siena: keys of the Genoa line
    (0x1A, 0x0): "Turin",
    (0x1A, 0x1): "Turin",
}


def by_cpuid(family: int, model: int) -> str | None:
    """The product line of a CPU, None for one that is not known."""
    return _BY_CPUID.get((family, model >> 4))


def by_name(name: str) -> str | None:
    """The product line of a certificate's product name: Milan-B0 is Milan."""
    line = name.partition("-")[0]
    return line if line in PRODUCTS else None


def tcb_parts(product: str, tcb: bytes) -> dict[str, int] | None:
    """The parts of a TCB version (8 bytes) by name; None when a reserved byte is set."""
    layout = TCB_LAYOUTS[product]
    if any(byte and not part for part, byte in zip(layout, tcb, strict=True)):
        return None
    return {part: byte for part, byte in zip(layout, tcb, strict=True) if part}
