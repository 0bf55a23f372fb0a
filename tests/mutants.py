"""Mutants: small changes that would make a wrong model or lose a run, each of which a test must see.

    python -m tests.mutants            # all, about ten minutes on two cores
    python -m tests.mutants NAME ...   # those with NAME in their name

Each is applied to a copy of the package in a temporary directory, and the tests that it names are run there
(before that, without any change: they have to pass). A mutant is dead if one of them fails, and alive if
all pass: then a test is missing. ``test_mutants.py`` checks in every run that the list still fits the code.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
_NEEDED = ("ckpt_tool", "tests", "docs")  # copied, because they are changed or look beside themselves
_LINKED = ("fixtures", "pyproject.toml", "README.md", "benchmarks")
_SECONDS = 600


class Mutant(NamedTuple):
    """``old``, which is once in ``file``, becomes ``new``. ``tests`` are pytest's arguments."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


DEEPSPEED = "ckpt_tool/formats/deepspeed"

MUTANTS = (
    # ---- those that lived once
    Mutant(
        "the planner does not look for elements in two chunks",
        "ckpt_tool/plan.py",
        "                check_disjoint(tensor)\n",
        "                pass\n",
        ("tests/test_plan.py::test_chunks_that_do_not_tile_their_tensor_are_refused",),
    ),
    Mutant(
        "chunks of different sizes become one",
        "ckpt_tool/geometry.py",
        "    if (a.counts[:dim], a.counts[dim + 1 :]) != (b.counts[:dim], b.counts[dim + 1 :]):\n"
        "        return None\n",
        "",
        ("tests/test_geometry.py::test_views_read_what_numpy_reads",),
    ),
    Mutant(
        "experts of different dtypes in one stack of files",
        "ckpt_tool/families/naming.py",
        "(tensor.shape, tensor.dtype) != (first.shape, first.dtype)",
        "tensor.shape != first.shape",
        ("tests/families/test_registry.py::test_experts_of_two_dtypes_are_refused",),
    ),
    Mutant(
        "experts of different dtypes in one stack of ranks",
        f"{DEEPSPEED}/reading/zero3.py",
        "tensor is None or tensor.shape[1:] != matrix or tensor.dtype != example.dtype",
        "tensor is None or tensor.shape[1:] != matrix",
        ("tests/formats/test_zero3_rejects.py::test_moment_of_another_dtype_on_one_ep_rank",),
    ),
    Mutant(
        "overflow to fp16 is looked for in the first block only",
        "ckpt_tool/execute/casts.py",
        "    for start in range(0, result.size, _BLOCK):\n",
        "    for start in range(0, min(result.size, _BLOCK), _BLOCK):\n",
        ("tests/execute/test_casts.py::test_a_number_too_large_for_fp16_is_found_wherever_it_is",),
    ),
    Mutant(
        "a journal that was published is taken for the directory's",
        "ckpt_tool/stores/local_area.py",
        "            return os.path.samestat(os.fstat(descriptor), (self.path / JOURNAL).stat())\n",
        "            return True\n",
        (
            "tests/test_commit.py::test_a_lock_on_a_journal_that_was_published_is_not_taken_for_the_directorys",
        ),
    ),
    Mutant(
        "steps that differ in parts that are joined",
        "ckpt_tool/families/naming.py",
        "            if scalars.setdefault((renamed, state), scalar) != scalar:\n",
        "            if scalars.setdefault((renamed, state), scalar) is None:\n",
        ("tests/families/test_registry.py::test_steps_that_differ_in_parts_that_are_published_as_one",),
    ),
    Mutant(
        "decoder_sparse_step off by one",
        "ckpt_tool/families/agreement.py",
        "layer not in dense and (layer + 1) % step == 0",
        "layer not in dense and layer % step == 0",
        ("tests/families/test_registry.py::test_which_layers_have_experts",),
    ),
    Mutant(
        "data-loader state is kept at another world size",
        "ckpt_tool/formats/dcp/writing/like.py",
        'source is None or (key.startswith("dataloader") and not self._same_world)',
        "source is None",
        (
            "tests/formats/test_dcp_like.py::test_the_dataloaders_state_of_another_number_of_ranks_is_not_taken",
        ),
    ),
    Mutant(
        "data-loader state is kept at another world size without a template",
        "ckpt_tool/formats/dcp/writing/target.py",
        'not key.startswith("dataloader") or self._world == self._checkpoint.topology.world_size',
        "key",
        (
            "tests/formats/test_dcp_like.py::test_the_dataloaders_state_is_left_out_at_another_number_of_ranks",
        ),
    ),
    Mutant(
        "a parameter in two sub-groups",
        f"{DEEPSPEED}/reading/placement.py",
        "                if name in places:\n",
        "                if name in ():\n",
        ("tests/formats/test_zero3_rejects.py::test_parameter_in_two_sub_groups_that_hold_it_both",),
    ),
    Mutant(
        "casts are checked on the source's side only",
        "ckpt_tool/plan.py",
        "if not {tensor.dtype, fill.dtype} <= CASTABLE:",
        "if tensor.dtype not in CASTABLE:",
        ("tests/test_plan.py::test_casts_from_or_to_what_is_no_float_are_refused",),
    ),
    Mutant(
        "num_local_experts is larger than the placement says",
        f"{DEEPSPEED}/reading/autoep.py",
        'len(own) != entry["num_local_experts"]',
        'len(own) > entry["num_local_experts"]',
        ("tests/formats/test_zero3_rejects.py::test_local_count_that_contradicts_the_placement",),
    ),
    Mutant(
        "num_local_experts is larger than a uniform placement makes it",
        f"{DEEPSPEED}/facts/partition.py",
        "if local * ep_size != experts:",
        "if local * ep_size < experts:",
        ("tests/formats/test_zero3_rejects.py::test_uneven_counts_without_a_placement",),
    ),
    Mutant(
        "an empty tensor has no slot",
        "ckpt_tool/plan.py",
        "    if len(known) > len(used) + left_empty:\n",
        "    if not known:\n",
        ("tests/test_plan.py::test_an_empty_source_tensor_has_to_be_used_too",),
    ),
    Mutant(
        "an empty tensor has no part in a rank's buffers",
        f"{DEEPSPEED}/writing/zero3_target.py",
        "    if share.numel or not tensor.numel:  # a tensor without elements has a place, too\n",
        "    if share.numel:\n",
        ("tests/formats/test_reshard.py::test_parameters_without_elements_stay",),
    ),
    # ---- accounting
    Mutant(
        "what is written as a copy counts as written",
        "ckpt_tool/plan.py",
        "        used.add_all(in_objects)\n",
        "        for held in (in_objects, *self._copies.values()):\n            used.add_all(held)\n",
        ("tests/test_accounting.py::test_a_copy_does_not_stand_for_the_tensor_itself",),
    ),
    Mutant(
        "what is written twice is not looked for",
        "ckpt_tool/plan.py",
        "            if double is not None:\n",
        "            if double == ():\n",
        ("tests/test_accounting.py::test_any_part_of_a_target_that_is_written_twice_is_refused",),
    ),
    Mutant(
        "a copy may be a part of a tensor",
        "ckpt_tool/plan.py",
        "            if not _reads(tensor, self._copies[copy]):\n",
        "            if not tensor:\n",
        ("tests/test_accounting.py::test_a_part_of_a_tensor_is_no_copy_of_it",),
    ),
    Mutant(
        "the last byte of a stored tensor is not looked for",
        "ckpt_tool/accounting.py",
        "            if reach < offset + length:\n",
        "            if reach < offset + length - 1:\n",
        ("tests/test_accounting.py::test_a_set_of_bytes_is_one",),
    ),
    Mutant(
        "a gap of one byte between intervals is closed",
        "ckpt_tool/accounting.py",
        "        if found and start <= found[-1]:\n",
        "        if found and start <= found[-1] + 1:\n",
        ("tests/test_accounting.py::test_a_set_of_bytes_is_one",),
    ),
    Mutant(
        "the same of many intervals",
        "ckpt_tool/accounting.py",
        "np.concatenate(([True], pairs[1:, 0] > reach[:-1]))",
        "np.concatenate(([True], pairs[1:, 0] > reach[:-1] + 1))",
        ("tests/test_accounting.py::test_lattices_that_overlap_without_complementing_are_looked_up",),
    ),
    Mutant(
        "archives say nothing of what they store",
        "ckpt_tool/plan.py",
        "        extents = list(_pairs(source.stored))\n",
        "        extents = list(_pairs(source.read))\n",
        ("tests/test_accounting.py::test_a_target_without_an_optimizer_state_is_refused",),
    ),
    Mutant(
        "target files may have gaps",
        "ckpt_tool/plan.py",
        "        if low != position:\n",
        "        if low < position:\n",
        ("tests/test_plan.py::test_a_target_file_that_is_not_tiled_is_refused",),
    ),
    # ---- replicas, ties
    Mutant(
        "copies of an expert on other EP ranks are not compared",
        f"{DEEPSPEED}/reading/zero3.py",
        "                replicas=CutRegions(copies) if copies else (),\n",
        "",
        ("tests/formats/test_zero3_rejects.py::test_replicas_of_an_expert_that_differ",),
    ),
    Mutant(
        "only the first of a tensor's copies is compared",
        "ckpt_tool/values.py",
        "        for replica in tensor.replicas:\n",
        "        for replica in list(tensor.replicas)[:1]:\n",
        ("tests/formats/test_zero3_rejects.py::test_the_last_of_many_replicas_that_differs",),
    ),
    Mutant(
        "FSDP2's tied weights are written under one name",
        "ckpt_tool/formats/dcp/writing/target.py",
        "                tensors[alias] = tensors[name]  # FSDP2 saves tied weights under both names\n"
        "                copies.add(alias)\n",
        "                pass\n",
        ("tests/formats/test_dcp_write.py::test_paths_are_those_of_a_real_save",),
    ),
    Mutant(
        "shared_params may name a parameter that has values of its own",
        f"{DEEPSPEED}/reading/zero3.py",
        "            if alias in named or name not in named:\n",
        "            if name not in named:\n",
        ("tests/formats/test_zero3_rejects.py::test_tied_parameter_that_has_values_of_its_own",),
    ),
    # ---- padding, partitions, EP ranks
    Mutant(
        "the last rank's padding belongs to the parameter",
        f"{DEEPSPEED}/facts/partition.py",
        "            yield Region(first, min(size, whole - first), files[rank], bases[rank] + skip)\n",
        "            yield Region(first, size, files[rank], bases[rank] + skip)\n",
        ("tests/formats/test_zero3_read.py::test_every_element_equals_the_engines_own",),
    ),
    Mutant(
        "padding begins one element early",
        f"{DEEPSPEED}/facts/partition.py",
        "                offset = self._bases[rank] + self._skip + held * self._itemsize\n",
        "                offset = self._bases[rank] + self._skip + max(0, held - 1) * self._itemsize\n",
        ("tests/test_accounting.py::test_a_target_without_an_optimizer_state_is_refused",),
    ),
    Mutant(
        "partitions are rounded down",
        f"{DEEPSPEED}/facts/partition.py",
        "    return -(-numel // count)\n",
        "    return numel // count\n",
        ("tests/formats/test_zero3_read.py::test_partitions_hold_every_element_once_and_no_padding",),
    ),
    Mutant(
        "parameters of a buffer begin one element late",
        f"{DEEPSPEED}/reading/placement.py",
        "                within += partition_size(math.prod(shape), count)\n",
        "                within += partition_size(math.prod(shape), count) + (within > 0)\n",
        ("tests/formats/test_zero3_read.py::test_every_element_equals_the_engines_own",),
    ),
    Mutant(
        "flat groups are not aligned",
        f"{DEEPSPEED}/facts/flat_groups.py",
        "        self.part = -(-self.total // (_ALIGNMENT * count)) * _ALIGNMENT\n",
        "        self.part = -(-self.total // count)\n",
        ("tests/formats/test_zero12_read.py::test_every_element_equals_the_engines_own",),
    ),
    Mutant(
        "ZeRO-1 and 2 number experts from EP rank 0",
        f"{DEEPSPEED}/writing/zero12_target.py",
        "                base = part.ep_rank * local if isinstance(name, ExpertName) else 0\n",
        "                base = 0\n",
        ("tests/test_reference.py::test_a_run_becomes_one_of_another_format_with_every_bit[zero2]",),
    ),
    Mutant(
        "every EP rank gets the first one's experts",
        f"{DEEPSPEED}/writing/zero3_target.py",
        "[_cut(local, self.ranks.edp, own, ep_rank * local) for local in sizes]",
        "[_cut(local, self.ranks.edp, own, 0) for local in sizes]",
        ("tests/test_reference.py::test_a_run_becomes_one_of_another_format_with_every_bit[zero3]",),
    ),
    Mutant(
        "ranks of one EP rank are neighbours, whatever the config says",
        f"{DEEPSPEED}/facts/topology.py",
        "        return rank // self.edp if self.data_first else rank % self.ep\n",
        "        return rank // self.edp\n",
        (
            "tests/formats/test_reshard.py::test_partition_groups_and_layer_entries_say_where_each_rank_stands",
        ),
    ),
    Mutant(
        "packed experts are numbered from the first on",
        f"{DEEPSPEED}/facts/partition.py",
        "        if position == len(ids) or ids[position] != ids[position - 1] + 1:\n",
        "        if position == len(ids):\n",
        ("tests/formats/test_zero3_read.py::test_consecutive_runs_are_the_ids_again",),
    ),
    Mutant(
        "an expert of a file in the place of its neighbour",
        f"{DEEPSPEED}/writing/zero12_target.py",
        "            start = expert * (tensor.numel // tensor.shape[0])\n",
        "            start = max(0, expert - 1) * (tensor.numel // tensor.shape[0])\n",
        ("tests/test_reference.py::test_a_run_becomes_one_of_another_format_with_every_bit[zero2]",),
    ),
    Mutant(
        "gate and up change places",
        "ckpt_tool/families/forms.py",
        "        return Axis(dim, place, sizes[letter], sizes[_MANY])\n",
        "        return Axis(dim, 1 - place, sizes[letter], sizes[_MANY])\n",
        ("tests/formats/test_hf_hub_forms.py::test_gpt_oss_interleaves_columns",),
    ),
    Mutant(
        "gate and up change halves",
        "ckpt_tool/families/forms.py",
        "    return Axis(dim, place * sizes[letter], sizes[letter])\n",
        "    return Axis(dim, (1 - place) * sizes[letter], sizes[letter])\n",
        ("tests/test_reference.py::test_published_files_become_the_form_in_memory",),
    ),
    # ---- casts
    Mutant(
        "bf16 is truncated",
        "ckpt_tool/rounding.py",
        "        np.add(rounded, 0x7FFF, out=rounded)\n",
        "        np.copyto(rounded, block)\n",
        ("tests/execute/test_casts.py::test_every_upper_half_of_a_float32_is_rounded_as_torch_rounds_it",),
    ),
    Mutant(
        "ties are rounded up",
        "ckpt_tool/rounding.py",
        "        np.bitwise_and(rounded, 1, out=rounded)\n",
        "        np.copyto(rounded, 1)\n",
        ("tests/execute/test_casts.py::test_every_upper_half_of_a_float32_is_rounded_as_torch_rounds_it",),
    ),
    # ---- journal and resume
    Mutant(
        "files made of a source that changed are kept",
        "ckpt_tool/commit.py",
        "            self.discard(path for path, files in made_of() if not same.issuperset(files))\n",
        "            self.discard(path for path, files in made_of() if same.isdisjoint(files))\n",
        ("tests/test_source_changes.py::test_only_what_was_made_of_the_changed_file_is_written_again",),
    ),
    Mutant(
        "files that were never made durable are published",
        "ckpt_tool/commit.py",
        "                self.area.sync(path)\n",
        "                pass\n",
        (
            "tests/test_source_changes.py::test_files_of_a_run_without_fsync_are_made_durable_by_one_with_it",
        ),
    ),
    Mutant(
        "a staging directory of another command is gone on with",
        "ckpt_tool/commit.py",
        "        if found.whole and found.identity != own:\n",
        "        if found.whole and not isinstance(found.identity, dict):\n",
        ("tests/test_commit.py::test_another_command_refuses_the_staging_of_a_killed_run",),
    ),
    Mutant(
        "a staged file of another size counts as complete",
        "ckpt_tool/stores/local_area.py",
        "file.is_file() and file.stat().st_size == size\n",
        "file.is_file()\n",
        ("tests/test_commit.py::test_a_file_damaged_in_size_after_the_kill_is_written_again",),
    ),
    Mutant(
        "a source that changed while it was read is published",
        "ckpt_tool/conversion.py",
        "    changed = reader.changed()\n",
        "    changed = None\n",
        ("tests/test_commit.py::test_a_source_that_changes_while_it_is_read_is_not_published",),
    ),
    Mutant(
        "a torn line of the journal is kept",
        "ckpt_tool/commit.py",
        "        self.area.cut_journal(found.whole)\n",
        "        pass\n",
        ("tests/test_commit.py::test_a_line_that_a_kill_cut_off_does_not_hide_those_after_it",),
    ),
    # ---- belongings
    Mutant(
        "strangers in what is replaced are removed",
        "ckpt_tool/belongings.py",
        "    strangers = [path for path in present if path not in known]\n    tag, beside",
        "    strangers = list[str]()\n    tag, beside",
        ("tests/test_overwrite.py",),
    ),
    Mutant(
        "what appears at the rename is removed",
        "ckpt_tool/replacing.py",
        "    strangers = set(entries(old)).difference(files)\n",
        "    strangers = set[str]()\n",
        ("tests/test_overwrite.py",),
    ),
    Mutant(
        "a run loses its other steps",
        "ckpt_tool/belongings.py",
        "    if not strangers and not _is_another_step(destination, tag, present):\n",
        "    if not strangers:\n",
        ("tests/test_overwrite.py",),
    ),
    Mutant(
        "a file that names no tag is replaced",
        "ckpt_tool/belongings.py",
        "    if strange:\n",
        "    if not replaced:\n",
        ("tests/test_overwrite.py",),
    ),
    Mutant(
        "the manifest of another step is replaced",
        "ckpt_tool/belongings.py",
        "        if set(others).difference(TAG_FILES):\n",
        "        if not others:\n",
        ("tests/test_overwrite.py",),
    ),
)


