"""Checkpoints sealed at rest, and command `cleave-trusted-worker seal-model` that makes them.

A sealed folder holds the small files of a model in the clear, and every *.safetensors file as *.safetensors.sealed:
a header, u8[8] magic || u64 bytes of the plain file || u8[32] salt, then its chunks, each AES-256-GCM with its tag.

    salt   random, drawn for each sealing of a folder, the same in all its files
    key    HKDF(model key, salt, file name): no two files share one
    nonce  the number of the chunk
    bound  as associated data: the header, SHA-256 of config.json and of generation_config.json

So a file opens only whole, in order, under its name, with this configuration, beside files of the same sealing.

Who reads the disk learns the sizes and names of files, configuration and tokenizer, and nothing of the weights. Who
writes it can make opening fail, put back an older sealing of the whole folder, and change the tokenizer, which is not
bound; the configuration is, as it was read for use. The seal protects the disk and no more: with kv-shield the GPU
worker still gets the opened weights into its memory; tee-only keeps them inside entirely. Who has the key file has
the model.
"""

import argparse
import logging
import os
import re
import secrets
import shlex
import shutil
import struct
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from Crypto.Cipher import AES
from Crypto.Hash import SHA256
from Crypto.Protocol.KDF import HKDF

from wire.checkpoint import Checkpoint, FileSource
from wire.errors import CheckpointError, CleaveError, PreconditionError, VerificationError
from wire.measured import MeasuredCheckpoint
from wire.model_config import ModelConfig

SUFFIX = ".sealed"
HEADER = struct.Struct("<8sQ32s")
MAGIC = b"cleave01"  # the format and its version
CHUNK = 1 << 18  # bytes sealed together
TAG_BYTES = 16
IN_CLEAR = (".json", ".jinja", ".txt", ".model", ".tiktoken")  # nothing else is copied: it might hold weights
PROGRESS = 1 << 30  # bytes between two lines

log = logging.getLogger(__name__)
U8 = npt.NDArray[np.uint8]


class _Seal:
    """The ciphers of one file."""

    def __init__(self, key: bytes, name: str, header: bytes, configuration: bytes) -> None:
        context = b"cleave sealed model v1 " + os.fsencode(name)
        self._key = HKDF(key, 32, HEADER.unpack(header)[2], SHA256, context=context)
        self._bound = header + configuration

    def cipher(self, chunk: int) -> Any:
        """For sealing or opening one chunk."""
        return AES.new(self._key, AES.MODE_GCM, nonce=chunk.to_bytes(12, "big")).update(self._bound)


class SealedSource:
    """One sealed file as a wire.checkpoint.Source. It keeps the last chunk it opened; one thread at a time."""

    def __init__(self, path: Path, key: bytes, configuration: bytes, salts: set[bytes]) -> None:
        """`salts` of the files opened before. Raises CheckpointError for whatever does not belong together."""
        self._file, self._name = FileSource(path), path.name.removesuffix(SUFFIX)
        self._buffer, self._chunk = np.empty(CHUNK + TAG_BYTES, np.uint8), -1
        try:
            # 1. The header, not to be trusted yet, must describe a file of this length, of this sealing.
            header = np.empty(HEADER.size, np.uint8)
            self._file.read(0, header)
            magic, self.size, salt = HEADER.unpack(header.tobytes())
            salts.add(salt)
            if magic != MAGIC or self._file.size != _sealed_size(self.size) or len(salts) > 1:
                raise VerificationError
            # 2. The first chunk opens only with the header it was sealed with.
            self._seal = _Seal(key, self._name, header.tobytes(), configuration)
            self._open(0)
        except (CheckpointError, OSError, VerificationError):
            self._file.close()
            raise CheckpointError(f"{path} cannot be opened with this key, or was changed") from None

    def read(self, offset: int, into: U8) -> None:
        """See Source. Raises VerificationError when the file was changed after it was sealed."""
        if offset + len(into) > self.size:
            raise CheckpointError(f"{self._name} is shorter than what is read of it")
        done = 0
        while done < len(into):
            chunk, start = divmod(offset + done, CHUNK)
            piece = self._open(chunk)[start : start + len(into) - done]
            into[done : done + len(piece)] = piece
            done += len(piece)

    def close(self) -> None:
        """See Source."""
        self._buffer.fill(0)
        self._file.close()

    def _open(self, chunk: int) -> U8:
        """One chunk: a copy that nobody else can change, decrypted in place and checked; what fails is wiped."""
        plain, tag = np.split(self._buffer[: min(CHUNK, self.size - chunk * CHUNK) + TAG_BYTES], [-TAG_BYTES])
        if chunk == self._chunk:
            return plain
        self._chunk = -1
        try:
            self._file.read(HEADER.size + chunk * (CHUNK + TAG_BYTES), self._buffer[: len(plain) + TAG_BYTES])
            self._seal.cipher(chunk).decrypt_and_verify(plain.data, tag.data, output=plain.data)
        except (CheckpointError, OSError, ValueError):
            self._buffer.fill(0)
            log.error("%s: chunk %d was changed, or cannot be read", self._name, chunk)
            raise VerificationError from None
        self._chunk = chunk
        return plain


def is_sealed(folder: Path) -> bool:
    """Whether a folder holds sealed files. The disk's word: who has a key opens the folder as sealed, or not at all."""
    return any(folder.glob(f"*.safetensors{SUFFIX}"))


