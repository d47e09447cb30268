"""Signs the master's reports under network.tls Mutual, so that the operator believes no other process (docs/design/0007)."""

import base64
import re
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from disttrain.api.policies import Tls
from disttrain.api.runtime import JobConfig, SignedProgress, signed_text
from disttrain_trainer.errors import WrongInput

_NONCE: Final = re.compile(r"[0-9a-f]{16,64}")


class ReportSigner:
    """Has the private key of the attempt's certificate. Any thread may call `signed`."""

    def __init__(self, key: ec.EllipticCurvePrivateKey) -> None:
        self._key = key

    @classmethod
    def of(cls, config: JobConfig, folder: Path | None) -> "ReportSigner | None":
        """None where the job has no certificates. Raises WrongInput when the key cannot be read."""
        if config.tls is Tls.DISABLED or folder is None:
            return None
        try:
            key = load_pem_private_key((folder / "tls.key").read_bytes(), password=None)
        except (OSError, ValueError) as error:
            raise WrongInput(f"{folder / 'tls.key'}: the key of the attempt cannot be read: {error}") from None
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise WrongInput(f"{folder / 'tls.key'}: the key of the attempt is of another kind")
        return cls(key)

    def signed(self, nonce: str, report: str) -> str | None:
        """A SignedProgress as JSON; None for what is no nonce."""
        if _NONCE.fullmatch(nonce) is None:
            return None
        signature = self._key.sign(signed_text(nonce, report), ec.ECDSA(hashes.SHA256()))
        return SignedProgress(report=report, signature=base64.b64encode(signature).decode()).model_dump_json(
            by_alias=True
        )
