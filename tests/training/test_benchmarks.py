"""The benchmarks run, and compare with every peer; how fast is not a test's to say."""

import re
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def printed(program: str, *arguments: str) -> list[str]:
    command = [sys.executable, str(BENCHMARKS / program), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_the_parameter_server_is_compared_with_all_reduce_rpc_and_its_limit() -> None:
    lines = printed("parameter_server.py", "--rounds=1", "--steps=1", "--mib=1")
    rows = {line.split()[0]: line for line in lines[2:]}
    assert list(rows) == ["ours", "all_reduce", "rpc", "bare"]
    for peer in ("all_reduce", "rpc", "bare"):
        assert re.search(r" \d+\.\d\d +\d+\.\d\d +<= [01]\.\d$", rows[peer]), rows[peer]


def test_a_step_under_tls_is_compared_with_plain_gloo_and_its_limit() -> None:
    lines = printed("encrypted.py", "--rounds=1", "--steps=1", "--mib=1", "--compute=1")
    rows = {line.split()[0]: [float(number) for number in line.split()[1:]] for line in lines[2:]}
    assert list(rows) == ["gloo", "ours", "bare"]
    assert rows["gloo"][1:] == [1, 1]
    assert all(number > 0 for row in rows.values() for number in row)


def test_the_parameter_server_under_tls_is_compared_with_plain_and_with_the_bare_traffic() -> None:
    lines = printed("parameter_server.py", "--rounds=1", "--steps=1", "--mib=1", "--tls", "--compute=1")
    rows = [re.split(r"  +", line) for line in lines[2:]]
    assert [row[0] for row in rows] == ["ours", "TLS", "bare", "bare TLS"]
    assert [len(row) for row in rows] == [7, 4, 4, 7]


def test_our_loop_is_compared_with_two_bare_ones_on_both_examples() -> None:
    lines = printed("loop.py", "--rounds=1", "--only=large")
    rows = [re.split(r"  +", line) for line in lines[1:]]
    assert [row[0].split()[0] for row in rows] == ["digits", "digits", "charlm", "charlm"]
    assert all(float(ratio) > 0 for row in rows for ratio in row[-2:])


def test_our_loop_is_compared_with_a_bare_one_on_a_small_model_alone_and_through_servers() -> None:
    lines = printed("loop.py", "--rounds=1", "--steps=5", "--only=mlp")
    rows = [re.split(r"  +", line) for line in lines[1:]]
    assert [row[1] for row in rows] == ["alone", "1 server", "2 servers"] * 3
    assert all(float(ratio) > 0 for row in rows for ratio in row[-3:])


def test_loader_processes_are_compared_with_a_plain_loop_with_torchs() -> None:
    lines = printed("loader.py", "--rounds=1", "--steps=12", "--sample=0.0005")
    rows = [re.split(r"  +", line) for line in lines[1:]]
    assert [row[0] for row in rows][::4] == ["DataLoader(2)", "Async"]
    assert all(float(ratio) > 0 for row in rows for ratio in row[-2:])


def test_the_loop_of_a_sharded_model_is_compared_with_a_bare_one_and_torchs_collectives_with_ours() -> None:
    lines = printed("sharded.py", "--rounds=1", "--steps=1", "--models", "charlm 64x2")
    assert [line.split()[2:4] for line in lines[1:]] == [
        ["FSDP2", "ours"],
        ["FSDP2", "bare"],
        ["FSDP2", "bare,"],
        ["tensor", "ours"],
        ["tensor", "bare"],
        ["pipeline", "ours"],
        ["pipeline", "bare"],
    ]
    assert all(float(line.split()[-1]) > 0 for line in lines[1:])


def test_the_bubble_of_each_schedule_is_beside_its_formula() -> None:
    lines = printed("bubble.py", "--processes=2", "--microbatches=4", "--milliseconds=2", "--rounds=1")
    rows = {line.split()[0]: [float(number) for number in line.split()[1:4]] for line in lines[1:]}
    assert {name: row[0] for name, row in rows.items()} == {
        "GPipe": 0.2,
        "OneForwardOneBackward": 0.2,
        "Interleaved": 0.111,
        "ZeroBubble": 0.077,
    }
    assert all(0 < number < 1 for row in rows.values() for number in row)


def test_what_a_checkpoint_costs_is_counted_in_steps_of_the_same_run() -> None:
    lines = printed("checkpoint.py", "--mib=4", "--intervals=1", "--every=9", "--strategies", "DataParallel")
    (row,) = (line.split() for line in lines[1:])
    assert row[:2] == ["DataParallel", "4"]
    assert len([float(number) for number in row[2:]]) == 6
    assert float(row[2]) > 0


def test_a_restart_in_place_is_compared_with_a_new_process() -> None:
    lines = printed("restart.py", "--rounds=1", "--strategies", "FullyShard")
    (row,) = (line.split() for line in lines[1:])
    assert row[0] == "FullyShard"
    assert all(float(number) > 0 for number in row[1:])


def test_a_worker_that_joins_and_one_that_leaves_are_timed() -> None:
    lines = printed("resize.py", "--rounds=1", "--workers=2")
    assert [line.split()[0] for line in lines[1:]] == ["DataParallel", "ParameterServer"]
    assert all(float(number) > 0 for line in lines[1:] for number in line.split()[1:])


def test_packed_data_is_compared_with_tensors_in_memory() -> None:
    lines = printed("data.py", "--rounds=1", "--steps=20")
    assert len(lines) == 7
    assert all(float(line.split()[-1]) > 0 for line in lines)
    assert lines[-1].startswith("memory / packed at the median")