class Fate(NamedTuple):
    """What became of a mutant: the test that failed first, or why it is not dead."""

    mutant: Mutant
    dead: bool
    why: str
    seconds: float


def mutated(source: str, mutant: Mutant) -> str:
    """Raises ValueError where the old text is not there exactly once."""
    if source.count(mutant.old) != 1:
        raise ValueError(f"{mutant.name}: {mutant.file} has its text {source.count(mutant.old)} times")
    return source.replace(mutant.old, mutant.new)


def copy_to(place: Path) -> Path:
    """A copy of the project that may be changed."""
    for name in _NEEDED:
        shutil.copytree(ROOT / name, place / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in _LINKED:
        (place / name).symlink_to(ROOT / name)
    return place


def run(place: Path, tests: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run tests in a copy, up to the first that fails."""
    command = [
        sys.executable,
        "-B",
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "--tb=no",
        *tests,
    ]
    env = {**os.environ, "PYTHONPATH": str(place), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(command, cwd=place, env=env, capture_output=True, text=True, timeout=_SECONDS)


def first_failure(done: subprocess.CompletedProcess[str]) -> str:
    """The test that failed, or whose fixture did; nothing where no test ran that could."""
    lines = [line for line in done.stdout.splitlines() if line.startswith(("FAILED ", "ERROR "))]
    return lines[0].partition(" ")[2].partition(" - ")[0] if done.returncode == 1 and lines else ""


def last_line(done: subprocess.CompletedProcess[str]) -> str:
    return (done.stdout or done.stderr).strip().rpartition("\n")[2]


def unchanged(mutants: Sequence[Mutant]) -> str:
    """What fails of the tests of all mutants where nothing is changed."""
    tests = dict.fromkeys(test for mutant in mutants for test in mutant.tests)
    with tempfile.TemporaryDirectory(prefix="mutants-") as directory:
        done = run(copy_to(Path(directory)), list(tests))
    return "" if done.returncode == 0 else first_failure(done) or last_line(done)


def fate(place: Path, mutant: Mutant) -> Fate:
    """Change the copy, run the tests, and change it back."""
    file = place / mutant.file
    source = file.read_text()
    began = time.monotonic()
    try:
        file.write_text(mutated(source, mutant))
        done = run(place, mutant.tests)
        failed = first_failure(done)
        dead, why = bool(failed), failed or last_line(done)
    except (subprocess.TimeoutExpired, ValueError) as error:
        dead, why = False, str(error)
    finally:
        file.write_text(source)
    return Fate(mutant, dead, why, time.monotonic() - began)


def fates(mutants: Sequence[Mutant], workers: int) -> Iterator[Fate]:
    """Several at a time, each in a copy that no other uses meanwhile."""
    with tempfile.TemporaryDirectory(prefix="mutants-") as directory:
        places: SimpleQueue[Path] = SimpleQueue()
        for number in range(workers):
            places.put(copy_to(Path(directory) / str(number)))

        def one(mutant: Mutant) -> Fate:
            place = places.get()
            try:
                return fate(place, mutant)
            finally:
                places.put(place)

        with ThreadPoolExecutor(workers) as pool:
            yield from pool.map(one, mutants)


def main(wanted: Sequence[str], workers: int = 2) -> int:
    chosen = [one for one in MUTANTS if not wanted or any(part in one.name for part in wanted)]
    failing = unchanged(chosen)
    if failing:
        print(f"Without any change: {failing}")
        return 2
    alive = 0
    for found in fates(chosen, workers):
        alive += not found.dead
        fate_ = "dead " if found.dead else "ALIVE"
        print(f"{fate_} {found.seconds:4.0f} s  {found.mutant.name}: {found.why}", flush=True)
    print(f"{len(chosen)} mutants, {alive} alive")
    return 1 if alive else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
