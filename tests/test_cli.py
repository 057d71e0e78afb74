"""Recipes and flags: types, bounds, names and the help."""

import dataclasses
import json
import math
import re

import pytest
import torch
from transformers import TrainingArguments

from transfer.cli import ALIASES, USAGE, parse_command_line
from transfer.config import (
    REFUSED,
    TOPICS,
    TTA_NAMES,
    FinetuningArguments,
    RunArguments,
    card_names,
    check_bounds,
    known_names,
    listed_fields,
    option_of,
)
from transfer.errors import UserError
from transfer.transforms.evaluation import TTA_TRANSFORMS

FIELDS = {f.name: f for group in (RunArguments, FinetuningArguments) for f in dataclasses.fields(group)}


@pytest.fixture
def parse(tmp_path):
    """parse(recipe's text, *flags): the arguments of the run and of the Trainer."""

    def read(text: str, *flags: str):
        recipe = tmp_path / "mine.yaml"
        recipe.write_text(text)
        return parse_command_line([str(recipe), *flags])

    return read


def test_values_of_a_recipe_get_the_types_that_flags_have(parse):
    run, args = parse(
        "data_dir: sample\n"
        "seeds: [0, 1]\n"
        "learning_rate: 1e-3\n"  # yaml reads it as text
        "num_train_epochs: 2\n"
        "layer_decay: 1\n"
        "linear_probe: true\n"
        "model_revision: 17\n"
        "tta: flip\n"
        "lr_scheduler_kwargs: {num_cycles: 2}\n"
        "search_space: {learning_rate: [1.0e-3, 1.0e-4]}\n"
    )
    assert run.seeds == [0, 1] and run.tta == ["flip"] and run.model_revision == "17"
    numbers = [args.learning_rate, args.num_train_epochs, run.layer_decay]
    assert numbers == [1e-3, 2.0, 1.0] and all(isinstance(number, float) for number in numbers)
    assert run.linear_probe is True and args.lr_scheduler_kwargs == {"num_cycles": 2}
    assert json.loads(run.search_space) == {"learning_rate": [1e-3, 1e-4]}


def test_null_in_a_recipe_means_the_default(parse):
    run, args = parse("data_dir: sample\nlayer_decay: null\nseeds:\noutput_dir: null\n")
    assert (run.layer_decay, run.seeds, args.output_dir) == (0.85, [], "outputs/mine")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: many", "seed: invalid int value: 'many'"),
        ("seed: 1.5", "seed: invalid int value: '1.5'"),
        ("seeds: [0, one]", "seeds: invalid int value: 'one'"),
        ("learning_rate: fast", "learning_rate: invalid float value: 'fast'"),
        ("linear_probe: maybe", "linear_probe: Truthy value expected: got maybe"),
        ("data_dir: [a, b]", "data_dir takes one value, not a list"),
        ("hub_strategy: never", "hub_strategy: 'never' is not one of end, every_save"),
        ("lr: 1", "unknown argument 'lr'; did you mean learning_rate?"),
    ],
)
def test_a_recipes_value_of_the_wrong_type_is_refused_by_file_and_name(parse, text, message):
    with pytest.raises(UserError, match=r"mine\.yaml: ") as refused:
        parse(f"{text}\n")
    assert message in str(refused.value)


def test_flags_override_a_recipe_whatever_its_values_are(parse):
    recipe = "data_dir: sample\nseeds: [1, 2]\nlinear_probe: true\nmin_crop_scale: 0.5\n"
    run, args = parse(
        recipe, "--seeds", "3", "4", "5", "--linear_probe", "false", "--min_crop_scale=0.6", "--seed", "9"
    )
    assert (run.seeds, run.linear_probe, run.min_crop_scale, args.seed) == ([3, 4, 5], False, 0.6, 9)


