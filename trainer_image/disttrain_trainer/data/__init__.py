"""Which samples belong to which part of the work, the sets of parts that are done, and the loading of samples."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from disttrain.api import environment
from disttrain_trainer.errors import WrongInput

if TYPE_CHECKING:
    from disttrain_trainer.data.packed_dataset import PackedDataset


def packed(config: dict[str, Any], split: str) -> "PackedDataset":
    """The factory for trainer.dataset of what `disttrain data pack` has written, on data.volume or at data.url; config is not used.

    Raises WrongInput, DataUnreadable.
    """
    # Not at the top: the master imports rooms of this one, and no torch.
    from disttrain_trainer.data.opening import Reading
    from disttrain_trainer.data.packed_dataset import PackedDataset
    from disttrain_trainer.data.sealing import read_key
    from disttrain_trainer.data.url_store import UrlStore, read_options

    folder, url = os.environ.get(environment.DATA_DIR), Reading.url
    if not folder and url is None:
        raise WrongInput(
            "trainer.dataset: disttrain_trainer.data:packed reads what `disttrain data pack` wrote: set data.volume or data.url"
        )
    key = os.environ.get(environment.DATA_KEY)
    found = read_key(Path(key), "data.encryption.secretName") if key else None
    store: Path | UrlStore
    if url is not None:
        options = os.environ.get(environment.DATA_URL_OPTIONS)
        store = UrlStore(url, split, read_options(Path(options)) if options else {})
    else:
        store = Path(folder or "").absolute() / split
    return PackedDataset(store, found, copies=Reading.copies)
