"""Memory that real TEEs leave to a program, by name: what `--tee-profile` knows. Data only, standard library only."""

from dataclasses import dataclass

MIB = 1 << 20


@dataclass(frozen=True)
class Profile:
    """`bytes` of secure memory, and where that number is from. 0: there is no such number, it is given by hand."""

    bytes: int
    source: str


PROFILES = {  # from the smallest
    "optee": Profile(
        14 * MIB,
        "HiKey and HiKey960 under OP-TEE: 16 MiB of TZDRAM less 2 MiB for the TEE itself, 'TA RAM: 14 MiB' "
        "(OP-TEE/optee_os, core/arch/arm/plat-hikey/platform_config.h)",
    ),
    "optee-rpi3": Profile(
        16 * MIB,
        "Raspberry Pi 3 under OP-TEE: CFG_TA_RAM_SIZE (OP-TEE/optee_os, core/arch/arm/plat-rpi3/platform_config.h)",
    ),
    "qsee": Profile(
        24 * MIB,
        "Qualcomm's TEE on LG G7 and V35: qseecom_mem of 0x1800000 bytes; other phones have 16 to 32 MiB "
        "(Linux, arch/arm64/boot/dts/qcom/sdm845-lg-common.dtsi)",
    ),
    "trustzone": Profile(
        64 * MIB,
        "a generous TrustZone carve-out: CFG_TEE_OS_DRAM0_SIZE of NXP Layerscape "
        "(OP-TEE/optee_os, core/arch/arm/plat-ls/conf.mk)",
    ),
    "sgx1": Profile(
        93 * MIB,
        "the page cache of SGX1: 128 MiB reserved, about 93 MiB usable before paging begins (the literature's figure; "
        "gramineproject/gramine, Documentation/performance.rst has the slow-down beyond it)",
    ),
    "cvm": Profile(0, "a confidential virtual machine has what its owner gives it: needs --memory-budget"),
}


def budget(name: str, given: int | None, default: int) -> int:
    """Bytes of the memory budget, of a profile's name ("": none) and of `--memory-budget`; one of the two decides.

    Raises KeyError for an unknown name, ValueError with a text for people when the two do not go together.
    """
    fixed = PROFILES[name].bytes if name else 0
    if name and not fixed and given is None:
        raise ValueError(f"--tee-profile {name} is as large as you say: add --memory-budget")
    if fixed and given is not None:
        raise ValueError(f"--tee-profile {name} is {fixed // MIB} MiB: leave --memory-budget out, or the profile")
    return fixed or (default if given is None else given)


def holding(count: int) -> list[str]:
    """Names of the profiles of a known size that hold so many bytes, from the smallest."""
    return [name for name, profile in PROFILES.items() if max(count, 1) <= profile.bytes]
