"""Which samples belong to which part of the work, the sets of parts that are done, and the loading of samples."""
