"""The policy file of a cluster with a simulated TEE: it names the root that was made for this start, and no other.

It is no secret, but whoever can change it decides what a client accepts: it is private to this user (mode 0600).
"""

import os
import tempfile
from pathlib import Path

from wire.errors import InvalidArgumentError

_HEAD = "# Written by Cleave for one start of its simulated TEE, which protects from nobody."


def text(root: str, measurement: str, scheme: str, insecure: list[str]) -> str:
    """A policy in TOML, every field spelt. Digests are hexadecimal; `insecure` are the --insecure- switches in use."""
    switches = ", ".join(f'"{switch}"' for switch in insecure)
    return f"""{_HEAD}
version = 1
accept = ["simulated"]
require_fresh_nonce = true

[claims]
builds = "unchecked"
config_digests = "unchecked"
model_digests = "unchecked"
schemes = ["{scheme}"]
insecure = [{switches}]

[simulated]
i_understand_this_is_not_secure = true
dev_root_sha256 = "{root}"
measurements = ["{measurement}"]
"""


def check(path: Path) -> None:
    """Raises InvalidArgumentError when a policy that somebody else wrote is in the way, or no folder is there."""
    try:
        if path.exists() and path.read_bytes().splitlines()[:1] != [_HEAD.encode()]:
            raise InvalidArgumentError(f"{path} is not a policy file that Cleave wrote: name another place")
        if not path.parent.is_dir():
            raise InvalidArgumentError(f"the policy file {path} cannot be written: there is no such folder")
    except OSError as error:
        raise InvalidArgumentError(f"the policy file {path} cannot be written") from error


def write(path: Path, policy: str) -> None:
    """Put the file there whole, in the place of an older one of its kind. Raises InvalidArgumentError, as `check`."""
    check(path)
    try:
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mode 0600
        try:
            with open(descriptor, "w", encoding="utf-8") as file:
                file.write(policy)
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise
    except OSError as error:
        raise InvalidArgumentError(f"the policy file {path} cannot be written") from error
