"""Certificates and kubeconfigs of a test cluster: one CA, made new for every run.

Elliptic curves rather than RSA: a dozen RSA keys take seconds, and a test waits for them.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path

CURVE = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-noenc")


def _openssl(*args: str | Path, input: str | None = None) -> None:
    done = subprocess.run(["openssl", *map(str, args)], input=input, text=True, capture_output=True, timeout=30)
    if done.returncode:
        raise RuntimeError(f"openssl {args[0]} failed: {done.stderr.strip()}")


class Authority:
    """A certificate authority in a folder, with a key pair for service account tokens beside it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ca = folder / "ca.crt"
        self.account_key = folder / "sa.key"
        self.account_public = folder / "sa.pub"
        folder.mkdir(parents=True, exist_ok=True)
        _openssl(
            "req", "-x509", *CURVE, "-keyout", folder / "ca.key", "-out", self.ca, "-days", "30", "-subj", "/CN=test-ca"
        )
        _openssl("genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-out", self.account_key)
        _openssl("pkey", "-in", self.account_key, "-pubout", "-out", self.account_public)

    def issue(self, name: str, user: str, groups: Sequence[str] = (), hosts: Sequence[str] = ()) -> tuple[Path, Path]:
        """A certificate and its key for a user with groups, for the addresses given ("IP:…", "DNS:…")."""
        crt, key, csr = (self.folder / f"{name}.{kind}" for kind in ("crt", "key", "csr"))
        subject = "".join(f"/O={group}" for group in groups) + f"/CN={user}"
        _openssl("req", *CURVE, "-keyout", key, "-out", csr, "-subj", subject)
        extensions = f"subjectAltName={','.join(hosts)}\n" if hosts else ""
        # Serial numbers are random: two threads that issue at once share no serial file.
        _openssl(
            *("x509", "-req", "-in", csr, "-CA", self.ca, "-CAkey", self.folder / "ca.key", "-days", "30", "-out", crt),
            *("-extfile", "/dev/stdin"),
            input=extensions,
        )
        csr.unlink()
        return crt, key

    def kubeconfig(
        self, name: str, server: str, user: str, groups: Sequence[str] = (), namespace: str = "default"
    ) -> Path:
        """A kubeconfig for a new client certificate. It names its files by absolute path, and only works on this machine."""
        crt, key = self.issue(name, user, groups)
        file = self.folder.parent / f"{name}.kubeconfig"
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "test", "cluster": {"server": server, "certificate-authority": str(self.ca)}}],
            "users": [{"name": user, "user": {"client-certificate": str(crt), "client-key": str(key)}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": user, "namespace": namespace}}],
            "current-context": "test",
        }
        file.write_text(json.dumps(config, indent=1))  # JSON is YAML
        file.chmod(0o600)
        return file
