"""The Trainer subclass: uint8 batches, views made on the device, weights that are loaded for certain."""

import contextlib
import math
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate.utils import set_seed
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import EvalPrediction, get_last_checkpoint

from transfer import UserError
from transfer.augmentation import EvaluationView, TrainingView, seeded
from transfer.modeling import Classifier, parameter_groups
from transfer.pixels import PixelDataset, take_batch

PRECISION_VARIABLE = "ACCELERATE_MIXED_PRECISION"  # how accelerate launch tells the script


def _has_bf16_units() -> bool:
    """Whether the device multiplies bf16 in hardware; torch emulates it elsewhere, slower than fp32."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_capability() >= (8, 0)
    if torch.accelerator.is_available():
        return True
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and torch.cpu._is_avx512_bf16_supported()


def settle_precision() -> str:
    """Decide the mixed precision before the Trainer reads it; returns one line that says what and why.

    accelerate_config.yaml states it; the launcher passes it on in the environment. What the device cannot do fast is
    replaced: bf16 by fp16 on a GPU without bf16 units and by fp32 on such a CPU, fp16 by fp32 on any CPU.
    """
    asked = os.environ.get(PRECISION_VARIABLE)
    if asked is None:
        return (
            "precision: fp32, because the script was not started by `accelerate launch --config_file "
            "accelerate_config.yaml`"
        )
    if asked == "no":
        return "precision: fp32 (mixed_precision in the accelerate config)"
    settled = asked
    if asked == "bf16" and not _has_bf16_units():
        settled = "fp16" if torch.cuda.is_available() else "no"
    elif asked == "fp16" and not torch.accelerator.is_available():
        settled = "no"
    os.environ[PRECISION_VARIABLE] = settled
    shown = "fp32" if settled == "no" else settled
    if settled == asked:
        return f"precision: {shown} (mixed_precision in the accelerate config)"
    return f"precision: {shown}, not the accelerate config's {asked}, which this device has no fast units for"


def use_all_cores() -> None:
    """Let torch compute on every core that this process may use.

    accelerate launch sets OMP_NUM_THREADS=1 where nobody has set it, which halves the speed of two cores. Several
    processes share the cores; `taskset` gives a run fewer.
    """
    if os.environ.get("OMP_NUM_THREADS") == "1" and PRECISION_VARIABLE in os.environ:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def find_checkpoint(output_dir: Path, resume: str | None) -> str | None:
    """The checkpoint that `--resume_from_checkpoint` means: `true` for the last in output_dir, or a folder."""
    if resume is None or resume.lower() == "false":
        return None
    if resume.lower() != "true":
        if not (Path(resume) / "trainer_state.json").is_file():
            raise UserError(
                f"--resume_from_checkpoint {resume}: is no checkpoint; give `true` or a checkpoint-N folder"
            )
        return resume
    last = get_last_checkpoint(str(output_dir)) if output_dir.is_dir() else None
    if last is None:
        raise UserError(f"--resume_from_checkpoint true: {output_dir} holds no checkpoint; start without it")
    return last


class StopAtNonFiniteLoss(TrainerCallback):
    """Ends the run with the step's number when the loss is no longer a number, at the next log line at the latest."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        loss = (logs or {}).get("loss")
        if loss is not None and not math.isfinite(loss):
            raise UserError(
                f"the training loss became {loss} by step {state.global_step} (epoch {state.epoch:.2f}); lower "
                "--learning_rate, or set --max_grad_norm 1"
            )


class FinetuningTrainer(Trainer):
    """Trainer over `PixelDataset`s: batches travel as uint8 and become views on the device.

    Differs from its parent in four places: the views, the loss (label smoothing in training only), the learning rate
    of each level of the backbone, and how weights are loaded back.
    """

    def __init__(
        self,
        classifier: Classifier,
        args,
        evaluation_view: EvaluationView,
        training_view: TrainingView,
        layer_decay: float = 1.0,
        train_dataset: PixelDataset | None = None,
        eval_dataset: PixelDataset | None = None,
        compute_metrics=None,
    ):
        super().__init__(
            model=classifier.model.to(memory_format=torch.channels_last),
            args=args,
            data_collator=take_batch,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            compute_metrics=compute_metrics,
            processing_class=classifier.processor,
            compute_loss_func=self.classification_loss,
            callbacks=[StopAtNonFiniteLoss()],
        )
        self.evaluation_view = evaluation_view.to(args.device)
        self.training_view = training_view.to(args.device)
        self.layer_decay = layer_decay
        self.micro_step = 0

    def _prepare_inputs(self, inputs):
        """Move a batch to the device and show the model its view: a random one in training."""
        inputs = super()._prepare_inputs(inputs)
        images = inputs["pixel_values"]
        if self.model.training:
            with self._view_randomness():
                views = self.training_view(images)
        else:
            views = self.evaluation_view(images)
        return {**inputs, "pixel_values": views.contiguous(memory_format=torch.channels_last)}

    def _view_randomness(self) -> contextlib.AbstractContextManager:
        """Views depend on the seed, the step and the process: not on data workers, nor on where a run resumed."""
        self.micro_step = 0 if self._last_step != self.state.global_step else self.micro_step + 1
        self._last_step = self.state.global_step
        return seeded(self.args.seed, self.state.global_step, self.micro_step, self.args.process_index)

    _last_step = -1

    def classification_loss(self, outputs, labels: torch.Tensor, num_items_in_batch=None) -> torch.Tensor:
        """Cross-entropy over the whole accumulated batch; smoothed in training only."""
        smoothing = self.args.label_smoothing_factor if self.model.training else 0.0
        total = F.cross_entropy(outputs["logits"].float(), labels, label_smoothing=smoothing, reduction="sum")
        return total / (len(labels) if num_items_in_batch is None else num_items_in_batch)

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
        model = self.accelerator.unwrap_model(self.model if model is None else model)
        saved = type(model).from_pretrained(resume_from_checkpoint, dtype=torch.float32, use_safetensors=True)
        model.load_state_dict(saved.state_dict())

    def _load_best_model(self):
        self._load_from_checkpoint(self.state.best_model_checkpoint)


def start_training(trainer: FinetuningTrainer, checkpoint: str | None) -> dict[str, float]:
    """Train, from a checkpoint if one is given; returns seconds, and images per second, evaluations included."""
    set_seed(trainer.args.seed)
    outcome = trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_state()
    return {
        "seconds": outcome.metrics["train_runtime"],
        "samples_per_second": outcome.metrics["train_samples_per_second"],
    }


def logits_to_accuracy(outcome: EvalPrediction) -> dict[str, float]:
    """The metric that chooses the epoch."""
    return {"accuracy": float((outcome.predictions.argmax(-1) == outcome.label_ids).mean())}
