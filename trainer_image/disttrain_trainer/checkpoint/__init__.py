"""Checkpoints: a folder per step, files written atomically, a manifest written last. Who writes what state is elsewhere."""
