"""Lengths of time in words. No output here, and no import: verbs that only read a run are quick."""


def duration(seconds: float) -> str:
    """4.2 s, 3:07, 1:02:09"""
    return f"{seconds:.1f} s" if seconds < 60 else clock(seconds)


def clock(seconds: float) -> str:
    """0:04, 3:07, 1:02:09"""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
