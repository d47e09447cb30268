"""The end of a world ends the waits in its process group, also one that gloo does not let go."""

import subprocess
import sys
from pathlib import Path

RANK = """
import os, sys, threading, time
from datetime import timedelta
import torch
import torch.distributed as dist
from disttrain_trainer.parallel.process_group import AbortableProcessGroup

rank = int(sys.argv[1])
timeout = timedelta(seconds=60)
store = dist.FileStore("store", 2)
wires = AbortableProcessGroup(backend="gloo", others=frozenset())
dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timeout)
wires.complete()
if rank == 1:
    time.sleep(60)  # it never takes part
tensor = torch.ones(4)
wait = wires.awaited(dist.all_reduce(tensor, async_op=True), tensor)
began = time.monotonic()
wires.cut = lambda: None  # gloo learns nothing, as when a connection breaks behind a send that is half written
threading.Timer(0.1, wires.end).start()
assert wait.wait() is tensor
print(wires.error)
wires.leave()
late = AbortableProcessGroup(backend="gloo", others=frozenset())
dist.init_process_group("gloo", store=dist.PrefixStore("next", store), rank=0, world_size=1, timeout=timeout)
whole = torch.ones(4)
late.awaited(dist.all_reduce(whole, async_op=True), whole).wait()
print(late.error, whole.tolist())
late.end()
late.awaited(dist.all_reduce(whole, async_op=True), whole).wait()
print(late.error)
late.leave()
print("quick" if time.monotonic() - began < 30 else "slow", flush=True)
os._exit(0)  # the threads of the first group wait on
"""


def test_a_wait_that_gloo_does_not_end_ends_with_the_round(tmp_path: Path) -> None:
    (tmp_path / "rank.py").write_text(RANK)
    ranks = [
        subprocess.Popen([sys.executable, "rank.py", str(rank)], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        said = ranks[0].communicate(timeout=60)[0].splitlines()
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()
    assert said == ["it ended within a step", "None [1.0, 1.0, 1.0, 1.0]", "it ended within a step", "quick"]
