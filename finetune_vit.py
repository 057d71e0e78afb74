"""Fine-tune a pretrained ViT or ConvNeXt on folders of images and write a Kaggle submission.

    accelerate launch --quiet --config_file accelerate_config.yaml finetune_vit.py recipes/sample.yaml
    accelerate launch --quiet --config_file accelerate_config.yaml finetune_vit.py RECIPE.yaml --data_dir DATA.zip

The first needs no data and no Hub access, and takes about a minute on two CPU cores. A run writes metrics.json,
report.html, run.json, model/ and, if there are test images, submission.csv to outputs/<recipe>, or to
outputs/<recipe>-<dataset> if a flag names the dataset. `--help` lists what a recipe may contain.

`main` is the run from arguments to sharing; `fine_tune` is one training, from the model to submission.csv. Everywhere,
`run` holds the arguments that this project adds, and `args` those of the Trainer (transfer/config.py).
"""

import sys
import time
from pathlib import Path

from transfer.errors import announce, exits_cleanly

if __name__ == "__main__":
    announce("loading PyTorch and Transformers")  # the imports below take some seconds

import data_loading
from transfer.cli import parse_command_line
from transfer.config import FinetuningArguments, describe_arguments
from transfer.data.images.store import PixelDataset
from transfer.evaluation.metrics import RunMetrics
from transfer.models.build import Classifier, prepare_model
from transfer.runs import RunContext, repeats, search, single, timing
from transfer.runs.record import report_reproduction
from transfer.runtime import say, set_up_runtime, share_steps
from transfer.training.averaging import WeightAveraging
from transfer.training.trainer import FinetuningTrainer, balance_classes
from transfer.transforms.evaluation import EvaluationTransform
from transfer.transforms.training import make_train_transform


def make_trainer(context: RunContext, args: FinetuningArguments, classifier: Classifier) -> FinetuningTrainer:
    """Return the Trainer of one model, with its images, its transforms and, if asked for, averaged weights."""
    run, classes = context.run, len(context.data.class_ids)
    images = single.decode_images(context, args, classifier)
    eval_transform = EvaluationTransform(classifier.geometry, images.cropped)  # the checkpoint's own preprocessing
    train_transform = make_train_transform(run, eval_transform, classes)  # augmentation
    train = PixelDataset(images, context.dataset["train"], for_training=True)
    validation = PixelDataset(images, context.dataset["validation"])
    weights = balance_classes(single.labels_of(train), classes) if run.class_weights == "balanced" else None
    trainer = FinetuningTrainer(
        classifier, args, eval_transform, train_transform, train, validation, run.layer_decay, weights
    )
    if run.ema_decay:
        trainer.add_callback(WeightAveraging(trainer, run.ema_decay))
    return trainer


def fine_tune(context: RunContext, args: FinetuningArguments, checkpoint: str | None = None) -> RunMetrics:
    """Train a model, or load a trained one, evaluate it, predict, and write the results; returns the metrics."""
    classifier = prepare_model(context.run, args, context.data)  # new head, image size, frozen layers, LoRA
    trainer = make_trainer(context, args, classifier)
    record = single.start_record(context, trainer, checkpoint)  # what the run starts from, for run.json
    context = timing.limit_evaluation(context, trainer)  # --max_train_samples, --max_minutes
    trained = single.train_and_measure(context, trainer, checkpoint) if args.do_train else {}
    predictions, measured = single.predict_and_measure(context, trainer)
    metrics = RunMetrics(**measured, **trained)
    if trainer.is_world_process_zero():
        single.write_results(context, trainer, record, metrics, predictions)  # submission.csv is written last
    trainer.accelerator.wait_for_everyone()  # the next steps may read the results
    return metrics


@exits_cleanly
def main(argv: list[str] | None = None, started: float | None = None) -> None:
    """Run one recipe from data to submission; `--max_minutes` counts from `started`, by default from now."""
    started = time.time() if started is None else started
    precision = set_up_runtime()
    words = sys.argv[1:] if argv is None else argv
    run, args = parse_command_line(words)
    out, repeated = Path(args.output_dir), bool(run.seeds or (run.kfold and not run.fold))
    single.set_up_logging(args)
    checkpoint = single.prepare_output(run, args)
    arguments = describe_arguments(run, args)
    say(precision.replace(": ", "   ", 1), *share_steps(args))

    data = data_loading.find_data(run)
    dataset = data_loading.split_data(run, data)
    single.say_data(run, data, dataset, data_loading.describe_layout(data))
    say(*data_loading.describe_warnings(run, data, dataset))
    ends_by = started + 60 * run.max_minutes if run.max_minutes else None
    context = RunContext(run, arguments, precision, data, dataset, ends_by, words, started=started)
    say(*context.describe_shortage(args))

    if run.estimate:
        return timing.estimate_run(context, args, make_trainer)
    if run.search:
        return search.search_settings(context, args, make_trainer)
    if repeated:
        metrics = repeats.run_repeats(context, args, fine_tune, make_trainer, data_loading.split_data)
    else:
        metrics = fine_tune(context, args, checkpoint)
    say(*single.describe_results(context, args, metrics, started))
    single.share_results(context, args)  # push to the Hub, bundle, export
    if run.reproduce and args.process_index == 0:
        sys.exit(report_reproduction(Path(run.reproduce), out / "run.json"))


if __name__ == "__main__":
    main(started=timing.process_start())
