"""`--reproduce`: a run is repeated from its run.json, and what came out the same is said number by number."""

import json
import shutil

import pytest
from conftest import WNIDS, draw_picture

from finetune_vit import main
from transfer import UserError, record, reproduction


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


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_a_run_is_reproduced_bit_for_bit_from_its_run_json_alone(
    pristine_data, checkpoints, finetune, reproduce, tmp_path
):
    out = finetune(pristine_data, checkpoints("vit"), learning_rate="3e-3", seed=3, dataloader_num_workers=2)
    moved = shutil.copy(out / "run.json", tmp_path / "lone.json")
    code, said, _ = reproduce(moved)
    assert code == 0
    assert "changed     nothing: the same bits must come out" in said
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
        content["metrics"]["validation"]["loss"] = 9.0

    edit(out / "run.json", other_machine)
    code, said, _ = reproduce(out / "run.json")
    assert code == 0
    assert "changed     device CPU, another -> " in said and "changed     versions: torch 2.9.0 -> " in said
    assert "changed     code: commit c with changes of its own -> " in said
    assert "changed     other packages: gone 1.0 -> none" in said
    assert "differs     validation.loss 9.0" in said and "reproduced  within the recorded spread" in said


def test_a_number_that_differs_where_nothing_else_does_is_not_reproduced(
    pristine_data, checkpoints, finetune, reproduce
):
    out = finetune(pristine_data, checkpoints("convnext"), num_train_epochs=1)
    edit(out / "run.json", lambda content: content["metrics"]["validation"].update(loss=9.0))
    code, said, _ = reproduce(out / "run.json")
    assert code == 1 and "NOT reproduced: 1 of" in said.splitlines()[-1]


def test_changed_data_are_noticed_before_anything_is_trained(data, checkpoints, finetune, reproduce, tmp_path):
    out = finetune(data, checkpoints("convnext"), num_train_epochs=1)
    draw_picture(WNIDS[0], 99).save(data / "train" / WNIDS[0] / "images" / f"{WNIDS[0]}_3.JPEG")
    code, _, error = reproduce(out / "run.json")
    assert code == 2 and "the images are not those of the run" in error and "nothing was trained" in error
    assert not (tmp_path / "out-reproduced" / "metrics.json").exists()
    code, _, error = reproduce(out / "run.json", "--split_seed", 5, "--output_dir", tmp_path / "other")
    assert code == 2 and "are not those of the run" in error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--reproduce"], "which run?"),
        (["--reproduce", "none.json"], "none.json: cannot be read"),
        (["--reproduce", "README.md"], "README.md: is no run.json of this project"),
        (["recipes/sample.yaml", "--reproduce", "x"], "stands in place of the recipe"),
    ],
)
def test_a_run_that_cannot_be_reproduced_is_refused(words, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_the_spread_over_seeds_comes_before_the_interval_of_one_run():
    metrics = {"validation": {"accuracy": 0.8, "accuracy_ci95": [0.5, 0.9]}, "train": {"seconds": 3.0}}
    alone = {"metrics": metrics, "submission_sha256": "a"}
    [accuracy, csv] = reproduction.compare(alone, alone | {"submission_sha256": "b"})
    assert (accuracy.verdict, accuracy.spread, csv.verdict) == ("same", (0.5, 0.9), "differs")
    seeded = {"metrics": metrics | {"std": {"validation": {"accuracy": 0.01}}}}
    found = {c.name: c for c in reproduction.compare(seeded, {"metrics": {"validation": {"accuracy": 0.83}}})}
    assert found["validation.accuracy"].spread == pytest.approx((0.78, 0.82))
    assert found["validation.accuracy"].verdict == "differs"


def test_weights_that_differ_in_one_bit_have_another_fingerprint(checkpoints):
    import torch
    from transformers import AutoModelForImageClassification

    model = AutoModelForImageClassification.from_pretrained(checkpoints("convnext"))
    before = record.fingerprint_of_weights(model)
    assert record.fingerprint_of_weights(model.to(memory_format=torch.channels_last)) == before
    with torch.no_grad():
        model.classifier.bias[0] = model.classifier.bias[0].nextafter(torch.tensor(9.0))
    assert record.fingerprint_of_weights(model) != before


def test_a_record_without_its_parts_is_refused(tmp_path):
    (tmp_path / "run.json").write_text('{"arguments": {}}')
    with pytest.raises(UserError, match=r"is no run\.json of this project"):
        reproduction.read_record(tmp_path / "run.json")
