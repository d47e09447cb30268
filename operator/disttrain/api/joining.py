"""The join tokens of an attempt, under network.tls Mutual: a HELLO names a role and an index, and its token shows that it may.

All processes of an attempt have one certificate, which does not say which of them a peer is. The master has a key; each other process
has the token of its own role and index alone, which the key makes.
"""

import hmac
from typing import Final

from disttrain.api.names import Role

JOIN_KEY: Final = "join.key"
"""The master's file, beside the certificate."""


def join_file(role: Role, index: int) -> str:
    """The file of a process's token, beside the certificate."""
    return f"join-{role.value}-{index}"


def join_token(key: bytes, role: Role, index: int) -> str:
    """The token of a process: 128 bits of HMAC-SHA256, in hex."""
    return hmac.new(key, f"{role.value}-{index}".encode(), "sha256").hexdigest()[:32]
