"""The images of the operator and the trainer, built from the repository's Dockerfile with BuildKit: no Docker, no registry.

`built()` returns a store that holds both, for `Node(images=built())`. It is kept in the cache folder, under a digest of the locked
requirements: PyTorch's layer, 5 GB with its CUDA libraries, is built once, and a change of the source rebuilds two thin layers
in seconds. Nothing but the newest store is kept.

The build itself has no network. Wheels are downloaded before, by hash; the base image, which no registry within reach may have,
is made of Debian bookworm's own Python 3.11 and carries the name that the Dockerfile asks for.
By hand: `PYTHONPATH=tests python -m cluster.images`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from cluster import base_image, runs
from cluster.containers import Containerd
from cluster.image_store import Store
from cluster.machine import Machine, remove_cgroups
from cluster.processes import CLEAN_ENV, Program, wait_for
from cluster.programs import cache_folder, program

ROOT = Path(__file__).resolve().parents[2]
IMAGES = {"operator": "docker.io/disttrain/operator", "trainer": "docker.io/disttrain/trainer"}
TAGS = ("test", "latest")
FREE_GB = 25  # wheels, the layer, and two unpacked copies of it (the build's and the image's)
_BUILDKIT = "unix:///run/buildkit/buildkitd.sock"


def image(name: str) -> str:
    """The full name of an image, `operator` or `trainer`, as a pod has to give it. Its tag is not `latest`, which would be pulled."""
    return f"{IMAGES[name]}:{TAGS[0]}"


def built(*names: str) -> Store:
    """Makes sure that the images (both, if none is named) are as the source has them, and returns the store that holds them."""
    wanted = names or tuple(IMAGES)
    store = _store()
    with store.building():
        stamps = {
            name: _digest([ROOT / "Dockerfile", *_sources(), ROOT / f"requirements/{name}.txt"]) for name in wanted
        }
        have = _record(store)
        todo = [name for name in wanted if have.get(name) != stamps[name]]
        if todo:
            with _builder(store) as (machine, containerd):
                for name in todo:
                    _build(machine, store, name)
                    have[name] = stamps[name]
                    (store.folder / "built.json").write_text(json.dumps(have))
                with store.unused() as unused:
                    if unused:
                        _forget_old(containerd)
    for old in store.folder.parent.glob("images-*/"):
        if old != store.folder:
            Store(old).delete_if_unused()
    for wheels in (cache_folder() / "wheels").glob("*"):
        if wheels not in {_wheels_folder(lock) for lock in _locks()}:
            shutil.rmtree(wheels, ignore_errors=True)
    return store


def _store() -> Store:
    return Store(cache_folder() / f"images-{_digest(_locks())}-{base_image.RECIPE}")


def _locks() -> list[Path]:
    return [ROOT / f"requirements/{name}.txt" for name in ("operator", "trainer", "build")]


def _sources() -> list[Path]:
    folders = [p for folder in ("operator", "trainer_image") for p in (ROOT / folder).rglob("*")]
    files = [p for p in folders if p.is_file() and p.suffix != ".pyc"]
    return sorted(files) + [
        ROOT / name for name in ("pyproject.toml", "README.md", "LICENSE", "requirements/build.txt")
    ]


def _digest(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.relative_to(ROOT)}\0".encode() + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()[:12]


def missing() -> str | None:
    """One line that says why the images cannot be built here, or None: PyTorch takes much room, the first time."""
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free >> 30
    if "trainer" in _record(_store()) or free >= FREE_GB:
        return None
    return f"building the trainer's image takes {FREE_GB} GB of disk, and {folder} has {free}: free some, or set XDG_CACHE_HOME"


def _record(store: Store) -> dict[str, str]:
    """Which images the store has, and of which state of the source."""
    file = store.folder / "built.json"
    return dict(json.loads(file.read_text())) if file.exists() else {}


def _wheels(lock: Path) -> Path:
    """A folder with the wheels that a requirements file locks; pip checks their hashes, here and again in the build."""
    folder = _wheels_folder(lock)
    if folder.exists():
        return folder
    partial = folder.with_suffix(".partial")
    argv = [
        *_pip(),
        "download",
        "--quiet",
        "--no-deps",
        "--require-hashes",
        "--only-binary=:all:",
        "--python-version=3.11",
    ]
    _say(f"downloading the wheels of {lock.relative_to(ROOT)}")
    done = subprocess.run([*argv, "-r", str(lock), "-d", str(partial)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"downloading wheels failed: {done.stderr.strip()[-800:]}")
    partial.rename(folder)
    return folder


def _wheels_folder(lock: Path) -> Path:
    return cache_folder() / "wheels" / hashlib.sha256(lock.read_bytes()).hexdigest()[:12]


def _pip() -> list[str]:
    """An environment made by uv has no pip of its own."""
    for command in ([sys.executable, "-m", "pip"], ["python3", "-m", "pip"], ["uv", "tool", "run", "pip"]):
        with contextlib.suppress(OSError):
            if subprocess.run([*command, "--version"], capture_output=True).returncode == 0:
                return command
    raise RuntimeError("no pip found: `python -m pip` is needed to download wheels")


@contextlib.contextmanager
def _builder(store: Store) -> Iterator[tuple[Machine, Containerd]]:
    """containerd and buildkitd over the store, in a machine of their own, for as long as the block lasts."""
    runs.sweep("builder", lambda folder: remove_cgroups(f"/disttrain-{folder.name}"))
    machine = Machine(runs.new_run("builder"))
    try:
        machine.up()
        containerd = Containerd(machine, store.root)
        containerd.start()
        if base_image.NAME not in containerd.images():
            _say("making the base image with debootstrap")
            containerd.import_image(base_image.archive())
        # BuildKit's steps run in containerd's network: the machine's, which has no way out. Its own garbage collection would
        # take PyTorch's layer away when the disk fills.
        argv = [
            *(str(program("buildkitd")), "--addr", _BUILDKIT, "--root", str(store.buildkit)),
            *(
                "--oci-worker=false",
                "--containerd-worker=true",
                "--containerd-worker-addr=/run/containerd/containerd.sock",
            ),
            *("--containerd-worker-namespace=k8s.io", "--containerd-worker-net=host", "--containerd-worker-gc=false"),
        ]
        # It leaves the folders of its mounts behind: in the machine's folder they go with it.
        env = {"TMPDIR": str(machine.folder)}
        buildkitd = Program("buildkitd", argv, machine.folder, machine.prefix, env, forks=True).start()
        wait_for("buildkitd to answer", lambda: _buildctl(machine, "debug", "workers"), 30, programs=[buildkitd])
        yield machine, containerd
        # In order, as this root is kept: containerd last.
        buildkitd.stop(seconds=30)
        containerd.program.stop(seconds=30)
    except BaseException:
        runs.keep_logs(machine.folder, "Building the images failed")
        raise
    finally:
        machine.down()
        runs.remove_run(machine.folder)


def _forget_old(containerd: Containerd) -> None:
    """Lets go of what earlier builds were called: containerd's CRI plugin keeps a name for every image it ever saw."""
    images = {line.split()[0]: line.split()[2] for line in containerd.ctr("images", "ls").splitlines()[1:]}
    current = {digest for name, digest in images.items() if not name.startswith("sha256:")}
    for name, digest in images.items():
        if digest not in current:
            containerd.ctr("images", "rm", name)


