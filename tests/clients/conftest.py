"""The suite needs more than the other ones: `make clients` installs it."""

from pathlib import Path

from clients.running import PACKAGES

collect_ignore_glob = [] if Path(PACKAGES).is_dir() else ["test_*.py"]
