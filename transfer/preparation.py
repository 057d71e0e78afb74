"""What a training starts from: the checkpoint's classifier, the decoded images, and the Trainer over both."""

from dataclasses import replace

from accelerate.utils import set_seed

from transfer import UserError
from transfer.arguments import FinetuningArguments
from transfer.augmentation import EvaluationView, TrainingView, check_view
from transfer.backbones.geometry import ViewGeometry, read_geometry
from transfer.backbones.layers import (
    describe_learning_rates,
    freeze_levels,
    hold_batch_norms,
    parameter_groups,
    trained_share,
)
from transfer.backbones.lora import add_adapters
from transfer.data.layouts import ImageFolder
from transfer.data.pixels import PixelDataset, PixelStore, open_pixel_store
from transfer.mixing import Mixing
from transfer.modeling import Classifier, build_classifier, load_trained
from transfer.task import Task
from transfer.training.processes import say
from transfer.training.trainer import FinetuningTrainer, logits_to_metrics


def prepare_model(task: Task, args: FinetuningArguments) -> Classifier:
    """The checkpoint with a head for our classes, or an already fine-tuned model where nothing is trained."""
    run, folder = task.run, task.folder
    if not args.do_train:
        return load_trained(run.model_name_or_path, folder.wnids, run.model_revision, run.trust_remote_code)
    set_seed(args.seed)  # before the head is drawn
    classifier = build_classifier(
        run.model_name_or_path,
        folder.wnids,
        folder.class_names,
        folder.glosses,
        run.image_size,
        run.model_revision,
        run.head_warm_start,
        run.trust_remote_code,
        run.drop_path_rate,
    )
    kind, parameters = type(classifier.model).__name__, sum(p.numel() for p in classifier.model.parameters())
    if run.hold_batch_norms:
        hold_batch_norms(classifier.model)
    if run.freeze_levels:
        freeze_levels(classifier.model, run.freeze_levels)
    if run.lora_r:
        classifier = replace(classifier, model=add_adapters(classifier.model, run.lora_r))
    say(
        args,
        f"model       {kind}, {parameters / 1e6:.1f} M parameters, {trained_share(classifier.model):.2%} trained; "
        f"the head starts from the checkpoint's for {classifier.warm_classes} of {len(folder.wnids)} classes",
    )
    groups = parameter_groups(classifier.model, args.learning_rate, args.weight_decay, run.layer_decay)
    say(args, f"rates       {describe_learning_rates(groups)}")
    if args.gradient_checkpointing and not classifier.model.supports_gradient_checkpointing:
        raise UserError(f"--gradient_checkpointing: {type(classifier.model).__name__} does not support it")
    return classifier


def prepare_pixels(args: FinetuningArguments, folder: ImageFolder, geometry: ViewGeometry) -> PixelStore:
    """Every image decoded, once a machine."""
    with args.main_process_first(local=True, desc="decoding images"):
        return open_pixel_store(folder.root, folder.files, geometry.apply, geometry.crop, geometry.rule)


def make_trainer(
    task: Task, args: FinetuningArguments, classifier: Classifier
) -> tuple[FinetuningTrainer, PixelStore]:
    """The Trainer of one model and the pixels that it looks at."""
    run, dataset = task.run, task.dataset
    geometry = read_geometry(classifier.processor)
    check_view(classifier.processor, EvaluationView(geometry))
    store = prepare_pixels(args, task.folder, geometry)
    view = EvaluationView(geometry, store.cropped)
    training_view = TrainingView(
        view,
        run.train_image_size or [geometry.crop[0]],
        run.min_crop_area,
        run.trivial_augment,
        run.erasing_probability,
        run.strong_until,
    )
    mixed = run.mixup_alpha > 0 or run.cutmix_alpha > 0
    trainer = FinetuningTrainer(
        classifier,
        args,
        evaluation_view=view,
        training_view=training_view,
        layer_decay=run.layer_decay,
        mixing=Mixing(classifier.model.num_labels, run.mixup_alpha, run.cutmix_alpha) if mixed else None,
        ema_decay=run.ema_decay,
        train_dataset=PixelDataset(store, dataset["train"]),
        eval_dataset=PixelDataset(store, dataset["validation"]),
        compute_metrics=logits_to_metrics,
    )
    return trainer, store