def _buildctl(machine: Machine, *args: str) -> str:
    return machine.run([str(program("buildctl")), "--addr", _BUILDKIT, *args])


def _build(machine: Machine, store: Store, name: str) -> None:
    begun = time.monotonic()
    tags = ",".join(f"{IMAGES[name]}:{tag}" for tag in TAGS)
    argv = [
        *machine.prefix,
        *(str(program("buildctl")), "--addr", _BUILDKIT, "build", "--progress=plain", "--frontend=dockerfile.v0"),
        *("--local", f"context={ROOT}", "--local", f"dockerfile={ROOT}", "--opt", f"target={name}"),
        *("--opt", "image-resolve-mode=local", "--opt", "build-arg:PIP_NO_INDEX=1"),
    ]
    for context, lock in (("wheels", name), ("build-wheels", "build")):
        folder = _wheels(ROOT / f"requirements/{lock}.txt")
        # By its own name, or BuildKit would take the two images' wheels for two states of one folder, and copy 3 GB each time.
        argv += ["--opt", f"context:{context}=local:{lock}-wheels", "--local", f"{lock}-wheels={folder}"]
    # Compressing PyTorch's layer takes five minutes and has no use: the image never leaves this machine.
    argv += ["--output", f'type=image,"name={tags}",unpack=true,compression=uncompressed']
    _say(f"building {IMAGES[name]}")
    log = store.folder / f"build-{name}.log"
    with log.open("w") as out:
        done = subprocess.run(argv, env=CLEAN_ENV, cwd="/", stdout=out, stderr=out, timeout=1800)
    if done.returncode:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-30:])
        raise RuntimeError(f"building the image {name} failed:\n{tail}")
    _say(f"built {IMAGES[name]} in {time.monotonic() - begun:.0f} s")


def _say(line: str) -> None:
    print(f"images: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    print(built(*sys.argv[1:]).root)