@pytest.mark.parametrize("flag", [["--do_train", "false"], ["--do_train=False"], ["--do-train", "0"]])
def test_without_training_a_recipes_arguments_of_training_alone_are_ignored(parse, flag):
    text = "data_dir: sample\nkfold: 3\nfold: 1\nmax_minutes: 5\nresume_from_checkpoint: true\n"
    run, args = parse(text, *flag)
    assert (run.kfold, run.fold, run.max_minutes, args.resume_from_checkpoint) == (None, None, None, None)
    assert parse(text)[0].kfold == 3
    with pytest.raises(UserError, match="--kfold repeats the training"):
        parse(text, *flag, "--kfold", "3")


def test_dashes_in_flags_are_accepted(parse):
    run, args = parse("data_dir: nowhere\n", "--learning-rate", "1e-2", "--data-dir=sample")
    assert (args.learning_rate, run.data_dir) == (1e-2, "sample")
    with pytest.raises(UserError, match="tokens do not belong on a command line"):
        parse("data_dir: sample\n", "--hub-token", "x")


@pytest.mark.parametrize(
    ("flag", "names"),
    [
        ("--lr", "learning_rate"),
        ("--epochs", "num_train_epochs"),
        ("--batch_size", "per_device_train_batch_size"),
        ("--batch-size", "per_device_train_batch_size"),
        ("--wd", "weight_decay"),
        ("--model", "model_name_or_path"),
        ("--data", "data_dir"),
        ("--dataset", "data_dir or dataset_name"),
        ("--size=224", "image_size"),
        ("--lerning_rate", "learning_rate"),
    ],
)
def test_other_names_of_an_argument_point_to_it(parse, flag, names):
    with pytest.raises(UserError, match=rf"command line: unknown argument '\w+'; did you mean {names}( or |\?)"):
        parse("data_dir: sample\n", flag, "1")


def test_every_alias_belongs_to_an_argument_and_is_none_itself():
    assert set(ALIASES) <= set(known_names())
    assert not {alias for others in ALIASES.values() for alias in others.split()} & set(known_names())


def bounds():
    """(name, a value just outside, the bound in words) for every bound of every argument."""
    for name, field in FIELDS.items():
        for kind, step in {"at_least": -1, "above": 0, "at_most": 1, "below": 0}.items():
            if (bound := getattr(option_of(field), kind)) is not None:
                yield name, bound + step, f"{kind.replace('_', ' ')} {bound}"


@pytest.mark.parametrize(("name", "value", "words"), list(bounds()), ids=lambda value: str(value).replace(" ", "-"))
def test_a_number_outside_its_bounds_is_refused_with_its_flag(name, value, words):
    group = RunArguments() if name in RunArguments.__annotations__ else FinetuningArguments(output_dir="outputs")
    setattr(group, name, [value] if isinstance(getattr(group, name), list) else value)
    with pytest.raises(UserError, match=rf"^--{name} {value}: must be .*{words}"):
        check_bounds(group)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_number_that_is_not_finite_is_refused(value):
    with pytest.raises(UserError, match=f"--mixup_alpha {value}: must be at least 0"):
        check_bounds(RunArguments(mixup_alpha=value))


def test_defaults_are_within_their_bounds():
    check_bounds(RunArguments(), FinetuningArguments(output_dir="outputs"))


def test_help_fits_the_terminal(capsys, monkeypatch):
    for columns, widest in (("80", 79), ("200", 100)):
        monkeypatch.setenv("COLUMNS", columns)
        with pytest.raises(SystemExit):
            parse_command_line(["--help"])
        text = capsys.readouterr().out.replace(USAGE, "")
        arguments = [line for line in text.splitlines() if line.startswith("  ")]
        assert widest - 12 < max(map(len, arguments)) <= widest


