"""Pickles read beside others that say nearly the same: always what reading them alone gives."""

from __future__ import annotations

import argparse
import io
import pathlib
import pickle
import random
import zipfile
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch

from ckpt_tool.containers import pickles
from ckpt_tool.containers.alike import Alike
from ckpt_tool.errors import UnreadableError, UnsafePickleError


def pickled(value: Any) -> bytes:
    """What torch.save pickles."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return zipfile.ZipFile(buffer).read("archive/data.pkl")


def state(rank: int) -> dict[str, Any]:
    """Like a rank's model_states: much that all ranks say, and numbers of its own."""
    return {
        "module": OrderedDict(a=torch.empty(0), b=torch.arange(4.0)),
        "layers": [
            {
                "id": layer,
                "rank": rank,
                "start": rank * 300,
                "maps": [[1, 2], {"x": (3, 4)}],
                "name": f"l{layer}",
            }
            for layer in range(5)
        ],
        "counts": defaultdict(int, seen=rank * 1000),
        "shape": torch.Size([3, 4]),
        "scale": 0.5 + rank,
        "overflow": rank % 2 == 1,
        "host": f"node-{rank:0{1 + rank % 3}d}",
        "pair": (rank, "same"),
        "long": 2**40 + rank,
    }


def spelled(value: Any) -> str:
    """Tells True from 1, and tuples from lists."""
    return f"{type(value).__name__}:{value!r}"


def read_both(reader: Alike, data: bytes) -> tuple[Any, Any]:
    return reader.loads(data, where="here"), pickles.loads(data, where="here")


def test_values_that_differ_between_ranks_are_each_ranks_own() -> None:
    reader = Alike()
    for rank in (0, 1, 2, 63, 64, 255, 256, 70000, 1, 0):
        ours, alone = read_both(reader, pickled(state(rank)))
        assert spelled(ours) == spelled(alone)


def test_what_ranks_say_alike_is_one_object() -> None:
    reader = Alike()
    one, other = (reader.loads(pickled(state(rank)), where="here") for rank in (1, 2))
    assert one["module"] is other["module"]
    assert all(a["maps"] is b["maps"] for a, b in zip(one["layers"], other["layers"], strict=True))
    assert one["layers"][0] is not other["layers"][0]


CHANGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a field more": lambda s: s["layers"][3].update(more=1),
    "a field less": lambda s: s["layers"][3].pop("start"),
    "another field": lambda s: s["layers"][3].update(begin=s["layers"][3].pop("start")),
    "an element more in a list": lambda s: s["layers"][3]["maps"][0].append(7),
    "an element less in a list": lambda s: s["layers"][3]["maps"][0].pop(),
    "another order": lambda s: s["layers"].reverse(),
    "one number deep inside": lambda s: s["layers"][3]["maps"][1].update(x=(3, 5)),
    "none in the place of a number": lambda s: s["layers"][3].update(rank=None),
    "a truth value in the place of a number": lambda s: s["layers"][3].update(rank=True),
    "a float in the place of a number": lambda s: s["layers"][3].update(rank=1.0),
    "a text in the place of a number": lambda s: s["layers"][3].update(rank="1"),
    "a tensor more": lambda s: s["module"].update(c=torch.zeros(2)),
    "a tensor of another shape": lambda s: s["module"].update(b=torch.zeros(5)),
    "a tensor of another dtype": lambda s: s["module"].update(b=torch.zeros(4, dtype=torch.int64)),
    "a tensor that requires grad": lambda s: s["module"]["b"].requires_grad_(),
    "a tensor with strides": lambda s: s["module"].update(b=torch.zeros(4, 4).t()),
    "two tensors of one storage": lambda s: s["module"].update(a=s["module"]["b"]),
    "another size": lambda s: s.update(shape=torch.Size([3, 5])),
    "another key of a dict": lambda s: s["counts"].update(other=s["counts"].pop("seen")),
    "a path": lambda s: s.update(host=pathlib.PosixPath("/ranks/3")),
    "arguments": lambda s: s.update(host=argparse.Namespace(rank=3)),
    "a set": lambda s: s.update(host={1, 2}),
    "an end that is cut off": lambda s: s.pop("long"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_rank_that_differs_in(what: str) -> None:
    changed = state(2)
    CHANGES[what](changed)
    reader = Alike()
    for data in (
        pickled(state(0)),
        pickled(state(1)),
        pickled(changed),
        pickled(state(3)),
        pickled(changed),
    ):
        ours, alone = read_both(reader, data)
        assert spelled(ours) == spelled(alone)


@pytest.mark.parametrize(
    "hold",
    [
        lambda text: {"key": text, text: 1},
        lambda text: {"key": text, "path": pathlib.PosixPath(text)},
        lambda text: {"key": text, "set": {text}},
        lambda text: {"key": text, "frozen": frozenset([text])},
        lambda text: {"key": text, "slice": slice(text)},
        lambda text: {"key": text, "arguments": argparse.Namespace(text=text)},
        lambda text: {"key": text, "twice": [text, (text, {"deep": text})]},
        lambda text: {"key": text, "bytes": text.encode()},
        lambda text: {"key": text, "by tuple": {(text, 1): 2}},
        lambda text: {"key": (inner := [text]), "again": argparse.Namespace(inner=inner)},
        lambda text: {"key": (inner := [text]), "again": {"x": inner, "y": [inner]}},
    ],
)  # fmt: skip
def test_text_that_stands_in_several_places(hold: Callable[[str], Any]) -> None:
    reader = Alike()
    for text in ("rank_0", "rank_1", "rank_22", "rank_1"):
        ours, alone = read_both(reader, pickled(hold(text)))
        assert spelled(ours) == spelled(alone)


def test_attributes_of_a_tensor_that_differ() -> None:
    reader = Alike()
    for rank in (0, 1, 2):
        tensor = torch.zeros(3)
        tensor.ds_id = f"{rank}_9"  # type: ignore[attr-defined]
        ours, alone = read_both(reader, pickled({"flat": tensor, "rank": rank}))
        assert spelled(ours) == spelled(alone)
        assert ours["flat"].attributes == {"ds_id": f"{rank}_9"}


def test_devices_that_differ_hinder_nothing() -> None:
    reader = Alike()
    data = pickled(state(0))
    one = reader.loads(data.replace(b"\x03\x00\x00\x00cpu", b"\x06\x00\x00\x00cuda:0"), where="here")
    other = reader.loads(data.replace(b"\x03\x00\x00\x00cpu", b"\x07\x00\x00\x00cuda:15"), where="here")
    assert one is other


def test_pickle_that_names_another_class_is_refused_beside_one_that_is_known() -> None:
    reader = Alike()
    data = pickle.dumps({"a": 1, "b": torch.device("cpu")}, protocol=2)
    reader.loads(data, where="here")
    with pytest.raises(UnsafePickleError, match=r"posix.system"):
        reader.loads(data.replace(b"ctorch\ndevice\n", b"cposix\nsystem\n"), where="here")


def test_literal_that_is_cut_off() -> None:
    reader = Alike()
    data = pickle.dumps({"a": 70000, "b": 1}, protocol=2)
    reader.loads(data, where="here")
    for end in range(len(data)):
        with pytest.raises(UnreadableError):
            reader.loads(data[:end], where="here")


def test_pickle_with_something_after_it() -> None:
    reader = Alike()
    data = pickle.dumps({"a": 70000}, protocol=2)
    assert reader.loads(data + b"more", where="here") == {"a": 70000}
    assert reader.loads(data, where="here") == {"a": 70000}


@pytest.mark.parametrize("protocol", [0, 1, 3, 4, 5])
def test_pickles_of_other_protocols(protocol: int) -> None:
    reader = Alike()
    for rank in range(3):
        assert reader.loads(pickle.dumps({"rank": rank, "x": [1]}, protocol), where="here")["rank"] == rank


def test_many_kinds_of_pickles_in_turn() -> None:
    reader = Alike()
    for rank in range(120):
        value = {"ranks": list(range(rank % 40)), "rank": rank}
        assert reader.loads(pickled(value), where="here") == value


def random_value(draw: random.Random, depth: int) -> Any:
    kind = draw.randrange(9 if depth else 5)
    if kind == 0:
        return draw.choice([0, 1, 255, 256, 65535, 65536, -1, 2**31, -(2**40), draw.randrange(2**20)])
    if kind == 1:
        return draw.choice([True, False, None])
    if kind == 2:
        return draw.random()
    if kind in (3, 4):
        return draw.choice(["", "a", "rank", "ä", "x" * 300])
    items = [random_value(draw, depth - 1) for _ in range(draw.randrange(4))]
    if kind == 5:
        return items
    if kind == 6:
        return tuple(items)
    if kind == 7:
        return OrderedDict((str(index), item) for index, item in enumerate(items))
    return dict(enumerate(items))


def varied(draw: random.Random, value: Any) -> Any:
    """The same with some leaves replaced, mostly by others of their kind."""
    if isinstance(value, dict):
        return type(value)((key, varied(draw, item)) for key, item in value.items())
    if isinstance(value, list | tuple):
        return type(value)(varied(draw, item) for item in value)
    if draw.random() < 0.7:
        return value
    if draw.random() < 0.1:
        return random_value(draw, 1)
    if type(value) is int:
        return value + draw.choice([1, 300, 70000, -2, 2**33])
    return {bool: not value, float: 0.25, str: f"{value}?"}.get(type(value), value)


@pytest.mark.parametrize("seed", range(60))
def test_whatever_ranks_have_in_common(seed: int) -> None:
    draw = random.Random(seed)
    first = [random_value(draw, 4) for _ in range(6)]
    reader = Alike()
    for _ in range(8):
        data = pickle.dumps(varied(draw, first), protocol=2)
        ours, alone = read_both(reader, data)
        assert spelled(ours) == spelled(alone)
