"""How a block of a packed data set is sealed: by AES-256-GCM with a key, by a digest without one.

Both bind a block to its place: data set, file, number in the file and number of samples. A bit that flipped, a block of another place or
data set, one that is cut short, and a wrong key are all seen when the block is opened.
"""

import base64
import binascii
import hashlib
import hmac
import re
import struct
from pathlib import Path
from typing import ClassVar, Final, Protocol

from disttrain_trainer.errors import WrongInput

AES: Final = "AES-256-GCM"
TAG: Final = 16
"""Bytes that a seal adds to a block."""
KEY: Final = 32
"""Bytes of a key."""
_PLACE: Final = struct.Struct("<16sIII")
_NONCE: Final = struct.Struct("<IQ")
_PERSON: Final = b"disttrain block1"


class Broken(ValueError):
    """What is sealed is not what was sealed for this place, or the key is another one."""


class Seal(Protocol):
    """Of one data set. Safe to share between threads."""

    name: ClassVar[str | None]
    """AES-256-GCM, or None without a key."""

    def close(self, file: int, block: int, samples: int, content: bytes) -> bytes:
        """The sealed block of this place, TAG bytes longer."""

    def open(self, file: int, block: int, samples: int, sealed: bytes) -> bytes:
        """Its content. Raises Broken."""

    def sign(self, text: str) -> str:
        """A signature of the index, in hex: it cannot be made without the key."""


class Digest:
    """The seal of a data set that is not encrypted: BLAKE2b of 16 bytes over place and content."""

    name: ClassVar[str | None] = None

    def __init__(self, data_set: bytes) -> None:
        self._data_set = data_set

    def close(self, file: int, block: int, samples: int, content: bytes) -> bytes:
        return content + self._of(file, block, samples, content)

    def open(self, file: int, block: int, samples: int, sealed: bytes) -> bytes:
        content = sealed[:-TAG]
        if len(sealed) < TAG or sealed[-TAG:] != self._of(file, block, samples, content):
            raise Broken
        return content

    def sign(self, text: str) -> str:
        return hashlib.sha256(text.encode()).hexdigest()

    def _of(self, file: int, block: int, samples: int, content: bytes) -> bytes:
        digest = hashlib.blake2b(_PLACE.pack(self._data_set, file, block, samples), digest_size=TAG, person=_PERSON)
        digest.update(content)
        return digest.digest()


class AesGcm:
    """The seal of an encrypted data set: AES-256-GCM (NIST SP 800-38D), the place as additional authenticated data.

    Its keys are derived by HKDF-SHA256 (RFC 5869) from the user's and the data set's random id: so a nonce, which is file and block, never
    comes twice under one key, however many data sets the user's is used for.
    """

    name: ClassVar[str | None] = AES

    def __init__(self, data_set: bytes, key: bytes) -> None:
        # Not at the top: only who encrypts loads OpenSSL.
        from cryptography.exceptions import InvalidTag
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM
        from cryptography.hazmat.primitives.hashes import SHA256
        from cryptography.hazmat.primitives.kdf.hkdf import HKDF

        def derived(use: bytes) -> bytes:
            return HKDF(algorithm=SHA256(), length=KEY, salt=data_set, info=b"disttrain packed data 1: " + use).derive(
                key
            )

        self._data_set = data_set
        self._cipher, self._sign = AESGCM(derived(b"blocks")), derived(b"index")
        self._invalid = InvalidTag

    def close(self, file: int, block: int, samples: int, content: bytes) -> bytes:
        place = _PLACE.pack(self._data_set, file, block, samples)
        return self._cipher.encrypt(_NONCE.pack(file, block), content, place)

    def open(self, file: int, block: int, samples: int, sealed: bytes) -> bytes:
        place = _PLACE.pack(self._data_set, file, block, samples)
        try:
            return self._cipher.decrypt(_NONCE.pack(file, block), sealed, place)
        except self._invalid:
            raise Broken from None

    def sign(self, text: str) -> str:
        return hmac.digest(self._sign, text.encode(), "sha256").hex()


def seal_of(data_set: bytes, key: bytes | None) -> Seal:
    """data_set: its id, 16 bytes. key: 32 bytes, None for a data set that is not encrypted."""
    return Digest(data_set) if key is None else AesGcm(data_set, key)


def read_key(path: Path, what: str) -> bytes:
    """The key in a file: 32 bytes, or these in hex or base64. what: the field or option that names the file. Raises WrongInput."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise WrongInput(f"{what}: {path}: {error.strerror or error}") from None
    if len(content) == KEY:
        return content
    text = content.strip()
    if re.fullmatch(rb"[0-9a-fA-F]{64}", text):
        return bytes.fromhex(text.decode())
    try:
        key = base64.b64decode(text, validate=True)
    except binascii.Error:
        key = b""
    if len(key) != KEY:
        raise WrongInput(
            f"{what}: no key in {path}: expected {KEY} bytes, also in hex or base64; make one: openssl rand -hex {KEY}"
        )
    return key