def test_help_lists_every_own_argument_once_under_its_topic(capsys):
    with pytest.raises(SystemExit):
        parse_command_line(["--help"])
    text = capsys.readouterr().out
    listed = [line.split()[0] for line in text.splitlines() if line.startswith("  --")]
    assert len(listed) == len(set(listed)) == len(listed_fields())
    assert {f"--{field.name}" for field in dataclasses.fields(RunArguments)} <= set(listed)
    headings = [line[:-1] for line in text.splitlines() if line.endswith(":") and line[:-1] in TOPICS]
    assert headings == list(TOPICS)
    assert all(max(map(len, paragraph.splitlines())) <= 104 for paragraph in text.replace(USAGE, "").split("\n\n"))


def test_every_listed_argument_has_a_help_text_that_is_a_sentence():
    for field in listed_fields():
        text = field.metadata["help"]
        assert text[0].isupper() or text.startswith("`"), field.name
        assert re.fullmatch(r".*\.( \[[^\]]+\])?", text), field.name


def test_the_names_of_the_test_time_augmentations_are_those_of_their_transforms():
    assert list(TTA_TRANSFORMS) == list(TTA_NAMES)


def test_the_card_lists_settings_from_the_image_to_the_split_and_then_ingredients():
    settings, ingredients = card_names("setting"), card_names("ingredient")
    assert settings[:4] == ["image_size", "train_image_size", "min_crop_scale", "head_warm_start"]
    assert settings[-4:] == ["seeds", "kfold", "split_seed", "validation_fraction"]
    assert ingredients[:2] == ["decoded_side", "freeze_layers"] and ingredients[-1] == "tta"
    assert not set(settings) & set(ingredients)


def test_arguments_are_defined_in_the_order_of_their_topics():
    for group in (RunArguments, FinetuningArguments):
        topics = [option_of(FIELDS[name]).topic for name in group.__annotations__ if option_of(FIELDS[name]).topic]
        assert [TOPICS.index(topic) for topic in topics] == sorted(TOPICS.index(topic) for topic in topics)


