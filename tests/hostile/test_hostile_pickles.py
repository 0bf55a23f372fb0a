"""Hostile and damaged pickles and files cost nothing: our error at once, and no memory."""

from __future__ import annotations

import json
import os
import pickle
import resource
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ckpt_tool.containers.pickle_scan import check_opcodes
from ckpt_tool.containers.pickles import loads
from ckpt_tool.containers.torch_zip import TorchArchive
from ckpt_tool.errors import UnreadableError
from ckpt_tool.storage import LocalReader

_TENSOR = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nFloatStorage\n"
_STORED = b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x01tQK\x00"
_RANGE = b"cbuiltins\nrange\nJ\x00\xe1\xf5\x05\x85R"  # range(10 ** 8)

HOSTILE = {
    "a memo index of 2 ** 25": b"\x80\x02]r\x00\x00\x00\x02.",
    "a memo index in text": b"\x80\x02]p40000000\n.",
    "bytes of 2 ** 30 in protocol 4": b"\x80\x04\x8e" + struct.pack("<Q", 1 << 30) + b"x.",
    "bytes of 2 ** 30 in protocol 3": b"\x80\x03B" + struct.pack("<I", 1 << 30) + b"x.",
    "a bytearray of 2 ** 30": b"\x80\x05\x96" + struct.pack("<Q", 1 << 30) + b"x.",
    "a range as a shape": _TENSOR + _STORED + _RANGE + b"(K\x01t\x89NtR.",
    "a range as strides": _TENSOR + _STORED + b"(K\x01t" + _RANGE + b"\x89NtR.",
    "nothing": b"",
    "no end": b"\x80\x02]",
    "an opcode that is none": b"\x80\x02\xff.",
}

_CHILD = """
import resource, sys
from ckpt_tool.containers.pickles import loads
from ckpt_tool.errors import UnreadableError
def peak():
    with open("/proc/self/status") as status:  # of what was asked for, used or not
        return next(int(line.split()[1]) for line in status if line.startswith("VmPeak"))

before = peak()
resource.setrlimit(resource.RLIMIT_CPU, (5, 5))
for line in sys.stdin:
    try:
        loads(bytes.fromhex(line), where="file")
    except UnreadableError as error:
        assert len(str(error)) < 1000
        print("refused", peak() - before)
    else:
        print("read")
"""


@pytest.mark.parametrize("wrong", HOSTILE)
def test_a_pickle_that_says_more_than_it_holds_is_refused_for_nothing(wrong: str) -> None:
    limit = 4 << 30

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    run = subprocess.run(
        [sys.executable, "-c", _CHILD], input=HOSTILE[wrong].hex() + "\n", text=True,
        capture_output=True, timeout=30, preexec_fn=limited, check=False,
    )  # fmt: skip
    words = run.stdout.split()
    assert words[:1] == ["refused"], run
    assert int(words[1]) < 50_000, "kilobytes more than before"


def test_honest_pickles_pass_whatever_their_protocol() -> None:
    value = {f"name {n}" * (n % 40): [n, float(n), (n, str(n)), b"x" * n, 1 << n % 70] for n in range(3000)}
    for protocol in range(6):
        data = pickle.dumps(value, protocol)
        check_opcodes(data)
        assert protocol < 3 or loads(data, where="file") == value  # below, bytes are spelled as calls


def saved(path: Path) -> int:
    """Where the pickle of a new archive begins."""
    torch.save({"weight": torch.zeros(3), "names": [f"name.{n}" for n in range(100)]}, path)
    return path.read_bytes().index(b"name.50")


def test_a_flipped_bit_in_a_pickle_is_told_as_damage_of_its_record(tmp_path: Path) -> None:
    path = tmp_path / "rank.pt"
    at = saved(path)
    data = bytearray(path.read_bytes())
    data[at] ^= 1  # still a sound pickle, of another name
    path.write_bytes(data)
    with pytest.raises(UnreadableError, match=r"record data\.pkl is not what its checksum says"):
        TorchArchive(LocalReader(tmp_path), "rank.pt")


def test_an_archive_without_checksums_is_read(tmp_path: Path) -> None:
    path = tmp_path / "rank.pt"
    old = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        saved(path)
    finally:
        torch.serialization.set_crc32_options(old)
    assert "names" in TorchArchive(LocalReader(tmp_path), "rank.pt").root


@pytest.mark.parametrize("kind", ["pipe", "device", "directory"])
def test_a_source_file_that_is_no_regular_file_is_not_waited_for(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "model.safetensors"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    with pytest.raises(UnreadableError, match="no regular file"):
        LocalReader(tmp_path).size("model.safetensors")


def test_one_name_given_twice_among_100000_is_found_in_linear_time(tmp_path: Path) -> None:
    from ckpt_tool.containers.safetensors import SafetensorsFile

    names = [f"n{n}" for n in range(100_000)]
    text = "{" + ",".join(f"{json.dumps(name)}:0" for name in [*names, names[-1]]) + "}"
    (tmp_path / "m.safetensors").write_bytes(struct.pack("<Q", len(text)) + text.encode())
    spent = resource.getrusage(resource.RUSAGE_SELF).ru_utime
    with pytest.raises(UnreadableError, match="names n99999 twice"):
        SafetensorsFile(LocalReader(tmp_path), "m.safetensors", state="weight")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_utime - spent < 5
