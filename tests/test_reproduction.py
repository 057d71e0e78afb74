"""`--reproduce`: a run is repeated from its run.json, and its results are compared number by number."""

import json
import shlex
import shutil
from dataclasses import replace

import pytest
from conftest import WNIDS, draw_picture, write_data_set
from fabricated import trained_metrics

from finetune_vit import main
from transfer.cli import parse_command_line
from transfer.config import describe_arguments
from transfer.errors import UserError
from transfer.evaluation.metrics import Scores, SplitScores
from transfer.models import load
from transfer.runs import record, single


@pytest.fixture
def reproduce(capsys):
    """reproduce(run_json, *flags) repeats a run; returns exit code, stdout and stderr."""

    def again(path, *flags):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main(["--reproduce", str(path), *map(str, flags)])
        said = capsys.readouterr()
        return stop.value.code, said.out, said.err

    return again


def copy_record(out, folder, name):
    """A run's run.json under another name, and its metrics.json beside it; returns the first."""
    folder.mkdir()
    shutil.copy(out / "metrics.json", folder)
    return shutil.copy(out / "run.json", folder / name)


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_a_run_is_reproduced_bit_for_bit_from_its_run_json_and_metrics_json_alone(
    pristine_data, checkpoints, finetune, reproduce, tmp_path
):
    out = finetune(pristine_data, checkpoints("vit"), learning_rate="3e-3", seed=3, dataloader_num_workers=2)
    written = json.loads((out / "run.json").read_text())
    assert "metrics" not in written
    script, _, words = written["command"].partition(" finetune_vit.py ")
    assert script == "accelerate launch --config_file accelerate_config.yaml"  # though the test called main([...])
    run, args = parse_command_line(shlex.split(words))
    parsed = describe_arguments(run, args)
    assert parsed == written["arguments"]
    moved = copy_record(out, tmp_path / "moved", "lone.json")
    code, said, _ = reproduce(moved)
    assert code == 0
    assert "changed     nothing: the results must be the same bit for bit" in said
    assert "same        validation.accuracy" in said and "same        weights_sha256" in said
    assert said.splitlines()[-1].startswith("reproduced  bit for bit")
    again = tmp_path / "out-reproduced"
    assert (again / "submission.csv").read_bytes() == (out / "submission.csv").read_bytes()
    then, now = (json.loads((place / "run.json").read_text())["arguments"] for place in (out, again))
    changed = {name for name in then if then[name] != now[name]}
    assert changed == {"output_dir", "reproduce"}


def test_what_differs_is_said_and_the_outcome_then_judged_by_the_recorded_spread(
    pristine_data, checkpoints, finetune, reproduce
):
    out = finetune(pristine_data, checkpoints("convnext"), num_train_epochs=1)

    def other_machine(content):
        content["versions"]["torch"] = "2.9.0"
        content["packages"]["torch"] = "2.9.0"
        content["packages"]["gone"] = "1.0"
        content["device"] = "CPU, another"
        content["code"] = {"fingerprint": "f", "commit": "c", "clean": False}

    edit(out / "run.json", other_machine)
    edit(out / "metrics.json", lambda content: content["validation"].update(loss=9.0))
    code, said, _ = reproduce(out / "run.json")
    assert code == 0
    assert "changed     device CPU, another -> " in said and "changed     versions: torch 2.9.0 -> " in said
    assert "changed     code: commit c with uncommitted changes -> " in said
    assert "changed     other packages: gone 1.0 -> not installed" in said
    assert "differs     validation.loss 9.0" in said and "reproduced  within the recorded spread" in said


def test_a_number_that_differs_where_nothing_else_does_is_not_reproduced(
    pristine_data, checkpoints, finetune, reproduce
):
    out = finetune(pristine_data, checkpoints("convnext"), num_train_epochs=1)
    edit(out / "metrics.json", lambda content: content["validation"].update(loss=9.0))
    code, said, _ = reproduce(out / "run.json")
    assert code == 1 and said.splitlines()[-1].startswith("not reproduced: 1 of")
    assert "although data, code, arguments and environment are the same" in said.splitlines()[-1]


def test_changed_data_are_noticed_before_anything_is_trained(data, checkpoints, finetune, reproduce, tmp_path):
    out = finetune(data, checkpoints("convnext"), num_train_epochs=1)
    draw_picture(WNIDS[0], 99).save(data / "train" / WNIDS[0] / "images" / f"{WNIDS[0]}_3.JPEG")
    code, _, error = reproduce(out / "run.json")
    assert code == 2 and "the images differ from the recorded run" in error and "nothing was trained" in error
    assert not (tmp_path / "out-reproduced" / "metrics.json").exists()
    code, _, error = reproduce(out / "run.json", "--split_seed", 5, "--output_dir", tmp_path / "other")
    assert code == 2 and "from the recorded run" in error


REPEATS = {"seeds": "seeds: [3, 5]\nmixup_alpha: 0.2\nema_decay: 0.9\n", "folds": "kfold: 2\n"}


@pytest.fixture(scope="module", params=REPEATS)
def repeated_run(request, tmp_path_factory, checkpoints):
    """A run of several trainings, on data of its own; its folder and its data's."""
    place = tmp_path_factory.mktemp(request.param)
    data, recipe = write_data_set(place), place / "tiny.yaml"
    recipe.write_text("per_device_train_batch_size: 8\nnum_train_epochs: 1\n" + REPEATS[request.param])
    arguments = {"data_dir": data, "model_name_or_path": checkpoints("convnext"), "output_dir": place / "out"}
    main([str(recipe), *(word for name, value in arguments.items() for word in (f"--{name}", str(value)))])
    return place / "out", data


