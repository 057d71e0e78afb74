"""What a run tells about itself on its way: wall time in its log, and trackers such as TensorBoard.

The Trainer subclass: uint8 batches, views made on the device, weights that are loaded for certain.
"""

import contextlib
import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import set_seed
from safetensors.torch import load_file
from torch.optim.swa_utils import AveragedModel
from transformers import TrainerCallback
from transformers.trainer_utils import EvalPrediction

from transfer.data.images import PixelDataset, identity_collate
from transfer.errors import UserError
from transfer.models.build import Classifier
from transfer.models.layers import parameter_groups
from transfer.models.load import load_complete
from transfer.models.lora import check_same_adapters, holds_adapters, is_adapted, load_adapters, merge_adapters
from transfer.runtime import shards_model
from transfer.training.averaging import average_weights, weights_of
from transfer.training.checkpoints import describe_resume
from transfer.training.fault_tolerance import ParallelTrainer
from transfer.transforms.evaluation import TTA_TRANSFORMS, EvaluationTransform
from transfer.transforms.mixing import Mixing
from transfer.transforms.training import TrainTransform, seeded_generator


class StampSeconds(TrainerCallback):
    """Adds to every entry of the log how many seconds of training led to it; a resumed run counts on."""

    def on_train_begin(self, args, state, control, **kwargs):
        spent = max((entry.get("seconds", 0.0) for entry in state.log_history), default=0.0)
        self.start = time.perf_counter() - spent

    def on_log(self, args, state, control, **kwargs):
        if state.log_history and hasattr(self, "start"):
            state.log_history[-1].setdefault("seconds", round(time.perf_counter() - self.start, 2))


AVERAGE_FOLDER = "average"  # in a checkpoint: the moving average of the weights


