"""Which samples belong to which part of the work, the sets of parts that are done, and the loading of samples."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from disttrain.api import environment
from disttrain_trainer.errors import WrongInput

if TYPE_CHECKING:
    from disttrain_trainer.data.packed_dataset import PackedDataset


def packed(config: dict[str, Any], split: str) -> "PackedDataset":
    """The factory for trainer.dataset of what `disttrain data pack` has written to data.volume; config is not used.

    Raises WrongInput, DataUnreadable.
    """
    # Not at the top: the master imports rooms of this one, and no torch.
    from disttrain_trainer.data.opening import Reading
    from disttrain_trainer.data.packed_dataset import PackedDataset
    from disttrain_trainer.data.sealing import read_key

    folder = os.environ.get(environment.DATA_DIR)
    if not folder:
        raise WrongInput("trainer.dataset: disttrain_trainer.data:packed reads from a volume: set data.volume")
    key = os.environ.get(environment.DATA_KEY)
    found = read_key(Path(key), "data.encryption.secretName") if key else None
    return PackedDataset(Path(folder).absolute() / split, found, copies=Reading.copies)