@pytest.mark.parametrize(
    ("flags", "folder"),
    [
        ([], "recipe"),
        (["--data_dir", "somewhere/tiny-imagenet-100.zip"], "recipe-tiny-imagenet-100"),
        (["--data_dir", "sample"], "recipe"),
        (["--data_dir", "my photos/"], "recipe-my_photos"),
        (["--dataset_name", "me/things.v2"], "recipe-things.v2"),
        (["--data_dir", "other", "--output_dir", "outputs/chosen"], "chosen"),
    ],
)
def test_data_that_a_flag_names_have_an_output_folder_of_their_own(flags, folder, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("" if "--dataset_name" in flags else "data_dir: sample\n")
    _, args = parse_command_line([str(recipe), *flags])
    assert args.output_dir == f"outputs/{folder}"


# A value of every field of TrainingArguments that may be set.
TRIED = {
    "output_dir": "elsewhere",
    "per_device_train_batch_size": 4,
    "num_train_epochs": 2.5,
    "max_steps": 2,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine_with_restarts",
    "lr_scheduler_kwargs": '{"num_cycles": 2}',
    "warmup_steps": 1,
    "optim": "adafactor",
    "optim_args": "momentum=0.9",
    "weight_decay": 0.1,
    "adam_beta1": 0.8,
    "adam_beta2": 0.99,
    "adam_epsilon": 1e-6,
    "gradient_accumulation_steps": 2,
    "max_grad_norm": 1,
    "label_smoothing_factor": 0.1,
    "tf32": "false",
    "activation_checkpointing": "false",
    "activation_checkpointing_kwargs": '{"use_reentrant": false}',
    "gradient_checkpointing": "true",
    "gradient_checkpointing_kwargs": '{"use_reentrant": false}',
    "torch_compile": "false",
    "torch_compile_backend": "inductor",
    "torch_compile_mode": "default",
    "torch_empty_cache_steps": 1,
    "logging_strategy": "steps",
    "logging_steps": 1,
    "logging_first_step": "true",
    "log_on_each_node": "false",
    "logging_nan_inf_filter": "true",
    "log_level": "error",
    "log_level_replica": "error",
    "disable_tqdm": "true",
    "report_to": "none",
    "run_name": "mine",
    "project": "mine",
    "trackio_space_id": "me/space",
    "trackio_bucket_id": "me/bucket",
    "trackio_static_space_id": "me/space",
    "eval_strategy": "epoch",
    "eval_steps": 1,
    "eval_delay": 0,
    "per_device_eval_batch_size": 4,
    "eval_on_start": "true",
    "eval_accumulation_steps": 1,
    "save_strategy": "epoch",
    "save_steps": 1,
    "save_on_each_node": "true",
    "save_total_limit": 3,
    "push_to_hub": "false",
    "hub_private_repo": "true",
    "hub_model_id": "me/model",
    "hub_strategy": "end",
    "hub_always_push": "true",
    "hub_revision": "main",
    "load_best_model_at_end": "true",
    "metric_for_best_model": "loss",
    "full_determinism": "false",  # it sets environment variables of the whole process
    "seed": 2**32 - 1,
    "data_seed": 2**32 - 1,
    "use_cpu": "true",
    "dataloader_num_workers": 1,
    "dataloader_pin_memory": "false",
    "dataloader_persistent_workers": "true",
    "dataloader_prefetch_factor": 1,
    "dataloader_multiprocessing_context": "fork",
    "ddp_find_unused_parameters": "false",
    "ddp_bucket_cap_mb": 10,
    "ddp_broadcast_buffers": "false",
    "ddp_static_graph": "false",
    "ddp_timeout": 100,
    "debug": "underflow_overflow",
    "skip_memory_metrics": "false",
    "do_train": "true",
    "resume_from_checkpoint": "false",
}
NEEDS_WORKERS = ("dataloader_persistent_workers", "dataloader_prefetch_factor", "dataloader_multiprocessing_context")


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(TrainingArguments) if field.init])
def test_every_argument_of_the_trainer_is_refused_with_a_reason_or_works(name, parse):
    if name in REFUSED:
        with pytest.raises(UserError, match=rf"'{name}' cannot be set: \w.+"):
            parse("data_dir: sample\n", f"--{name}", "1")
        assert name not in TRIED
    else:
        workers = ["--dataloader_num_workers", "1"] * (name in NEEDS_WORKERS)
        parse("data_dir: sample\n", f"--{name}", str(TRIED[name]), *workers)


