"""python -m disttrain_trainer: a training process of a DistTrainJob."""

import sys

from disttrain_trainer.entry import main

sys.exit(main())
