"""Which samples are whose: the slices of a job's work, and the sets of them that are done."""
