"""How much is tried: a quick slice with every `make test`, or with DISTTRAIN_WIDE=1 all of it (`make simulation`, `make soak`)."""

import os

WIDE = os.environ.get("DISTTRAIN_WIDE") == "1"
