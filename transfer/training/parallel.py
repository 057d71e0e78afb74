"""A Trainer whose processes hold one model, whole in each or sharded among them."""

from pathlib import Path

import torch
from accelerate.utils import broadcast
from safetensors import SafetensorError
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from transfer import UserError
from transfer.backbones.layers import find_blocks
from transfer.training.endurance import EnduringTrainer


def load_whole(kind: type[PreTrainedModel], folder: Path) -> PreTrainedModel:
    """A checkpoint's model in fp32. Raises `UserError` unless every tensor of it is there and fits."""
    try:
        model, report = kind.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, output_loading_info=True
        )
        faults = [*report["missing_keys"], *report["unexpected_keys"], *report["mismatched_keys"]]
        if faults:
            raise ValueError(f"{faults[0]} does not fit, and {len(faults) - 1} more")
    except (OSError, ValueError, RuntimeError, SafetensorError) as fault:
        reason = " ".join(str(fault).split())[:300]
        raise UserError(f"{folder}: does not hold this run's model ({reason})") from None
    return model


class ParallelTrainer(EnduringTrainer):
    """Trainer in which several processes evaluate the same model, and which shards it for training alone.

    With FSDP (fsdp.yaml) gradients and the optimizer's moments are sharded with the weights while training lasts.
    Before it and after it every process holds the whole model, so that all else is as with one process.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.plain_class = type(self.model)  # sharding makes another one of it
        if self.is_fsdp_enabled:  # what the model itself names overlaps for some backbones, which accelerate cannot do
            blocks = {type(self.model.get_submodule(name)).__name__ for name in find_blocks(self.model)}
            self.accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = sorted(blocks)

    def is_sharded(self) -> bool:
        """Whether each process holds a part of the weights at the moment."""
        return isinstance(self.model, FSDPModule)

    def evaluation_loop(self, *args, **kwargs):
        """The parent's. Batch norms that follow the images have seen others in each process: the first one's count."""
        sharding, self.is_fsdp_enabled = self.is_fsdp_enabled, self.is_sharded()
        if sharding and not self.is_sharded():
            self.model.to(self.args.device)  # the parent leaves that to the sharding
        if self.args.world_size > 1:
            broadcast(list(self.model.buffers()))
        try:
            return super().evaluation_loop(*args, **kwargs)
        finally:
            self.is_fsdp_enabled = sharding

    def take_whole_model(self, folder: Path) -> None:
        """In place of its shards, let every process hold the model that was saved in a folder."""
        model = load_whole(self.plain_class, folder)
        self.accelerator.free_memory()
        self.model = self.model_wrapped = model.to(self.args.device)
