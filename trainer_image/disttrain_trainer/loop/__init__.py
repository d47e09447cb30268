"""The training loop, the same for all strategies; exchange: what a strategy adds to it; meter and stopwatch: what it measures."""
