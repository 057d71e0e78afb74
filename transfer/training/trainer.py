"""The Trainer: takes uint8 images, applies the transforms on the device, and ends with the best epoch's weights.

It overrides the Trainer's public methods, and one private one; transfer/runtime.py lists them all.
"""

import copy
import math
import os
from collections.abc import Callable, Sized
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import broadcast, send_to_device, set_seed
from accelerate.utils.memory import clear_device_cache
from safetensors import SafetensorError
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.optim.lr_scheduler import LambdaLR
from transformers import (
    BaseImageProcessor,
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
)
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK
from transformers.trainer_utils import EvalPrediction, TrainOutput

from transfer.config import FinetuningArguments
from transfer.data.images.store import PixelDataset, identity_collate, unpack_images
from transfer.errors import Terminated, UserError
from transfer.evaluation.metrics import find_hits, macro_f1
from transfer.models.build import Classifier
from transfer.models.cpu_kernels import prepare_for_inference
from transfer.models.layers import (
    check_same_adapters,
    find_blocks,
    holds_adapters,
    is_adapted,
    load_adapters,
    merge_adapters,
    parameter_groups,
)
from transfer.models.load import load_complete
from transfer.runtime import end_signals, shards_model
from transfer.terminal import Bar, TrainingProgress
from transfer.training.checkpoints import (
    KeepBestEpoch,
    SaveBeforeEnd,
    StampSeconds,
    check_optimizer_fits,
    check_training_state,
    checkpoint_bytes,
    describe_resume,
    discard_checkpoint,
    make_room,
)
from transfer.training.memory import Batch, BatchLimit, get_random_state, join_outcomes, set_random_state, split_batch
from transfer.transforms.evaluation import EvaluationTransform
from transfer.transforms.training import TrainTransform, seeded_generator

if TYPE_CHECKING:
    from peft import PeftModel


def logits_to_metrics(outcome: EvalPrediction) -> dict[str, float]:
    """Accuracy, macro F1 and loss, one of which chooses the epoch.

    With several processes the parent's own loss counts the images twice that fill up the last batch.
    """
    logits, labels = torch.from_numpy(outcome.predictions), torch.from_numpy(outcome.label_ids)
    return {
        "accuracy": float(find_hits(logits.numpy(), labels.numpy()).mean()),
        "macro_f1": macro_f1(logits.numpy(), labels.numpy()),
        "loss": float(F.cross_entropy(logits.float(), labels)),
    }


def balance_classes(labels: np.ndarray, classes: int) -> torch.Tensor:
    """(classes,) float32 weights of the loss, in inverse proportion to the classes' numbers of images in labels (N,).

    Their mean over the images is 1, so that the learning rate keeps its meaning.
    """
    counts = np.bincount(labels, minlength=classes)
    weights = len(labels) / ((counts > 0).sum() * np.maximum(counts, 1))
    return torch.tensor(weights, dtype=torch.float32)


def identity(images: torch.Tensor) -> torch.Tensor:
    """The images as they are: a prediction without test-time augmentation."""
    return images


def channels_last(pixel_values: torch.Tensor) -> torch.Tensor:
    return pixel_values.contiguous(memory_format=torch.channels_last)