class StopAtNonFiniteLoss(TrainerCallback):
    """Ends the run with the step's number once a loss that is logged is no number: of training, its mean, or of an
    evaluation, so that no checkpoint of such weights is ever chosen."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        for name in ("loss", "train_loss", "eval_loss", "eval_ema_loss"):
            loss = (logs or {}).get(name)
            if loss is not None and not math.isfinite(loss):
                raise UserError(
                    f"the {name.replace('_', ' ')} became {loss} by step {state.global_step} "
                    f"(epoch {state.epoch:.2f}); lower --learning_rate, or set --max_grad_norm 1"
                )


def _as_it_is(images: torch.Tensor) -> torch.Tensor:
    return images


class AverageEveryStep(TrainerCallback):
    """Lets the moving average follow the model."""

    def __init__(self, average: AveragedModel):
        self.average = average

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.average.update_parameters(model)


class FinetuningTrainer(ParallelTrainer):
    """Trainer over `PixelDataset`s: batches travel as uint8 and become views on the device.

    Differs from its parent in five places: the views, the loss (label smoothing in training only), the learning rate
    of each level of the backbone, how weights are loaded back, and the moving average of the weights: it is evaluated
    beside the model, saved with every checkpoint, and kept in the end where it is the better of the two.
    """

    def __init__(
        self,
        classifier: Classifier,
        args,
        eval_transform: EvaluationTransform,
        train_transform: TrainTransform,
        layer_decay: float = 1.0,
        mixing: Mixing | None = None,
        ema_decay: float = 0.0,
        train_dataset: PixelDataset | None = None,
        eval_dataset: PixelDataset | None = None,
        compute_metrics=None,
    ):
        layout = torch.contiguous_format if shards_model() else torch.channels_last  # FSDP wants plain weights
        super().__init__(
            model=classifier.model.to(memory_format=layout),
            args=args,
            data_collator=identity_collate,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            compute_metrics=compute_metrics,
            processing_class=classifier.processor,
            compute_loss_func=self.classification_loss,
            callbacks=[StopAtNonFiniteLoss(), StampSeconds()],
        )
        self.average = average_weights(self.model, ema_decay) if ema_decay else None
        if self.average is not None:
            self.add_callback(AverageEveryStep(self.average))
        self.eval_transform = eval_transform.to(args.device)
        self.train_transform = train_transform.to(args.device)
        self.layer_decay, self.mixing = layer_decay, mixing
        self.chosen_weights: Path | None = None  # the folder whose weights the training ended with
        self.shown: Callable = _as_it_is  # what prediction shows of each image

    def take_over(self, other: "FinetuningTrainer") -> None:
        """Become another trainer, model and recipe, for the next trial of a search; data and callbacks stay."""
        self.callback_handler.pop_callback(AverageEveryStep)
        for name in ("args", "model", "model_wrapped", "average", "train_transform", "layer_decay", "mixing"):
            setattr(self, name, getattr(other, name))
        if self.average is not None:
            self.add_callback(AverageEveryStep(self.average))

    def _prepare_inputs(self, inputs):
        """Move a batch to the device and show the model its view: a random one in training."""
        inputs = super()._prepare_inputs(inputs)
        images = inputs.pop("pixel_values")
        if self.model.training:
            views, inputs["labels"] = self._training_views(images, inputs["labels"])
        else:
            views = self.eval_transform(self.shown(images))
        return {**inputs, "pixel_values": views.contiguous(memory_format=torch.channels_last)}

    def _training_views(self, images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Random views with their labels: (B,) classes, or (B, classes) shares where views are mixed."""
        generator, progress = self._view_randomness(), self.progress()
        views = self.train_transform(images, generator, progress)
        if self.mixing is None or progress >= self.train_transform.augment_until:
            return views, labels
        return self.mixing(views, labels, generator)

    def _view_randomness(self) -> torch.Generator:
        """Views depend on the seed, the step and the process: not on data workers, nor on where a run resumed."""
        return seeded_generator(self.args.seed, self.state.global_step, self.micro_step, self.args.process_index)

    def classification_loss(self, outputs, labels: torch.Tensor, num_items_in_batch=None) -> torch.Tensor:
        """Cross-entropy over the whole accumulated batch; smoothed in training only."""
        smoothing = self.args.label_smoothing_factor if self.model.training else 0.0
        total = F.cross_entropy(outputs["logits"].float(), labels, label_smoothing=smoothing, reduction="sum")
        return total / (len(labels) if num_items_in_batch is None else num_items_in_batch)

    def train(self, *args, **kwargs):
        """The parent's, after forgetting that an evaluation has prepared the model already.

        accelerate would leave it as it is: without the mixed precision, which final figures do without, and without
        what makes several processes train one model.
        """
        if self.model_wrapped is self.model and self.model is not None:
            self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
            self.accelerator.free_memory()
            self.model._is_accelerate_prepared = False
        return super().train(*args, **kwargs)

    @contextlib.contextmanager
    def full_precision(self):
        """Without the mixed precision that accelerate wraps around the model's forward."""
        accelerator, forward = self.accelerator, self.model.__dict__.pop("forward", None)
        mixed, accelerator.native_amp = accelerator.native_amp, False
        try:
            yield
        finally:
            accelerator.native_amp = mixed
            if forward is not None:
                self.model.forward = forward

    def predict(self, test_dataset, *args, **kwargs):
        """Final figures and predictions are computed in fp32, as a plain pipeline computes them.

        In bf16 2% of the top labels differed from the pipeline's; evaluations between epochs stay in mixed precision.
        """
        with self.full_precision():
            return super().predict(test_dataset, *args, **kwargs)

    def predict_view(self, split: PixelDataset, name: str) -> np.ndarray:
        """Logits (N, classes) of a split seen "plain", or the mean over the images of a test-time view, in fp32."""
        logits = []
        try:
            for self.shown in TTA_TRANSFORMS.get(name, [_as_it_is]):
                logits.append(self.predict(split).predictions)
        finally:
            self.shown = _as_it_is
        return np.mean(logits, axis=0)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """Metrics of the model and, under `<prefix>_ema_`, of the average of its weights."""
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        if self.average is not None:
            with weights_of(self.average.module, self.model):
                metrics |= super().evaluate(eval_dataset, ignore_keys, f"{metric_key_prefix}_ema")
        return metrics

    def _determine_best_metric(self, metrics, trial):
        """An evaluation counts by the better of the model and its average."""
        name = f"eval_{self.args.metric_for_best_model}"
        both = [metrics[name], metrics.get(name.replace("eval_", "eval_ema_"), metrics[name])]
        return super()._determine_best_metric(
            metrics | {name: max(both) if self.args.greater_is_better else min(both)}, trial
        )

    def _average_was_better(self) -> bool:
        """Whether the best evaluation was the average's."""
        name = f"eval_ema_{self.args.metric_for_best_model}"
        logged = [entry for entry in self.state.log_history if entry["step"] == self.state.best_global_step]
        return any(entry.get(name) == self.state.best_metric for entry in logged)

    def _save_optimizer_and_scheduler(self, output_dir):
        super()._save_optimizer_and_scheduler(output_dir)
        if self.average is not None and self.args.should_save:
            self.average.module.save_pretrained(Path(output_dir) / AVERAGE_FOLDER)

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if self.average is not None and checkpoint is not None:
            self._load_from_checkpoint(str(Path(checkpoint) / AVERAGE_FOLDER), self.average.module)
            self.average.n_averaged.fill_(self.state.global_step)

    def prediction_step(self, *args, **kwargs):
        """The parent's (loss, logits, labels); of several outputs, such as DeiT's, the logits come first."""
        loss, logits, labels = super().prediction_step(*args, **kwargs)
        return loss, logits[0] if isinstance(logits, tuple) else logits, labels

    def create_optimizer(self, model=None):
        """AdamW, or what `--optim` names, over the model's learning-rate groups."""
        if self.optimizer is None:
            model = self.model if model is None else model
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, model)
            groups = parameter_groups(model, self.args.learning_rate, self.args.weight_decay, self.layer_decay)
            self.optimizer = optimizer_class(groups, **options)
        return self.optimizer

    def _get_grad_norm(self, model, grad_norm=None):
        """The norm that clipping gave; the parent walks over all gradients to log one even without clipping."""
        return None if grad_norm is None else super()._get_grad_norm(model, grad_norm)

    def floating_point_ops(self, inputs) -> int:
        """The parent's count is one of text tokens; taking it walks over all parameters at every step."""
        return 0

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        """Load weights through from_pretrained.

        The parent loads the file's raw names with strict=False: for ViT, DeiT, Swin and others, whose checkpoints are
        saved under older names, it leaves the encoder as it is and only logs a warning.
        """
        if self.is_sharded():
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        model = self.accelerator.unwrap_model(self.model if model is None else model)
        if is_adapted(model):
            return load_adapters(model, Path(resume_from_checkpoint))
        if holds_adapters(Path(resume_from_checkpoint)):
            raise UserError(f"{resume_from_checkpoint}: holds adapters; go on with the --lora_r that made them")
        model.load_state_dict(load_complete(type(model), Path(resume_from_checkpoint)).state_dict())

    def settle_adapters(self) -> None:
        """Merge adapters, where there are any, into the plain model that is measured and saved."""
        model = self.accelerator.unwrap_model(self.model)
        if not is_adapted(model):
            return
        if self.chosen_weights:
            check_same_adapters(model, self.chosen_weights)
        self.model = self.model_wrapped = merge_adapters(model)

    def _load_best_model(self):
        best = Path(self.state.best_model_checkpoint)
        if not best.is_dir():  # the output folder was moved since
            best = Path(self.args.output_dir) / best.name
        self.chosen_weights = best / AVERAGE_FOLDER if self._average_was_better() else best
        if self.is_sharded():
            self.load_gathered_model(self.chosen_weights)
        else:
            self._load_from_checkpoint(str(self.chosen_weights))
        self.state.best_model_checkpoint = str(best)


