"""Writing a checkpoint whole or not at all, by all processes that hold a part of it.

    dcp/__RANK_0.distcp  dcp/.metadata   the tensors, each process's shards in a file of its own, and their index
    config.json                          with it the directory is a model directory but for the tokenizer
    checksums.json                       what the device says is in each shard (see `checksum`)
    state.json                           step, data position, what it belongs to; size and SHA-256 of every other file
    COMPLETE                             the SHA-256 of state.json, so that every byte is in some sum
    verified.json                        added later, when the files were read back

All of it lies under a temporary name until every process has written and every byte is on the disk.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, WriteItem
from torch.distributed.checkpoint.state_dict_saver import save

from crosschip.errors import CheckpointError
from crosschip.model.dcp import INDEX_FILE
from crosschip.model.weights import DCP_DIRECTORY
from crosschip.rundir import COMPLETE, sha256_of, sync, write_json, write_text
from crosschip.train.checkpoint.directory import REPLACED, unfinished_path
from crosschip.train.checkpoint.staging import Staged
from crosschip.train.checkpoint.state import CHECKSUM_FILE, STATE_FILE, CheckpointState, state_document

if TYPE_CHECKING:
    from crosschip.model import ModelConfig

__all__ = ["WriteFailedError", "write_checkpoint"]

T = TypeVar("T")


class WriteFailedError(CheckpointError):
    """A checkpoint that could not be written, for a reason outside this code: a full disk, a lost process."""


class _StagedPlanner(DefaultSavePlanner):
    """Writes the host copies instead of the tensors that training goes on changing."""

    def __init__(self, staged: Staged) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._staged = staged

    def set_up_planner(
        self, state_dict: dict[str, Any], storage_meta: StorageMeta | None = None, is_coordinator: bool = False
    ) -> None:
        super().set_up_planner({}, storage_meta, is_coordinator)

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan(list(self._staged.items))
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        return self._staged.copies[write_item.index]


def write_checkpoint(
    path: Path, staged: Staged, state: CheckpointState, config: ModelConfig, group: dist.ProcessGroup | None
) -> None:
    """Write what every process of `group` has staged; return on each when the checkpoint is there for all.

    Without a group this process writes alone. A directory at `path` is replaced.

    Raises:
        WriteFailedError: some process could not write; nothing is left over, and no process believes otherwise.
    """
    rank = 0 if group is None else dist.get_rank(group)
    temporary = unfinished_path(path)
    try:
        if rank == 0:
            _together(group, lambda: _make_directory(temporary))
        else:
            _together(group, lambda: None)
        _write_tensors(temporary, staged, group)
        parts = _together(group, lambda: (_measure_own(temporary, rank), [s.document() for s in staged.sums]))
        _together(group, lambda: _finish(path, state, config, parts) if rank == 0 else None)
    except (OSError, RuntimeError, CheckpointException) as error:  # RuntimeError: a process that is gone, too
        raise _failure(state.step, path, error) from error
    finally:
        if rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)


def _failure(step: int, path: Path, error: BaseException) -> WriteFailedError:
    if isinstance(error, CheckpointException):
        told = "; ".join(f"process {rank}: {cause}" for rank, (cause, _) in error.failures.items())
    else:
        told = str(error)
    there = next(each for each in path.absolute().parents if each.is_dir())  # its own may be what could not be made
    free_mb = shutil.disk_usage(there).free / 1e6
    return WriteFailedError(
        f"the checkpoint of step {step} could not be written to {path} ({free_mb:,.0f} MB are free there): {told}",
        "free disk space or mend the file system, then go on from the last checkpoint with --resume",
    )


def _together(group: dist.ProcessGroup | None, work: Callable[[], T]) -> list[T]:
    """Do `work` in every process and tell each what all made of it; an error in one becomes an error in all."""
    if group is None:
        return [work()]
    mine: tuple[Any, str | None]
    try:
        mine = (work(), None)
    except Exception as error:  # whatever it is: the others are waiting for this process's word
        mine = (None, f"process {dist.get_rank(group)}: {error!r}")
    outcomes: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(outcomes, mine, group=group)
    problems = [problem for _, problem in outcomes if problem is not None]
    if problems:
        raise RuntimeError("; ".join(problems))
    return [result for result, _ in outcomes]


def _make_directory(temporary: Path) -> None:
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)


def _write_tensors(temporary: Path, staged: Staged, group: dist.ProcessGroup | None) -> None:
    # No copying ahead: with it DCP would use streams of the device, and the copies are on the host already.
    writer = FileSystemWriter(temporary / DCP_DIRECTORY, per_thread_copy_ahead=0, sync_files=True)
    with torch.no_grad():
        save({}, storage_writer=writer, planner=_StagedPlanner(staged), process_group=group, no_dist=group is None)


def _measure_own(temporary: Path, rank: int) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of the files that this process wrote; the first process also wrote the index."""
    files = sorted((temporary / DCP_DIRECTORY).glob(f"__{rank}_*"))
    if rank == 0:
        files.append(temporary / DCP_DIRECTORY / INDEX_FILE)
    return {f"{DCP_DIRECTORY}/{file.name}": _measured(file) for file in files}


def _measured(file: Path) -> dict[str, Any]:
    return {"bytes": file.stat().st_size, "sha256": sha256_of(file)}


def _finish(
    path: Path,
    state: CheckpointState,
    config: ModelConfig,
    parts: list[tuple[dict[str, Any], list[dict[str, Any]]]],
) -> None:
    """Add what stands beside the tensors, the marker last, and give the directory its name."""
    temporary = unfinished_path(path)
    # The model as it is trained: tied embeddings stay tied, where a published directory has to untie them.
    write_json(
        temporary / "config.json", {**config.to_hf("float32"), "tie_word_embeddings": config.tie_word_embeddings}
    )
    write_text(temporary / CHECKSUM_FILE, _checksum_lines(parts))
    files = {name: entry for measured, _ in parts for name, entry in measured.items()}
    for name in ("config.json", CHECKSUM_FILE):
        files[name] = _measured(temporary / name)
    write_json(temporary / STATE_FILE, state_document(state, dict(sorted(files.items()))))
    sync(temporary / DCP_DIRECTORY)
    write_text(temporary / COMPLETE, f"{sha256_of(temporary / STATE_FILE)}\n")
    sync(temporary)
    replaced = path.with_name(f".{path.name}{REPLACED}")
    if path.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        path.replace(replaced)
    temporary.replace(path)
    sync(path.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _checksum_lines(parts: list[tuple[dict[str, Any], list[dict[str, Any]]]]) -> str:
    """A JSON list, one shard a line. Processes that hold the same shard say the same of it, once."""
    lines = dict.fromkeys(json.dumps(shard) for _, shards in parts for shard in shards)
    return "[\n" + ",\n".join(lines) + "\n]\n"