def open_sealed(folder: Path, key: bytes, config: ModelConfig) -> MeasuredCheckpoint:
    """A sealed model, bound to the configuration that is in use: `config` as it was read from the folder.

    All of it is opened once. Raises CheckpointError for another key or changed files; its reads VerificationError.
    """
    salts = set[bytes]()
    try:
        return MeasuredCheckpoint(folder, config, SUFFIX, lambda path: SealedSource(path, key, config.digest, salts))
    except VerificationError:
        raise CheckpointError(f"{folder} cannot be opened with this key, or was changed") from None


def seal(folder: Path, out: Path, key: bytes) -> None:
    """Make `out` the sealed copy of a model folder; it appears at the end, complete, or not at all.

    Raises CheckpointError for a folder that is no readable model or sealed already, and when `out` is not empty.
    """
    out = out.resolve()
    _check(folder, out)
    work = out.with_name(f".{out.name}-{secrets.token_hex(4)}")
    work.mkdir(parents=True)
    try:
        # 1. What stays in the clear; the configuration that is bound is the copy.
        for path in sorted(folder.iterdir()):
            if path.suffix in IN_CLEAR and path.is_file():
                shutil.copyfile(path, work / path.name)
        # 2. Every file of weights.
        salt, config = secrets.token_bytes(32), ModelConfig.from_hf(work)
        for path in sorted(folder.glob("*.safetensors")):
            with (work / (path.name + SUFFIX)).open("xb") as file:
                file.writelines(_sealed(path, key, salt, config.digest))
        # 3. Only what opens, and is on the disk, gets its name.
        open_sealed(work, key, config).close()
        for path in (*work.iterdir(), work):
            _sync(path)
        work.rename(out)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    _sync(out.parent)


def read_key(path: Path) -> bytes:
    """The model key in a key file. Raises PreconditionError when it is missing, malformed, or open to others."""
    try:
        with path.open("rb") as file:
            mode, text = os.fstat(file.fileno()).st_mode, file.read(66)
    except OSError as error:
        raise PreconditionError(f"{path}: the key file is missing or cannot be read") from error
    if mode & 0o077:
        raise PreconditionError(f"{path}: the key file is open to others: chmod 600 {shlex.quote(str(path))}")
    if not re.fullmatch(rb"[0-9a-fA-F]{64}\n?", text):
        raise PreconditionError(f"{path}: a key file holds 64 hexadecimal digits and nothing else")
    return bytes.fromhex(text.decode())


def write_key(path: Path) -> None:
    """A new key in a new file that only its owner can read. Raises OSError; FileExistsError rather than overwrite."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "w") as file:
        file.write(secrets.token_hex(32) + "\n")
    _sync(path)


def run(arguments: list[str]) -> int:
    """Command `seal-model`: exit status 0, or 2 with one line on stderr."""
    parser = argparse.ArgumentParser(allow_abbrev=False, prog="cleave-trusted-worker seal-model")
    parser.add_argument("--model", type=Path, required=True, help="folder in Hugging Face layout; it is not changed")
    parser.add_argument("--out", type=Path, required=True, help="the sealed folder, new or empty")
    parser.add_argument("--key-file", type=Path, required=True, help="the model key; made when it does not exist")
    model, out, key_file = vars(parser.parse_args(arguments)).values()
    try:
        for folder in (model, out):
            if key_file.resolve().is_relative_to(folder.resolve()):
                raise PreconditionError(f"{key_file}: the key file must lie outside {folder}")
        _check(model, out)
        if not key_file.exists():
            write_key(key_file)
            print(f"made a new key, {key_file}, readable by its owner only")
        seal(model, out, read_key(key_file))
    except (CleaveError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    print(f"sealed {model} into {out}; without {key_file} nobody can open it. Serve it with")
    serve = ["--model", str(out), "--model-key-file", str(key_file), "--scheme", "kv-shield"]
    print(f"  cleave up {shlex.join(serve)}")
    return 0


def _check(folder: Path, out: Path) -> None:
    if is_sealed(folder):
        raise CheckpointError(f"{folder} is sealed already")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out} exists and is not an empty folder: give a new one")
    ModelConfig.from_hf(folder)
    Checkpoint(folder).close()


def _chunks(size: int) -> int:
    return max(1, -(-size // CHUNK))


def _sealed_size(size: int) -> int:
    return HEADER.size + size + _chunks(size) * TAG_BYTES


def _sealed(path: Path, key: bytes, salt: bytes, configuration: bytes) -> Iterator[bytes]:
    """The sealed file, header first."""
    with closing(FileSource(path)) as source:
        yield (header := HEADER.pack(MAGIC, source.size, salt))
        seal = _Seal(key, path.name, header, configuration)
        for chunk in range(_chunks(source.size)):
            plain = np.empty(min(CHUNK, source.size - chunk * CHUNK), np.uint8)
            source.read(chunk * CHUNK, plain)
            yield b"".join(seal.cipher(chunk).encrypt_and_digest(plain.data))
            if (done := (chunk + 1) * CHUNK) % PROGRESS == 0:
                print(f"{path.name}: {done / 2**30:.1f} of {source.size / 2**30:.1f} GiB", file=sys.stderr)


def _sync(path: Path) -> None:
    """A file's content, or a folder's names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