def start_training(trainer: FinetuningTrainer, checkpoint: str | None) -> dict[str, float]:
    """Train, from a checkpoint if one is given; returns seconds, and images per second, evaluations included."""
    set_seed(trainer.args.seed)
    try:
        outcome = trainer.train(resume_from_checkpoint=checkpoint)
    except KeyboardInterrupt:
        advice = describe_resume(Path(trainer.args.output_dir))
        raise UserError(f"interrupted in epoch {trainer.state.epoch or 0:.2f}; {advice}") from None
    trainer.save_state()
    trainer.settle_adapters()
    return {
        "seconds": outcome.metrics["train_runtime"],
        "samples_per_second": outcome.metrics["train_samples_per_second"],
    }


def check_same_weights(folder: Path, checkpoint: Path) -> None:
    """Refuse a saved model that is not the checkpoint that was chosen, bit for bit, as both lie on the disk."""
    saved, chosen = (load_file(place / "model.safetensors") for place in (folder, checkpoint))
    differing = [name for name in chosen if name not in saved or not torch.equal(saved[name], chosen[name])]
    if differing or saved.keys() != chosen.keys():
        raise RuntimeError(f"{folder}: differs from {checkpoint}, which was chosen, in {differing or 'its names'}")


def logits_to_metrics(outcome: EvalPrediction) -> dict[str, float]:
    """What chooses the epoch. The parent's own loss would count images twice that fill up the last batch of several
    processes."""
    logits, labels = torch.from_numpy(outcome.predictions), torch.from_numpy(outcome.label_ids)
    return {
        "accuracy": float((logits.argmax(-1) == labels).double().mean()),
        "loss": float(F.cross_entropy(logits.float(), labels)),
    }