class StopAtNonFiniteLoss(TrainerCallback):
    """Ends the run when a logged loss is not finite, so that no checkpoint of such weights is ever chosen."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        for name in ("loss", "train_loss", "eval_loss", "eval_ema_loss"):
            loss = (logs or {}).get(name)
            if loss is not None and not math.isfinite(loss):
                raise UserError(
                    f"the {name.replace('_', ' ')} became {loss} by step {state.global_step} "
                    f"(epoch {state.epoch:.2f}); lower --learning_rate, or set --max_grad_norm 1"
                )


class FinetuningTrainer(Trainer):
    """Trainer over `PixelDataset`s, whose batches hold uint8 `images` (B, 3, H, W) and `labels` (B,).

    Its own parts: transforms on the device, cross-entropy with label smoothing in training only, layer-wise learning
    rates, weights loaded through from_pretrained, checkpoints that are complete or not there, and batches that are
    split where memory runs out. `saved_beside` maps a name to a function that writes a folder of that name into every
    checkpoint.
    """

    # Narrower than the parent's types.
    args: FinetuningArguments
    model: PreTrainedModel
    processing_class: BaseImageProcessor
    train_dataset: PixelDataset
    eval_dataset: PixelDataset
    adapts_to_memory = True  # False: running out of memory is an error

    def __init__(
        self,
        classifier: Classifier,
        args: FinetuningArguments,
        eval_transform: EvaluationTransform,
        train_transform: TrainTransform,
        train_dataset: PixelDataset,
        eval_dataset: PixelDataset,
        layer_decay: float = 1.0,
        class_weights: torch.Tensor | None = None,
    ):
        args = copy.copy(args)
        args.push_to_hub = False  # it would upload the whole output folder
        self.keeps_best, args.load_best_model_at_end = args.load_best_model_at_end, False  # see KeepBestEpoch
        if shards_model():  # the blocks that some models name themselves overlap, which accelerate cannot shard
            blocks = {type(classifier.model.get_submodule(name)).__name__ for name in find_blocks(classifier.model)}
            os.environ["FSDP_TRANSFORMER_CLS_TO_WRAP"] = ",".join(sorted(blocks))
        layout = torch.contiguous_format if shards_model() else torch.channels_last  # FSDP wants plain weights
        self.plain_class = type(classifier.model)  # FSDP makes another class of it
        model: nn.Module = classifier.model
        super().__init__(
            model=model.to(memory_format=layout),  # type: ignore[call-overload]  # missing in torch's stub
            args=args,
            data_collator=identity_collate,  # type: ignore[arg-type]  # batches come gathered, not as lists
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            compute_metrics=logits_to_metrics,
            processing_class=classifier.processor,
            compute_loss_func=self.classification_loss,
            callbacks=[StopAtNonFiniteLoss(), StampSeconds(), KeepBestEpoch(self), SaveBeforeEnd()],
        )
        for theirs in (PrinterCallback, DEFAULT_PROGRESS_CALLBACK):  # in a notebook, the latter is another table
            self.remove_callback(theirs)
        self.shown = TrainingProgress(self.step_costs)
        self.add_callback(self.shown)
        self.eval_transform, self.train_transform = eval_transform.to(args.device), train_transform.to(args.device)
        self.layer_decay = layer_decay
        self.class_weights = None if class_weights is None else class_weights.to(args.device)  # (classes,)
        self.saved_beside: dict[str, Callable[[Path], object]] = {}
        self.resumed_from: Path | None = None
        self.writing: Path | None = None  # the checkpoint that is being written
        self.chosen_weights: Path | None = None  # the folder whose weights the training ended with
        self.train_limit = BatchLimit("--per_device_train_batch_size", "a training step", args)
        self.eval_limit = BatchLimit("--per_device_eval_batch_size", "evaluation", args)
        self.micro_step = 0  # forward passes since the optimizer's last step
        self._step = -1
        self._batches: list[Batch] = []
        self._random_state: list[torch.Tensor] = []

    def progress(self) -> float:
        """Share of the learning-rate schedule that is done: --max_minutes moves it on faster than by steps."""
        schedule = self.lr_scheduler
        done = schedule.last_epoch if isinstance(schedule, LambdaLR) else self.state.global_step
        return done / self.state.max_steps

    def step_costs(self) -> tuple[float, float]:
        """Pixels of a crop now, and on average in the rest of the training; the time of a step grows with them."""
        progress = self.progress()
        return self.train_transform.size_at(progress) ** 2, self.train_transform.pixels_ahead(progress)

    def classification_loss(self, outputs, labels: torch.Tensor, num_items_in_batch=None) -> torch.Tensor:
        """Cross-entropy over the whole accumulated batch; smoothed and weighted by class in training only."""
        smoothing, weights = 0.0, None
        if self.model.training:
            smoothing, weights = self.args.label_smoothing_factor, self.class_weights
        total = F.cross_entropy(outputs["logits"].float(), labels, weights, label_smoothing=smoothing, reduction="sum")
        return total / (len(labels) if num_items_in_batch is None else num_items_in_batch)

    def create_optimizer(self, model=None):
        """AdamW, or what `--optim` names, over the model's learning-rate groups."""
        if self.optimizer is None:
            model = self.model if model is None else model
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, model)
            groups = parameter_groups(model, self.args.learning_rate, self.args.weight_decay, self.layer_decay)
            self.optimizer = optimizer_class(groups, **options)
            if self.resumed_from:
                check_optimizer_fits(self.optimizer, self.resumed_from)
        return self.optimizer

    # Training

    def train(self, resume_from_checkpoint=None, trial=None, ignore_keys_for_eval=None) -> TrainOutput:
        """Train, from a checkpoint's folder if one is given. Raises `UserError` where a checkpoint cannot be used."""
        self._step = -1
        self.resumed_from = Path(resume_from_checkpoint) if resume_from_checkpoint else None
        if self.resumed_from:
            check_training_state(self.resumed_from, self.args)
            if not self.is_fsdp_enabled:
                # The parent then loads the file by raw names: the same weights, or, where the names differ, none.
                self.load_weights(self.resumed_from, self.model)
        try:
            with end_signals.deferred():
                return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
        except (OSError, RuntimeError, SafetensorError) as fault:
            if end_signals.received and "DataLoader worker" in str(fault):  # the signal got through to one of them
                where = f"after {self.state.epoch or 0:.2f} epochs"
                raise Terminated(end_signals.received, where, describe_resume(Path(self.args.output_dir))) from None
            self._explain_failed_checkpoint(fault)
            raise

    def training_step(self, model, inputs: Batch, num_items_in_batch=None) -> torch.Tensor:
        """Loss of one batch. Where memory runs out, the optimizer step is repeated with batches of half the size.

        From then on every batch is split, as with half of --per_device_train_batch_size and twice the
        --gradient_accumulation_steps.
        """
        if self._step != self.state.global_step:
            self._step, self._batches, self.micro_step = self.state.global_step, [], 0
            self._random_state = get_random_state(self.args.device)
        self._batches.append(inputs)
        try:
            return self._train_in_parts(model, inputs, num_items_in_batch)
        except RuntimeError as fault:
            self.train_limit.halve(fault, self.adapts_to_memory, self.state.global_step)
        return self._repeat_step(model, num_items_in_batch)

    def _train_in_parts(self, model, inputs: Batch, num_items_in_batch) -> torch.Tensor:
        loss = torch.zeros((), device=self.args.device)
        inputs = send_to_device(inputs, self.args.device, non_blocking=True)
        for part in split_batch(unpack_images(inputs), self.train_limit.images):
            images, labels = part["images"], part["labels"]
            # Depends on the seed, the step and the process: not on data workers, nor on where a run was resumed.
            step, process = self.state.global_step, self.args.process_index
            generator = seeded_generator(self.args.seed, step, self.micro_step, process)
            pixel_values, labels = self.train_transform(images, labels, generator, self.progress())
            transformed = {"pixel_values": channels_last(pixel_values), "labels": labels}
            loss = loss + super().training_step(model, transformed, num_items_in_batch)
            self.micro_step += 1
        return loss

    def _repeat_step(self, model, num_items_in_batch) -> torch.Tensor:
        """Repeat the optimizer step's batches, the last one included: their gradients are in an unknown state."""
        clear_device_cache(garbage_collection=True)
        batches, self._step = self._batches, -1
        model.zero_grad()
        set_random_state(self.args.device, self._random_state)
        for batch in batches:
            loss = self.training_step(model, batch, num_items_in_batch)
        return loss

    def _get_grad_norm(self, model, grad_norm=None):
        """The norm that clipping gave; without clipping the parent walks over all gradients just to log one."""
        return None if grad_norm is None else super()._get_grad_norm(model, grad_norm)

    def floating_point_ops(self, inputs) -> int:
        """0: the parent counts those of text tokens, and walks over all parameters at every step for it."""
        return 0

    # Evaluation and prediction

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval") -> dict[str, float]:
        """Accuracy and loss in the run's mixed precision, as they choose the epoch."""
        self._share_buffers()
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def prediction_step(self, model, inputs: Batch, prediction_loss_only, ignore_keys=None) -> tuple:
        """The parent's (loss, logits, labels), over as many images at once as fit."""

        def step(part: Batch) -> tuple:
            transformed = {name: values for name, values in part.items() if name != "images"}
            transformed["pixel_values"] = channels_last(self.eval_transform(part["images"].to(self.args.device)))
            loss, logits, labels = super(FinetuningTrainer, self).prediction_step(
                model, transformed, prediction_loss_only, ignore_keys
            )
            # Of several outputs, such as DeiT's, the logits come first.
            return loss, logits[0] if isinstance(logits, tuple) else logits, labels

        return join_outcomes(*self._run_in_parts(inputs, step))

    def _run_in_parts(self, inputs: Batch, step: Callable) -> tuple[list[int], list]:
        """(images, outcome) of each part of a batch; the parts shrink until they fit into memory."""
        while True:
            try:
                parts = list(split_batch(inputs, self.eval_limit.images))
                return [len(part["images"]) for part in parts], [step(part) for part in parts]
            except RuntimeError as fault:
                self.eval_limit.halve(fault, self.adapts_to_memory, self.state.global_step)
            clear_device_cache(garbage_collection=True)

    @torch.no_grad()
    def predict_logits(
        self, split: torch.utils.data.Dataset, view: Callable[[torch.Tensor], torch.Tensor] = identity, what: str = ""
    ) -> np.ndarray:
        """Logits (N, classes) of a split in fp32, as a plain pipeline computes them; `view` is one of TTA's.

        In bf16 2% of the top labels differ from the pipeline's. accelerate wraps the mixed precision around the
        instance's forward, so the class's own is called. While it predicts, a model that is not sharded is changed as
        `prepare_for_inference` says.
        """
        model = self.accelerator.unwrap_model(self.model).to(self.args.device).eval()
        self._share_buffers()

        def step(part: Batch) -> torch.Tensor:
            pixel_values = channels_last(self.eval_transform(view(part["images"].to(self.args.device))))
            return type(model).forward(model, pixel_values=pixel_values)["logits"].float()

        loader = self.get_test_dataloader(split)
        found = []
        hidden = self.args.disable_tqdm or not self.is_world_process_zero()
        size = self.eval_transform.geometry.crop
        changes = ExitStack() if self.is_sharded() else prepare_for_inference(model, size)
        with changes, Bar(what or "predicting", len(cast(Sized, split)), hidden=hidden or not what) as bar:
            for batch in loader:
                _, logits = self._run_in_parts(batch, step)
                found.append(self.accelerator.gather_for_metrics(torch.cat(logits)).cpu())
                bar.advance(len(found[-1]))
        return torch.cat(found).numpy()

    def _share_buffers(self) -> None:
        """Copy the first process's buffers to the others: running batch norm statistics differ between processes."""
        if self.args.world_size > 1:
            broadcast(list(self.model.buffers()))

    # Checkpoints

    def save_model(self, output_dir=None, _internal_call=False) -> None:
        """Write the weights, and what `saved_beside` names, into a checkpoint, after making room for it."""
        if output_dir and self.args.should_save:
            self.writing = Path(output_dir)
            discard_checkpoint(self.writing)  # a part of one, from a run that was killed
            make_room(Path(self.args.output_dir), checkpoint_bytes(self.model), self.state.best_model_checkpoint)
        super().save_model(output_dir, _internal_call)
        if output_dir and self.args.should_save:
            for name, write in self.saved_beside.items():
                write(Path(output_dir) / name)

    def _explain_failed_checkpoint(self, fault: Exception) -> None:
        """Where a checkpoint could not be written: remove the part that was, and raise `UserError`."""
        if self.writing:
            discard_checkpoint(self.writing)
            reason, advice = " ".join(str(fault).split())[:200], describe_resume(Path(self.args.output_dir))
            raise UserError(f"{self.writing}: cannot be written ({reason}); fix this, then {advice}") from None

    def is_sharded(self) -> bool:
        """Whether each process holds a part of the weights at the moment (FSDP, while training lasts)."""
        return isinstance(self.model, FSDPModule)

    def load_weights(self, folder: Path, model: nn.Module) -> None:
        """Bring a model to a folder's weights. Raises `UserError` unless every tensor is there and fits."""
        model = self.accelerator.unwrap_model(model)
        if is_adapted(model):
            load_adapters(cast("PeftModel", model), folder)
        elif holds_adapters(folder):
            raise UserError(f"{folder}: holds LoRA adapters; set the --lora_r that they were trained with")
        else:
            model.load_state_dict(load_complete(cast(type[PreTrainedModel], type(model)), folder).state_dict())

    def choose_weights(self, folder: Path) -> None:
        """Let the model end with a folder's weights; a sharded model is gathered from it in every process."""
        self.chosen_weights = folder
        if not self.is_sharded():
            return self.load_weights(folder, self.model)
        model = load_complete(self.plain_class, folder)
        self.accelerator.free_memory()
        nn.Module.to(model, self.args.device)
        self.model = self.model_wrapped = model

    def merge_lora(self) -> None:
        """Merge LoRA adapters, where there are any, into the plain model that is measured and saved."""
        model = self.accelerator.unwrap_model(self.model)
        if is_adapted(model):
            if self.chosen_weights:
                check_same_adapters(model, self.chosen_weights)
            self.model = self.model_wrapped = merge_adapters(model)


def run_training(trainer: FinetuningTrainer, checkpoint: str | None) -> dict[str, float]:
    """Train, from a checkpoint if one is given; returns seconds, and images per second, evaluations included."""
    set_seed(trainer.args.seed)
    try:
        outcome = trainer.train(resume_from_checkpoint=checkpoint)
    except KeyboardInterrupt:
        advice = describe_resume(Path(trainer.args.output_dir))
        raise UserError(f"interrupted after {trainer.state.epoch or 0:.2f} epochs; {advice}") from None
    trainer.save_state()
    trainer.merge_lora()
    return {
        "seconds": outcome.metrics["train_runtime"],
        "samples_per_second": outcome.metrics["train_samples_per_second"],
    }
