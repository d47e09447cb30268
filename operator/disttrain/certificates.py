"""The certificate of a job's attempt, for network.tls Mutual: one leaf for all its processes, signed by an authority of its own.

The authority's key is forgotten here, so that no other leaf is ever signed: a process of another job or attempt, or of none, has no
certificate that the attempt's processes accept. They are random; the code that carries out a plan makes them, and no plan depends on them.
"""

import base64
import secrets
from collections.abc import Iterable
from datetime import datetime, timedelta
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_der_public_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from disttrain.api.job import Metadata
from disttrain.api.joining import JOIN_KEY, join_file, join_token
from disttrain.api.names import CA, CERTIFICATE, KEY, Role
from disttrain.api.runtime import Progress, SignedProgress, signed_text

LIFETIME: Final = timedelta(days=3650)
"""Longer than any attempt: no new one can be signed in the middle of it. What ends a key is that its Secret is deleted."""
CLOCK_SKEW: Final = timedelta(hours=1)
"""How far the clock of a node may be behind."""


def of_attempt(job: Metadata, attempt: int, *, now: datetime, lifetime: timedelta = LIFETIME) -> dict[str, bytes]:
    """The files of a new certificate, PEM. now: with a time zone."""
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"{job.uid[:36]} attempt {attempt}")])
    authority, leaf = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    authority_id = x509.SubjectKeyIdentifier.from_public_key(authority.public_key())

    def certificate(subject: x509.Name, key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .issuer_name(name)
            .subject_name(subject)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - CLOCK_SKEW)
            .not_valid_after(now + lifetime)
        )

    ca = (
        certificate(name, authority.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .add_extension(authority_id, critical=False)
    )
    host = f"*.{job.name}.{job.namespace}.svc"
    tls = (
        certificate(x509.Name([]), leaf.public_key())
        .add_extension(
            x509.SubjectAlternativeName([x509.DNSName(host)]), critical=True
        )  # critical, as there is no subject
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False
        )
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(leaf.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(authority_id), critical=False)
    )
    return {
        CA: ca.sign(authority, hashes.SHA256()).public_bytes(Encoding.PEM),
        CERTIFICATE: tls.sign(authority, hashes.SHA256()).public_bytes(Encoding.PEM),
        KEY: leaf.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
    }


def join_secrets(processes: Iterable[tuple[Role, int]]) -> dict[str, bytes]:
    """The files of new join tokens: the master's key, and the token of each of these processes."""
    key = secrets.token_hex(16).encode()
    tokens = {join_file(role, index): join_token(key, role, index).encode() for role, index in processes}
    return {JOIN_KEY: key, **tokens}


def public_key(certificate: bytes) -> str:
    """The public key of a certificate (PEM), as SubjectPublicKeyInfo in DER and base64."""
    key = x509.load_pem_x509_certificate(certificate).public_key()
    return base64.b64encode(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).decode()


def read_progress(answer: bytes, *, nonce: str, public_key: str) -> Progress:
    """The report in a master's answer to this nonce. Raises ValueError when the key of the attempt has not signed it."""
    signed = SignedProgress.model_validate_json(answer)
    key = load_der_public_key(base64.b64decode(public_key, validate=True))
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise ValueError("the public key of the attempt is of another kind")
    try:
        key.verify(
            base64.b64decode(signed.signature, validate=True),
            signed_text(nonce, signed.report),
            ec.ECDSA(hashes.SHA256()),
        )
    except InvalidSignature:
        raise ValueError("the key of the attempt's certificate has not signed it, or not for this question") from None
    return Progress.decode(signed.report)


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=False,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
