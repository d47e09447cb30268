"""A stand-in for `python:3.11-slim` where no registry can be reached: Debian bookworm, which ships Python 3.11.

It keeps what our Dockerfile relies on: `python` and pip on the PATH, packages in /usr/local, no compiler. It differs in size and in
patch versions, so a figure of an image's size measured on it is a figure for this base.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

from cluster.containers import write_docker_archive
from cluster.processes import CLEAN_ENV
from cluster.programs import cache_folder

NAME = "docker.io/library/python:3.11-slim"
_PACKAGES = "python3.11,python3-pip,ca-certificates"
# What the official image does not have either, or that no program in a container reads.
_DROP = (
    "usr/share/doc",
    "usr/share/man",
    "usr/share/locale",
    "usr/share/info",
    "var/cache",
    "var/lib/apt/lists",
    "var/log",
)

RECIPE = hashlib.sha256(repr((_PACKAGES, _DROP, "version 1")).encode()).hexdigest()[:12]
"""What decides how the image looks. Count the version up with any other change: all that was built on it is built again."""


def archive() -> Path:
    """The image as an archive to import, in the cache folder; half a minute the first time."""
    archive = cache_folder() / f"base-{RECIPE}.tar"
    if archive.exists():
        return archive
    for old in archive.parent.glob("base-*"):
        shutil.rmtree(old) if old.is_dir() else old.unlink()
    root = archive.with_suffix(".root")
    env = {**CLEAN_ENV, **{key: os.environ[key] for key in ("http_proxy", "https_proxy") if key in os.environ}}
    done = subprocess.run(
        ["debootstrap", "--variant=minbase", f"--include={_PACKAGES}", "bookworm", str(root)],
        env=env,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"debootstrap failed: {(done.stdout + done.stderr).strip()[-800:]}")
    _make_like_the_official_one(root)
    layer = archive.with_suffix(".layer")
    subprocess.run(["tar", "--numeric-owner", "--sort=name", "-C", str(root), "-cf", str(layer), "."], check=True)
    with layer.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    partial = archive.with_suffix(".partial")
    write_docker_archive(partial, NAME, layer, digest, {"Env": [f"PATH={path}", "LANG=C.UTF-8"], "Cmd": ["python3"]})
    shutil.rmtree(root)
    layer.unlink()
    partial.rename(archive)
    return archive


def _make_like_the_official_one(root: Path) -> None:
    for folder in _DROP:
        shutil.rmtree(root / folder, ignore_errors=True)
        (root / folder).mkdir(parents=True)
    (root / "usr/lib/python3.11/EXTERNALLY-MANAGED").unlink(missing_ok=True)  # here pip may install: it is its purpose
    for link, target in {"python": "/usr/bin/python3.11", "python3": "/usr/bin/python3.11"}.items():
        (root / "usr/local/bin" / link).symlink_to(target)
    (root / "etc/resolv.conf").unlink(missing_ok=True)  # debootstrap copies the host's
    (root / "etc/hostname").unlink(missing_ok=True)