def test_a_run_of_several_trainings_is_reproduced_bit_for_bit(repeated_run, reproduce, tmp_path):
    out, _ = repeated_run
    again = tmp_path / "again"
    code, said, _ = reproduce(out / "run.json", "--output_dir", again)
    assert code == 0 and said.splitlines()[-1].startswith("reproduced  bit for bit")
    assert said.count("changed     ") == 1 and "changed     nothing: the results must be the same bit for bit" in said
    assert "same        mean.validation.accuracy" in said and "same        weights_sha256" in said
    assert (again / "submission.csv").read_bytes() == (out / "submission.csv").read_bytes()


def test_what_differs_from_a_run_of_several_trainings_is_said_before_the_first(
    repeated_run, reproduce, tmp_path, monkeypatch
):
    def stop(*args):
        raise UserError("enough")

    monkeypatch.setattr(single, "train_and_measure", stop)
    out, _ = repeated_run
    edited = copy_record(out, tmp_path / "edited", "edited.json")
    edit(edited, lambda content: content["versions"].update(torch="2.9.0"))
    words = ("--output_dir", tmp_path / "again", "--learning_rate", "1e-3")
    _, said, _ = reproduce(edited, *words)
    changes = [line for line in said.splitlines() if line.startswith("changed")]
    assert changes[0] == "changed     arguments: learning_rate 0.0005 -> 0.001"
    assert changes[1].startswith("changed     versions: torch 2.9.0 -> ") and len(changes) == 2


def test_other_data_than_those_of_several_trainings_are_refused_before_the_first(repeated_run, reproduce, tmp_path):
    out, data = repeated_run
    changed = shutil.copytree(data, tmp_path / data.name)
    code, _, error = reproduce(out / "run.json", "--output_dir", tmp_path / "one", "--split_seed", 5)
    assert code == 2 and "the split into training, validation and test images differs from the recorded run" in error
    draw_picture(WNIDS[0], 99).save(changed / "train" / WNIDS[0] / "images" / f"{WNIDS[0]}_3.JPEG")
    code, said, error = reproduce(out / "run.json", "--output_dir", tmp_path / "two", "--data_dir", changed)
    assert code == 2 and "the images differ from the recorded run" in error and "untrained" not in said


def test_one_of_several_trainings_is_reproduced_alone(repeated_run, reproduce, tmp_path):
    out, _ = repeated_run
    code, said, _ = reproduce(sorted(out.glob("*/run.json"))[1], "--output_dir", tmp_path / "alone")
    assert code == 0 and "changed     nothing" in said and said.splitlines()[-1].startswith("reproduced  bit for bit")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--reproduce"], "which run?"),
        (["--reproduce", "none.json"], "none.json: cannot be read"),
        (["--reproduce", "README.md"], "README.md: is not valid json"),
        (["recipes/sample.yaml", "--reproduce", "x"], "takes the place of the recipe"),
    ],
)
def test_a_run_that_cannot_be_reproduced_is_refused(words, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_the_spread_over_seeds_comes_before_the_interval_of_one_run():
    alone = trained_metrics(0.8)
    found = {c.name: c for c in record.compare_metrics(alone, alone)}
    assert found["validation.accuracy"].spread == pytest.approx((0.7, 0.9))
    assert {c.verdict for c in found.values()} == {"same"} and not any("seconds" in name for name in found)
    std = SplitScores(Scores(0.01, 0.0), Scores(0.0, 0.0))
    found = {c.name: c for c in record.compare_metrics(replace(alone, std=std), trained_metrics(0.83))}
    assert found["validation.accuracy"].spread == pytest.approx((0.78, 0.82))
    assert found["validation.accuracy"].verdict == "differs" and found["std.validation.accuracy"].now is None
    found = {c.name: c for c in record.compare_metrics(replace(alone, std=std), trained_metrics(0.81))}
    assert found["validation.accuracy"].verdict == "within"


def test_a_hash_that_differs_is_said():
    then = {"submission_sha256": "a", "weights_sha256": "w"}
    weights, csv = record.compare_records(then, then | {"submission_sha256": "b"})
    assert (weights.verdict, csv.verdict) == ("same", "differs")


def test_weights_that_differ_in_one_bit_have_another_fingerprint(checkpoints):
    import torch
    from transformers import AutoModelForImageClassification

    model = AutoModelForImageClassification.from_pretrained(checkpoints("convnext"))
    before = load.fingerprint_of_weights(model)
    assert load.fingerprint_of_weights(model.to(memory_format=torch.channels_last)) == before
    with torch.no_grad():
        model.classifier.bias[0] = model.classifier.bias[0].nextafter(torch.tensor(9.0))
    assert load.fingerprint_of_weights(model) != before


def test_a_record_without_its_parts_is_refused(tmp_path):
    (tmp_path / "run.json").write_text('{"arguments": {}}')
    with pytest.raises(UserError, match=r"is not a run\.json of this project"):
        record.read_record(tmp_path / "run.json")


def test_a_record_without_its_metrics_is_refused_before_anything_is_read(capsys, tmp_path):
    content = {"arguments": {"output_dir": "x"}, "versions": {}, "data_fingerprint": "d", "split_fingerprint": "s"}
    (tmp_path / "run.json").write_text(json.dumps(content))
    with pytest.raises(SystemExit) as stop:
        main(["--reproduce", str(tmp_path / "run.json")])
    assert stop.value.code == 2 and "metrics.json is not in the same folder" in capsys.readouterr().err
