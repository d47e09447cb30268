"""Runs a command in a network namespace of its own, and writes down all that goes over its loopback: `python capture.py OUT COMMAND…`.

Each direction of each TCP connection becomes one file of OUT, its bytes in their order. Needs no rights beside those of a user namespace.
"""

import ctypes
import fcntl
import os
import select
import socket
import struct
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP = 0x8913, 0x8914, 1
SO_RCVBUFFORCE, SOL_PACKET, PACKET_STATISTICS, OUTGOING = 33, 263, 6, 4
Flow = tuple[bytes, bytes]
"""Address and port of both ends."""


def enter_namespace() -> None:
    user, group = os.getuid(), os.getgid()
    flags = CLONE_NEWNET if user == 0 else CLONE_NEWNET | CLONE_NEWUSER
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(flags):
        raise OSError(ctypes.get_errno(), "a network namespace cannot be made")
    if user:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        request = struct.pack("16sh14x", b"lo", 0)
        (now,) = struct.unpack("16xh14x", fcntl.ioctl(asking, SIOCGIFFLAGS, request))
        fcntl.ioctl(asking, SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", now | IFF_UP))


def take(packet: bytes, flows: dict[Flow, dict[int, bytes]]) -> None:
    """One packet of IP."""
    if packet[0] >> 4 == 4 and packet[9] == socket.IPPROTO_TCP:
        ends, tcp = (
            (packet[12:16], packet[16:20]),
            packet[(packet[0] & 15) * 4 : struct.unpack_from(">H", packet, 2)[0]],
        )
    else:
        return
    (sequence,), data = struct.unpack_from(">I", tcp, 4), tcp[(tcp[12] >> 4) * 4 :]
    flow = flows[ends[0] + tcp[:2], ends[1] + tcp[2:4]]
    if tcp[13] & 2:
        flow[-1] = sequence.to_bytes(4, "big")
    if data:
        begin = int.from_bytes(flow.get(-1, b"\0\0\0\0"), "big")
        place = (sequence - begin) % (1 << 32)
        flow[place] = max(flow.get(place, b""), data, key=len)


def main(out: Path, command: list[str]) -> int:
    enter_namespace()
    with socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(3)) as tap:
        tap.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE if os.getuid() == 0 else socket.SO_RCVBUF, 512 << 20)
        tap.bind(("lo", 0))
        flows: dict[Flow, dict[int, bytes]] = defaultdict(dict)
        child = subprocess.Popen(command)
        while select.select([tap], [], [], 0.2)[0] or child.poll() is None:
            if not select.select([tap], [], [], 0)[0]:
                continue
            packet, address = tap.recvfrom(1 << 18)
            if address[2] == OUTGOING:  # loopback shows each packet twice
                take(packet, flows)
        _, dropped = struct.unpack("II", tap.getsockopt(SOL_PACKET, PACKET_STATISTICS, 8))
    if dropped:
        print(f"{dropped} packets were not written down", file=sys.stderr)
        return 99
    out.mkdir()
    for number, flow in enumerate(flows.values()):
        (out / str(number)).write_bytes(b"".join(flow[place] for place in sorted(flow) if place >= 0))
    return child.wait()


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
