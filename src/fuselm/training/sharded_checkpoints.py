"""Write checkpoints of a sharded model by torch.distributed.checkpoint, beside the steps that follow.

Under FSDP with `fsdp_state_dict_type: SHARDED_STATE_DICT` each process writes its own shards. They are copied to the
machine's memory first, so training goes on while files are written. A checkpoint counts when its index is there, which
is written last; older ones are deleted after that. Weights and the optimizer's state are in one folder, under the names
by which accelerate finds them, and any number of processes can read it.
"""

from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from transformers import Trainer
from transformers.trainer_utils import rotate_checkpoints

FOLDER, OPTIMIZER = "pytorch_model_fsdp_0", "optimizer_0"  # accelerate's names
INDEX = ".metadata"  # torch.distributed.checkpoint writes it when every process has written its shards


def is_whole(checkpoint: Path) -> bool:
    """Tell whether all shards of a checkpoint were written; one that is not sharded has none."""
    return not (checkpoint / FOLDER).is_dir() or (checkpoint / FOLDER / INDEX).is_file()


class ShardedCheckpoints:
    """Write the sharded checkpoints of a trainer, one at a time."""

    def __init__(self, trainer: Trainer):
        self._trainer = trainer
        self._group: dist.ProcessGroup | None = None  # its own, so that nothing comes between what it sends
        self._saving: Future | None = None

    @property
    def is_used(self) -> bool:
        """Tell whether the trainer's model is sharded and so are its checkpoints."""
        plugin = getattr(self._trainer.accelerator.state, "fsdp_plugin", None)
        is_sharded = plugin is not None and "SHARDED_STATE_DICT" in str(plugin.state_dict_type)
        return is_sharded and plugin.fsdp_version == 2

    def save(self, output: Path) -> None:
        """Begin to write the model and its optimizer. The copy of this process's shards is made at once."""
        import torch.distributed.checkpoint as checkpoint
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

        self.wait()
        if self._group is None:
            self._group = dist.new_group(backend="gloo")
        trainer = self._trainer
        optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
        model, moments = get_state_dict(trainer.model, optimizer, options=StateDictOptions())
        folder = output / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        if trainer.is_world_process_zero() and not (output / OPTIMIZER).exists():
            (output / OPTIMIZER).symlink_to(FOLDER)
        state: dict[str, Any] = {"model": model, "optimizer": moments}
        writer = checkpoint.FileSystemWriter(folder)
        saving = checkpoint.async_save(state, storage_writer=writer, process_group=self._group)
        assert isinstance(saving, Future)
        self._saving = saving

    def wait(self) -> None:
        """Wait until the last checkpoint is whole, and delete those that it replaces."""
        if self._saving is None:
            return
        saving, self._saving = self._saving, None
        try:
            saving.result()
        except CheckpointException as error:
            full = [e for e, _ in error.failures.values() if isinstance(e, OSError)]
            raise (full[0] if full else error) from None
        trainer = self._trainer
        if trainer.args.should_save:
            rotate_checkpoints(
                output_dir=trainer.args.output_dir,
                save_total_limit=trainer.args.save_total_limit,
                best_model_checkpoint=trainer.state.best_model_checkpoint,
                use_mtime=True,
            )
