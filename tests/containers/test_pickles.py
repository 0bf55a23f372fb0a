"""Pickles: what is read without running anything, what is refused, and that writing gives it back."""

from __future__ import annotations

import argparse
import collections
import contextlib
import datetime
import functools
import io
import os
import pathlib
import pickle
import types
import zipfile
from typing import Any

import numpy as np
import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from hypothesis import given
from hypothesis import strategies as st

from ckpt_tool.canonical import DType
from ckpt_tool.containers import pickles
from ckpt_tool.containers.pickle_records import Opaque, TensorRecord, TorchSize
from ckpt_tool.containers.pickle_writer import dumps
from ckpt_tool.containers.pickles import loads
from ckpt_tool.errors import UnreadableError, UnsafePickleError


def data_pkl(value: Any) -> bytes:
    """The pickle inside what ``torch.save`` writes."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return zipfile.ZipFile(buffer).read("archive/data.pkl")


def read(value: Any, protocol: int = 2) -> Any:
    return loads(pickle.dumps(value, protocol), where="x")


# ---- plain values

keys = st.one_of(st.text(), st.integers(), st.booleans(), st.tuples(st.integers()))
atoms = st.one_of(
    *(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(), st.binary()),
    st.complex_numbers(allow_nan=False),
)
values = st.recursive(
    atoms,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(keys, inner, max_size=4),
        st.dictionaries(keys, inner, max_size=4).map(collections.OrderedDict),
        st.sets(st.integers(), max_size=4),
        st.frozensets(st.text(), max_size=4),
    ),
    max_leaves=12,
)


def same(a: Any, b: Any) -> bool:
    """Equal, of the same types all the way down, in the same order."""
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return len(a) == len(b) and all(same(x, y) and same(a[x], b[y]) for x, y in zip(a, b, strict=True))
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


@given(values, st.sampled_from([2, 3, 4, 5]))
def test_plain_values_are_read_as_pickle_reads_them(value: Any, protocol: int) -> None:
    assert same(read(value, protocol), value)


@given(values)
def test_plain_values_survive_being_written(value: Any) -> None:
    assert same(pickle.loads(dumps(read(value))), value)
    assert same(loads(dumps(read(value)), where="x"), value)


@given(values)
def test_equal_values_give_equal_bytes(value: Any) -> None:
    again = pickle.loads(pickle.dumps(value))
    assert dumps(read(value)) == dumps(read(again))


NAMED = {
    "empty bytes": b"",
    "bytes": bytes(range(256)),
    "bytearray": bytearray(b"ab\xff"),
    "empty bytearray": bytearray(),
    "negative zero": -0.0,
    "infinity": float("-inf"),
    "small integer": -(2**31),
    "large integer": 2**31,
    "larger integer": -(2**63),
    "huge integer": 3**2000,
    "surrogate": "\ud800",
    "text": "δ\n\0",
    "long text": "x" * 70_000,
    "slice": slice(1, None, 2),
    "range": range(3, 30, 4),
    "nested empty": [(), {}, [], set(), frozenset()],
    "defaultdict": collections.defaultdict(list, {"a": [1]}),
    "defaultdict without factory": collections.defaultdict(None, {"a": 1}),
    "defaultdict of int": collections.defaultdict(int, {"a": 1}),
    "defaultdict of str": collections.defaultdict(str, {"a": "b"}),
    "many items": list(range(3000)),
    "shared": [[1, 2]] * 3,
    "int keys": {1: "a", 0: "b", -1: "c"},
}


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("name", NAMED)
def test_value(name: str, protocol: int) -> None:
    value = NAMED[name]
    assert same(read(value, protocol), value)
    assert same(pickle.loads(dumps(read(value, protocol))), value)


def test_nan_keeps_being_one() -> None:
    value = pickle.loads(dumps(read(float("nan"))))
    assert value != value


def test_sets_are_written_in_one_order() -> None:
    assert dumps({"b", "a", "c"}) == dumps({"c", "b", "a"})


# ---- objects of known classes: stand-ins, written back under their own names

OBJECTS = {
    "namespace": argparse.Namespace(lr=0.1, nested=argparse.Namespace(a=[1])),
    "simple namespace": types.SimpleNamespace(a=1),
    "path": pathlib.PosixPath("/a/b"),
    "pure path": pathlib.PurePosixPath("a"),
    "datetime": datetime.datetime(2025, 1, 2, 3, 4, 5, 6),
    "date": datetime.date(2025, 1, 2),
    "timedelta": datetime.timedelta(1, 2, 3),
    "timezone": datetime.datetime(2025, 1, 2, tzinfo=datetime.timezone.utc),
    "device": torch.device("cuda", 3),
    "zero stage": ZeroStageEnum(3),
    "numpy scalar": np.float64(1.5),
    "numpy dtype": np.dtype("<f4"),
}


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("name", OBJECTS)
def test_object_is_a_stand_in_that_is_written_back(name: str, protocol: int) -> None:
    value = OBJECTS[name]
    read_back = read({"x": value}, protocol)
    assert isinstance(read_back["x"], Opaque)
    again = pickle.loads(dumps(read_back))["x"]
    assert type(again) is type(value)
    assert again == value


@pytest.mark.parametrize("protocol", [2, 4])
def test_numpy_arrays_and_rng_state_are_written_back(protocol: int) -> None:
    state = np.random.RandomState(7).get_state()
    kind, array, *rest = pickle.loads(dumps(read(state, protocol)))
    assert (kind, rest) == (state[0], list(state[2:]))
    assert np.array_equal(array, state[1])
    assert array.dtype == state[1].dtype


@pytest.mark.parametrize(
    "scaler",
    [
        LossScaler(4.0),
        DynamicLossScaler(2**16, 2.0, 1000, 1.0, 2, False, dtype=torch.float16),
    ],
    ids=["static", "dynamic"],
)
def test_deepspeeds_loss_scalers_are_written_back(scaler: Any) -> None:
    again = pickle.loads(dumps(loads(data_pkl(scaler), where="x")))
    assert type(again) is type(scaler)
    assert vars(again) == vars(scaler)


def test_stand_ins_are_equal_where_their_content_is() -> None:
    one, same_, other = (read(argparse.Namespace(a=a)) for a in (1, 1, 2))
    assert one == same_
    assert one != other


def test_reading_imports_nothing() -> None:
    import subprocess
    import sys

    from tests.conftest import child_env

    code = (
        "import sys, pickle\n"
        "from ckpt_tool.containers import pickles\n"
        f"pickles.loads({pickle.dumps({'z': ZeroStageEnum(3), 'n': np.float64(2)}, 2)!r}, where='x')\n"
        "print([m for m in ('deepspeed', 'numpy', 'torch') if m in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=child_env())
    assert done.stdout.strip() == "[]", done.stderr


# ---- tensors


def test_tensor_is_described_and_not_read() -> None:
    record = loads(data_pkl(torch.zeros(2, 3, dtype=torch.bfloat16)), where="x")
    assert (record.dtype, record.shape, record.stride, record.offset) == (DType.bfloat16, (2, 3), (3, 1), 0)
    assert record.storage.numel == 6
    assert record.is_contiguous


def test_view_keeps_its_offset_and_strides() -> None:
    record = loads(data_pkl(torch.zeros(4, 6)[1:3, 2:4]), where="x")
    assert (record.offset, record.shape, record.stride) == (8, (2, 2), (6, 1))
    assert not record.is_contiguous


def test_parameter_and_attributes_are_described() -> None:
    tensor = torch.zeros(3).requires_grad_(True)
    tensor.ds_id = "0_14"  # type: ignore[attr-defined]
    record = loads(data_pkl(tensor), where="x")
    assert (record.requires_grad, record.attributes) == (True, {"ds_id": "0_14"})
    assert loads(data_pkl(torch.nn.Parameter(torch.zeros(3))), where="x").shape == (3,)


def test_size_is_kept() -> None:
    size = loads(data_pkl(torch.Size([2, 3])), where="x")
    assert type(size) is TorchSize
    assert pickle.loads(dumps(size)) == torch.Size([2, 3])
    assert type(pickle.loads(dumps(size))) is torch.Size


@pytest.mark.parametrize("dtype", [torch.float16, torch.int64, torch.float8_e5m2], ids=str)
def test_dtype_is_kept(dtype: torch.dtype) -> None:
    assert pickle.loads(dumps(loads(data_pkl(dtype), where="x"))) is dtype


# ---- refused: what a checkpoint has no business naming


class Calls:
    def __init__(self, function: Any, *args: Any) -> None:
        self._call = (function, args)

    def __reduce__(self) -> Any:
        return self._call


REFUSED: dict[str, Any] = {
    "posix.system": Calls(os.system, "true"),
    "builtins.eval": Calls(eval, "1"),
    "builtins.exec": Calls(exec, "1"),
    "builtins.getattr": Calls(getattr, "x", "upper"),
    "builtins.setattr": Calls(setattr, "x", "upper", 1),
    "builtins.__import__": Calls(__import__, "os"),
    "builtins.print": Calls(print),
    "builtins.open": Calls(open, os.devnull),
    "builtins.object": Calls(object),
    "builtins.type": Calls(type, "x"),
    "functools.partial": functools.partial(print),
    "torch.load": Calls(torch.load, "x"),
    "torch.storage._load_from_bytes": Calls(torch.storage._load_from_bytes, b""),
    "copyreg._reconstructor": Calls(__import__("copyreg")._reconstructor, dict, dict, {}),
    "collections.Counter": collections.Counter("aab"),
    "operator.attrgetter": Calls(__import__("operator").attrgetter, "x"),
    "pickle.loads": Calls(pickle.loads, b"N."),
    "torch.jit": Calls(torch.jit.load, "x"),
}


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name: str, protocol: int) -> None:
    with pytest.raises(UnsafePickleError, match="the-file") as raised:
        loads(pickle.dumps({"a": REFUSED[name]}, protocol), where="the-file")
    assert name.rsplit(".", 1)[-1] in str(raised.value)


@pytest.mark.parametrize(
    "module", ["os", "posix", "builtins", "torch", "deepspeed.runtime.zero.config", ""]
)
def test_refuses_dotted_names(module: str) -> None:
    """STACK_GLOBAL reaches attributes of attributes."""
    name = "ZeroStageEnum.__init__.__globals__"
    data = b"\x80\x04" + b"".join(b"\x8c" + bytes([len(text)]) + text.encode() for text in (module, name))
    with pytest.raises(UnsafePickleError):
        loads(data + b"\x93.", where="x")


def test_refuses_extension_codes() -> None:
    with pytest.raises(UnreadableError):
        loads(b"\x80\x02\x82\x01.", where="x")


def test_refuses_other_persistent_ids() -> None:
    for pid in (
        b"K\x01",
        b"(X\x04\x00\x00\x00evilK\x01t",
        b"(X\x07\x00\x00\x00storageK\x01K\x02K\x03K\x04t",
    ):
        with pytest.raises(UnreadableError):
            loads(b"\x80\x02" + pid + b"Q.", where="x")


# ---- a pickle cannot change what it is handed


def build(target: bytes, state: bytes) -> bytes:
    return b"\x80\x02" + target + state + b"b."


ATTRIBUTE = b"X\x08\x00\x00\x00polluted" + b"K\x01"
SLOTS = b"(N}" + ATTRIBUTE + b"st"  # (None, {"polluted": 1}): BUILD calls setattr
PLAIN = b"}" + ATTRIBUTE + b"s"  # {"polluted": 1}: BUILD updates __dict__
GLOBALS = {
    "torch.Size": b"ctorch\nSize\n",
    "OrderedDict": b"ccollections\nOrderedDict\n",
    "defaultdict": b"ccollections\ndefaultdict\n",
    "stand-in": b"cdeepspeed.runtime.zero.config\nZeroStageEnum\n",
    "namespace": b"cargparse\nNamespace\n",
    "rebuild": b"ctorch._utils\n_rebuild_tensor_v2\n",
    "dtype": b"ctorch\nfloat32\n",
    "storage": b"ctorch\nFloatStorage\n",
    "tensor": b"ctorch\nTensor\n",
    **{name: f"c__builtin__\n{name}\n".encode() for name in ("list", "dict", "set", "int", "bytearray")},
}


@pytest.mark.parametrize("state", [SLOTS, PLAIN], ids=["slots", "dict"])
@pytest.mark.parametrize("name", GLOBALS)
def test_build_does_not_change(name: str, state: bytes) -> None:
    with pytest.raises(UnreadableError):
        loads(build(GLOBALS[name], state), where="x")
    fresh = loads(b"\x80\x02" + GLOBALS[name] + b".", where="x")
    for thing in (fresh, type(fresh), Opaque, TensorRecord, DType, DType.float32):
        assert not hasattr(thing, "polluted")


@pytest.mark.parametrize(
    "attribute", ["__init__", "__new__", "__class__", "args", "module", "__setstate__"]
)
def test_build_does_not_change_a_stand_ins_own(attribute: str) -> None:
    name = attribute.encode()
    state = b"(N}X" + len(name).to_bytes(4, "little") + name + b"K\x01st"
    with pytest.raises(UnreadableError):
        loads(build(GLOBALS["stand-in"], state), where="x")
    assert read(ZeroStageEnum(3)).args == (3,)


@pytest.mark.parametrize("value", [torch.zeros(4), torch.zeros(4).requires_grad_(), torch.float32], ids=str)
def test_build_does_not_change_a_record_that_was_checked(value: Any) -> None:
    """Offset -1 of storage 7: what a view may reach is checked when it is made, and stays."""
    evil = data_pkl(value)[:-1] + b"(K\x07K\x02J\xff\xff\xff\xfftb."
    with pytest.raises(UnreadableError):
        loads(evil, where="x")


def test_loads_do_not_affect_each_other() -> None:
    one = read(argparse.Namespace(a=1))
    two = read(argparse.Namespace(a=2))
    assert (one.state, two.state) == ({"a": 1}, {"a": 2})


# ---- views that reach outside of their storage


def tensor_pickle(numel: int, offset: int, shape: tuple[Any, ...], stride: tuple[Any, ...]) -> bytes:
    storage = pickles.StorageRecord("0", DType.float32, numel)
    return dumps(TensorRecord(storage, DType.float32, offset, shape, stride))


def test_a_view_inside_its_storage_is_read() -> None:
    assert loads(tensor_pickle(8, 2, (2, 3), (3, 1)), where="x").numel == 6


@pytest.mark.parametrize(
    ("numel", "offset", "shape", "stride"),
    [
        (8, 3, (2, 3), (3, 1)),
        (8, 8, (1,), (1,)),
        (8, -1, (1,), (1,)),
        (8, 0, (-1,), (1,)),
        (8, 0, (2,), (-1,)),
        (8, 0, (2,), (8,)),
        (8, 0, (2, 2), (1,)),
        (8, 0, (2.0,), (1,)),
        (8, 0, (2**63, 2**63), (1, 1)),
        (0, 0, (1,), (1,)),
    ],
)
def test_refuses_a_view_outside_its_storage(
    numel: int, offset: int, shape: tuple[Any, ...], stride: tuple[Any, ...]
) -> None:
    with pytest.raises(UnreadableError):
        loads(tensor_pickle(numel, offset, shape, stride), where="x")


# ---- damage and size


@given(st.binary(max_size=60))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    with contextlib.suppress(UnreadableError):
        loads(b"\x80\x02" + data, where="x")


@given(st.data())
def test_a_damaged_pickle_is_read_or_refused(data: st.DataObject) -> None:
    sound = bytearray(data_pkl({"a": torch.zeros(3), "b": [1, "x", argparse.Namespace(c=2)]}))
    for _ in range(data.draw(st.integers(1, 3))):
        sound[data.draw(st.integers(0, len(sound) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(UnreadableError):
        loads(bytes(sound), where="x")


def test_refuses_an_empty_pickle() -> None:
    with pytest.raises(UnreadableError, match="the-file"):
        loads(b"", where="the-file")


BOMBS = {
    "bytearray": b"c__builtin__\nbytearray\nJ\x00\x00\x00\x40\x85R.",
    "bytes": b"c__builtin__\nbytes\nJ\x00\x00\x00\x40\x85R.",
    "list of a range": b"c__builtin__\nlist\nc__builtin__\nrange\nJ\x00\x00\x00\x40\x85R\x85R.",
    "set of a range": b"c__builtin__\nset\nc__builtin__\nrange\nJ\x00\x00\x00\x40\x85R\x85R.",
    "tuple of a range": b"c__builtin__\ntuple\nc__builtin__\nrange\nJ\x00\x00\x00\x40\x85R\x85R.",
    "size of a range": b"ctorch\nSize\nc__builtin__\nrange\nJ\x00\x00\x00\x40\x85R\x85R.",
    "dict of a range": b"ccollections\nOrderedDict\nc__builtin__\nrange\nJ\x00\x00\x00\x40\x85R\x85R.",
    "memo": b"r\xff\xff\xff\x3f.",
    "frame": b"\x80\x04\x95\x00\x00\x00\x00\x01\x00\x00\x00.",
    "text": b"X\x00\x00\x00\x40.",
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_small_pickle_takes_little_memory(name: str) -> None:
    """A child with a limit of 1 GiB of address space: reading must refuse, not die."""
    import subprocess
    import sys

    from tests.conftest import child_env

    code = (
        "import resource\n"
        "from ckpt_tool.containers import pickles\n"
        "resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))\n"
        f"try:\n    pickles.loads(b'\\x80\\x02' + {BOMBS[name]!r}, where='x')\n"
        "except pickles.UnreadableError as error:\n    assert 'MemoryError' not in str(error), error\n"
        "status = dict(line.split(':', 1) for line in open('/proc/self/status'))\n"
        "print(int(status['VmHWM'].split()[0]) < 150_000)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=child_env())
    assert done.stdout.strip() == "True", done.stderr + done.stdout


def test_a_list_that_contains_itself_is_not_written() -> None:
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises((RecursionError, TypeError, ValueError, UnreadableError)):
        dumps(read(loop))


def test_refuses_to_write_what_was_never_read() -> None:
    with pytest.raises(TypeError, match="object"):
        dumps({"a": object()})