def test_a_run_trains_with_all_arguments_of_the_trainer_at_once(pristine_data, checkpoints, finetune):
    alone = {"output_dir", "resume_from_checkpoint", "num_train_epochs", "trackio_static_space_id"}
    alone |= {"torch_compile_backend", "torch_compile_mode"}  # both turn compiling on, which takes a minute
    settings = {name: value for name, value in TRIED.items() if name not in alone and name in known_names()}
    assert (finetune(pristine_data, checkpoints("vit"), **settings) / "submission.csv").is_file()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--optim lion_32bit", "--optim lion_32bit: cannot be used: You need to install `bitsandbytes`"),
        ("--optim adamw_8bit", "`pip install -U bitsandbytes`"),
        ("--optim schedule_free_adamw", "--optim schedule_free_adamw: cannot be used: You need to install"),
        ("--optim galore_adamw", "--optim galore_adamw: cannot be used: You need to install `galore_torch`"),
        ("--optim_args lr", "--optim adamw_torch_fused --optim_args lr: cannot be used"),
        ("--use_liger_kernel true", "'use_liger_kernel' cannot be set: it is for language models"),
        ("--lr_scheduler_type cosine_with_min_lr", "One of min_lr or min_lr_rate should be set"),
        ("--lr_scheduler_type warmup_stable_decay", "warmup_stable_decay: cannot be used: .*'num_decay_steps'"),
        ("--lr_scheduler_type wsd", "wsd is not a valid SchedulerType"),
        ('--lr_scheduler_kwargs {"cycles":2}', "unexpected keyword argument 'cycles'"),
        ("--lr_scheduler_kwargs {cycles", "is not valid json"),
        ("--dataloader_persistent_workers true", "persistent_workers option needs num_workers > 0"),
        ("--dataloader_num_workers -1", "--dataloader_num_workers -1: must be at least 0"),
        ("--eval_do_concat_batches false", "metrics are computed over the logits of all images at once"),
        ("--label_names x", "'label_names' cannot be set"),
        ("--fsdp full_shard", "processes and sharding are set in the accelerate config"),
        ("--label_smoothing_factor 1.5", "must be at least 0 and below 1"),
        ("--label_smoothing_factor -0.1", "must be at least 0 and below 1"),
        ("--weight_decay -0.1", "--weight_decay -0.1: must be at least 0"),
        ("--adam_beta1 1.5", "--adam_beta1 1.5: must be at least 0 and below 1"),
        ("--seed 4294967296", "--seed 4294967296: must be at least 0 and at most 4294967295"),
        ('--gradient_checkpointing_kwargs {"reentrant":true}', "unexpected keyword argument 'reentrant'"),
        ("--torch_compile true --torch_compile_backend fast", "fast is not one of"),
        ("--save_only_model true", "a stopped run could not be resumed"),
    ],
)
def test_a_borrowed_argument_that_cannot_work_is_refused_before_data_is_read(flags, message, parse):
    with pytest.raises(UserError, match=message) as refused:
        parse("data_dir: missing\n", *flags.split())
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--lora_r 8 --linear_probe true", "--linear_probe fits the head alone, and --lora_r adapts the backbone"),
        ("--lora_r 8 --linear_probe_only true", "--linear_probe_only fits the head alone"),
        ("--linear_probe_only true --do_train false", "--linear_probe_only trains a head"),
        ("--ema_decay 0.9 --load_best_model_at_end false", "needs --load_best_model_at_end true"),
        ("--estimate true --do_train false", "--estimate measures fine-tuning"),
        ("--kfold 5 --max_eval_samples 100", "--kfold validate on all images"),
        ("--search 3 --export onnx", "--export is for the results of one run"),
        ("--search 3 --metric_for_best_model macro_f1", "--search compares accuracy"),
        ("--push_to_hub true --hub_space_id me/x --trust_remote_code true", "does not run a model's own code"),
    ],
)
def test_flags_that_would_be_ignored_together_are_refused(flags, message, parse):
    with pytest.raises(UserError, match=message):
        parse("data_dir: missing\n", *flags.split())


def test_a_slash_at_the_end_of_the_output_folder_changes_nothing(parse):
    _, args = parse("data_dir: sample\n", "--output_dir", "outputs/x/")[:2]
    assert args.output_dir == "outputs/x"


def test_a_field_that_a_later_version_adds_is_refused_until_somebody_has_tried_it(parse, monkeypatch):
    import transfer.config

    monkeypatch.setattr(transfer.config, "BORROWED", transfer.config.BORROWED - {"eval_on_start"})
    with pytest.raises(UserError, match="'eval_on_start' cannot be set: this project has not been tried with it"):
        parse("data_dir: sample\n", "--eval_on_start", "true")


def test_trying_the_arguments_draws_no_random_numbers(parse):
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    parse("data_dir: sample\n")
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_tilde_is_the_home_folder_in_every_path(parse, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    run, args = parse("data_dir: sample\noutput_dir: ~/out\nhand_in: ~/a.zip\nresume_from_checkpoint: ~/c\n")
    paths = [args.output_dir, run.hand_in, args.resume_from_checkpoint]
    assert paths == [f"{tmp_path}/{name}" for name in ("out", "a.zip", "c")]
    assert parse_command_line(["~/mine.yaml"])[1].output_dir == args.output_dir
