"""What commands refuse, in words and with status 2, before data is touched, ε is charged, or a file is written."""

import json

import numpy as np
import pytest
import torch

from accounting import Ledger, PRVAccountant
from clipless_dp import CheckpointError
from clipless_dp.checkpoint import load_checkpoint, replacing, save_checkpoint, write_text
from clipless_dp.cli import COMMANDS, main
from clipless_dp.commands.held_out import file_beside
from clipless_dp.datasets import rows_held_out

from .conftest import READ

TARGET = ["--epsilon", "3", "--delta", "1e-3", "--accountant", "rdp", "--quiet"]


def refused(capsys, *arguments):
    """What is said, once it is known that nothing was printed, or raised, besides."""
    assert main([*map(str, arguments)]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert "Traceback" not in captured.err
    return captured.err


@pytest.fixture(scope="module")
def result(arrays, tmp_path_factory):
    path = tmp_path_factory.mktemp("result") / "rows.pt"
    assert main(["train", "--data", str(arrays), *TARGET, "--audit", "off", "--epochs", "2", "--out", str(path)]) == 0
    return path


FILES = {
    "no rows": ("a,label\n", "holds a header and no rows"),
    "one column": ("a;label\n1;0\n", "separated by commas"),
    "a name twice": ("a,a,label\n1,1,0\n", "a name of its own"),
    "a short row": ("a,label\n1,0\n1\n", "line 3: 1 cells"),
    "text among numbers": ("a,label\n1,0\nred,1\n" + "2,0\n3,1\n" * 20, "--categories 'a=A,B,C'"),
    "labels that are no classes": ("a,label\n1,cat\n2,dog\n" * 20, "say --labels A B C"),
    "a quote that is left open": ('a,label\n"1,0\n', "cannot read"),
}


@pytest.mark.parametrize("case", FILES)
def test_tables_that_cannot_be_read_are_refused_before_a_statistic_is_released(case, tmp_path, capsys, monkeypatch):
    content, message = FILES[case]
    path = tmp_path / "table.csv"
    path.write_text(content)
    monkeypatch.setattr("clipless_dp.tables.fitting.private_standardisation", lambda *_, **__: pytest.fail("released"))
    assert message in refused(capsys, "train", "--data", path, *TARGET, "--out", tmp_path / "model.pt")
    assert [file.name for file in tmp_path.iterdir()] == ["table.csv"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--delta", "2"], "delta"),
        (["--lr", "-1"], "lr"),
        (["--ema", "1.5"], "ema"),
        (["--rows-per-group", "3"], "are about groups"),
    ],
)
def test_settings_out_of_range_are_refused_before_data_is_read(arguments, message, table, capsys, monkeypatch):
    monkeypatch.setattr("clipless_dp.commands.columns.read_columns", lambda *_, **__: pytest.fail("read"))
    assert message in refused(capsys, "train", "--data", table, *READ, *TARGET, *arguments)


OPTIONS = {
    "no such file": (["--data", "none.csv"], "there is no file none.csv"),
    "a text": (["--data", "notes.txt"], "commands read no texts"),
    "another ending": (["--data", "table.xlsx"], "unknown data set"),
    "a column that is not there": (["--label", "wage"], "no column 'wage'; it has age, colour, income, approved"),
    "a category that is none": (["--categories", "colour"], "COLUMN=A,B,C"),
    "a category of no column": (["--categories", "size=a,b"], "no column 'size'"),
    "labels said twice": ([*READ, "--classes", "2"], "say the same thing"),
    "a network of columns": ([*READ, "--route", "gated"], "are of any scale"),
    "a preset of images": ([*READ, "--preset", "mnist-gated"], "are of any scale"),
    "a range that is none": (
        ["--target-range", "1", "0", "--label", "age", "--drop", "approved", "colour"],
        "lower first",
    ),
    "a folder that cannot be written": ([*READ, "--out", "/dev/null/model.pt"], "cannot be written"),
    "an ε of nothing": ([*READ, "--epsilon", "0"], "epsilon"),
    "a batch of more than all": ([*READ, "--batch-size", "5000"], "batch_size"),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_options_that_do_not_fit_are_refused_before_a_statistic_is_released(case, table, capsys, monkeypatch):
    arguments, message = OPTIONS[case]
    monkeypatch.setattr("clipless_dp.tables.fitting.private_standardisation", lambda *_, **__: pytest.fail("released"))
    assert message in refused(capsys, "train", "--data", table, *TARGET, *arguments)


def test_settings_that_a_preset_cannot_train_with_are_refused_before_its_statistic(folder, capsys, monkeypatch):
    monkeypatch.setattr("clipless_dp.presets.named.private_moments", lambda *_, **__: pytest.fail("released"))
    for arguments, message in (
        (["--batch-size", "5000"], "batch_size"),
        (["--lr", "-1"], "lr"),
        (["--ema", "2"], "ema"),
    ):
        assert message in refused(capsys, "train", "--data", folder, *TARGET, *arguments)


def test_folders_that_hold_something_else_are_refused_by_the_name_of_the_file(folder, tmp_path, capsys):
    image = pytest.importorskip("PIL.Image")
    for name in ("a", "b"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for index in range(3):
            image.new("L", (8, 8), 20 * index).save(tmp_path / "images" / name / f"{index}.png")
    train = ["train", "--data", tmp_path / "images", *TARGET]
    odd = tmp_path / "images" / "b" / "9.png"
    for content, message in (
        (image.new("L", (9, 8)), "--image-size HEIGHT WIDTH"),
        (image.new("RGB", (8, 8)), "--channels 1 or 3"),
        (image.new("I;16", (8, 8)), "8 bits would lose some"),
    ):
        content.save(odd)
        said = refused(capsys, *train)
        assert message in said
        assert str(odd) in said
    odd.write_bytes(b"no image")
    assert "cannot be read as an image" in refused(capsys, *train)
    odd.rename(odd.with_suffix(".txt"))
    assert "is no image" in refused(capsys, *train)
    assert "a folder of images for each class" in refused(capsys, "train", "--data", folder / "left", *TARGET)
    assert "leave --classes out" in refused(capsys, "train", "--data", folder, "--classes", "2", *TARGET)


@pytest.mark.parametrize("command", ["evaluate", "predict", "certify", "explain"])
def test_data_unlike_what_was_trained_on_is_refused(command, result, table, folder, tmp_path, capsys):
    more = ["--sigma", "1"] if command == "certify" else []
    np.savez(tmp_path / "wide.npz", X=np.zeros((30, 6)), y=np.arange(30) % 2)
    for data in (table, folder, tmp_path / "wide.npz"):
        refused(capsys, command, result, "--data", data, *more)
    assert list(tmp_path.iterdir()) == [tmp_path / "wide.npz"]


READERS = [["evaluate"], ["predict"], ["certify"], ["explain"], ["audit"], ["report"], ["export", "--out", "model"]]


@pytest.mark.parametrize("command", READERS, ids=lambda command: command[0])
def test_files_that_are_no_results_are_refused_by_name(command, arrays, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = ["--data", arrays] if command[0] in ("evaluate", "predict", "certify", "explain") else []
    assert "none.pt" in refused(capsys, *command, "none.pt", *data)
    (tmp_path / "foreign.pt").write_bytes(b"something else")
    assert "foreign.pt" in refused(capsys, *command, "foreign.pt", *data)
    assert [file.name for file in tmp_path.iterdir()] == ["foreign.pt"]


def test_every_command_has_help_and_says_no_default_that_is_none(capsys):
    for module in COMMANDS:
        name = module.__name__.rpartition(".")[2]
        with pytest.raises(SystemExit, match="0"):
            main([name, "--help"])
        assert "None" not in capsys.readouterr().out


def test_a_network_of_python_is_read_in_python(result, tmp_path, capsys):
    content = load_checkpoint(result)
    save_checkpoint(tmp_path / "own.pt", {**content, "made_by": "fit", "settings": {"input_norm": 1.0}})
    assert "clipless_dp.load(path, net=net)" in refused(capsys, "audit", tmp_path / "own.pt")
    built = {"route": "gated", "network": "no such", "tau": 1.0, "input_norm": None, "shape": [5], "outputs": 2}
    save_checkpoint(tmp_path / "own.pt", {**content, "made_by": "fit", "settings": {"made": built}})
    assert "altered" in refused(capsys, "audit", tmp_path / "own.pt")


def test_a_checkpoint_of_training_is_no_result_and_its_ledger_is_reported(arrays, tmp_path, capsys):
    checkpoint = tmp_path / "run.pt"
    train = ["train", "--data", arrays, *TARGET, "--audit", "off", "--epochs", "1", "--checkpoint", checkpoint]
    assert main([*map(str, train)]) == 0
    capsys.readouterr()
    assert "result.save" in refused(capsys, "predict", checkpoint, "--data", arrays)
    assert main(["report", str(checkpoint), "--delta", "1e-3", "--out", str(tmp_path / "spent")]) == 0
    facts = json.loads((tmp_path / "spent.json").read_text("utf-8"))
    ledger = Ledger.from_state_dict(facts["ledger"])
    accountant = PRVAccountant()
    accountant.ledger = ledger
    assert facts["epsilon"]["epsilon"] == pytest.approx(float(accountant.get_epsilon(1e-3)), rel=0.02)
    assert "Only a ledger was read" in (tmp_path / "spent.html").read_text("utf-8")
    # From the ledger alone, and from the statement of it.
    (tmp_path / "ledger.json").write_text(ledger.to_json())
    assert main(["report", str(tmp_path / "ledger.json"), "--organisation", "Clinic"]) == 0
    assert "Clinic" in capsys.readouterr().out
    assert main(["report", str(tmp_path / "spent.json")]) == 0
    assert refused(capsys, "report", tmp_path / "spent.json", "--contact", "two\nlines")
    (tmp_path / "other.json").write_text("[1]")
    assert "neither" in refused(capsys, "report", tmp_path / "other.json")


def test_a_checkpoint_of_people_is_read_on_people_that_were_held_out(tmp_path, capsys):
    path, checkpoint, who = tmp_path / "rows.npz", tmp_path / "run.pt", np.arange(300) // 3
    inputs = np.random.default_rng(0).normal(size=(300, 5))
    np.savez(path, X=inputs, y=(inputs[:, 0] > 0).astype(np.int64), who=who)
    of_net = ["--data", path, "--route", "orthogonal"]
    train = ["train", *of_net, *TARGET, "--audit", "off", "--epochs", "1", "--batch-size", "20", "--lr", "0.1"]
    for people, others in ((["--groups", "who"], []), ([], ["--groups", "who"])):
        assert main([*map(str, [*train, *people, "--checkpoint", checkpoint])]) == 0
        capsys.readouterr()
        for command in ("certify", "explain"):
            assert "give --groups as in train" in refused(capsys, command, checkpoint, *of_net, *others)
        assert main([*map(str, ["certify", checkpoint, *of_net, *people, "--samples", "5"])]) == 0
        checkpoint.unlink()


def test_what_cannot_be_planned_says_what_is_missing(arrays, capsys):
    assert "--rows N and --shape" in refused(capsys, "plan", "--epsilon", "1")
    assert "leave --shape out" in refused(capsys, "plan", "--data", arrays, "--shape", "3", "--epsilon", "1")
    preset = ["--preset", "transfer", "--minutes", "1"]
    assert "a preset has its own" in refused(capsys, "plan", "--data", arrays, *preset, "--epsilon", "1")


def test_without_pyarrow_parquet_is_refused_in_words(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    (tmp_path / "table.parquet").write_bytes(b"PAR1")
    assert "clipless-dp[parquet]" in refused(capsys, "train", "--data", tmp_path / "table.parquet", *TARGET)


def test_without_its_packages_onnx_is_refused_in_words(result, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("clipless_dp.commands.export.find_spec", lambda name: None)
    arguments = ["export", result, "--out", tmp_path / "model"]
    assert "clipless-dp[export]" in refused(capsys, *arguments, "--formats", "onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["evaluate", "predict"])
def test_a_file_that_was_there_is_left_as_it_was_where_writing_fails(
    command, result, arrays, tmp_path, capsys, monkeypatch
):
    out = tmp_path / "out.json"
    out.write_text("as it was")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    assert "left as it was" in refused(capsys, command, result, "--data", arrays, "--out", out)
    assert out.read_text() == "as it was"
    assert list(tmp_path.iterdir()) == [out]


def test_what_raises_while_a_file_is_written_leaves_none(tmp_path):
    def half():
        with replacing(tmp_path / "file.txt") as beside:
            beside.write_text("half")
            raise KeyError

    with pytest.raises(KeyError):
        half()
    assert not list(tmp_path.iterdir())
    with pytest.raises(CheckpointError, match="cannot be written"):
        write_text("/dev/null/file.txt", "text")


def test_an_export_that_computes_something_else_is_not_kept(result, tmp_path, capsys, monkeypatch):
    class Other(torch.nn.Module):
        def forward(self, inputs):
            return inputs.sum(1).float()

    monkeypatch.setattr("clipless_dp.prediction.Predictor.export_net", lambda self: Other())
    assert "other scores" in refused(capsys, "export", result, "--out", tmp_path / "model", "--formats", "pt2")
    assert not list(tmp_path.iterdir())


def test_no_command_writes_two_things_to_one_file_or_over_what_it_reads(result, arrays, tmp_path, capsys):
    start = ["train", "--data", arrays, *TARGET]
    assert "written over" in refused(capsys, *start, "--out", tmp_path / "a.json", "--report", tmp_path / "a")
    assert "written over" in refused(capsys, *start, "--out", tmp_path / "a.pt", "--checkpoint", tmp_path / "a.pt")
    assert "written over" in refused(capsys, *start, "--out", arrays)
    assert "written over" in refused(capsys, "predict", result, "--data", arrays, "--out", arrays)
    assert "written over" in refused(capsys, "evaluate", result, "--data", arrays, "--out", result)
    assert main(["report", str(result), "--out", str(tmp_path / "statement")]) == 0
    capsys.readouterr()
    before = (tmp_path / "statement.json").read_bytes()
    assert "privacy statement" in refused(capsys, "export", result, "--out", tmp_path / "statement")
    assert (tmp_path / "statement.json").read_bytes() == before


@pytest.mark.parametrize("name", ["statistics", "labels", "task"])
def test_a_result_does_not_replace_what_is_kept_beside_a_checkpoint(name, table, tmp_path, capsys):
    checkpoint = tmp_path / "run.pt"
    beside = tmp_path / f"run.pt.{name}"
    start = ["train", "--data", table, *READ, *TARGET, "--checkpoint", checkpoint]
    assert "written over" in refused(capsys, *start, "--out", beside)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", [[], ["--dataset-size", "300"]])
def test_a_copy_of_lower_precision_is_refused_whether_its_size_was_given_or_not(size, arrays, tmp_path, capsys):
    checkpoint, result, copy = tmp_path / "run.pt", tmp_path / "model.pt", tmp_path / "copy.npz"
    with np.load(arrays) as found:
        np.savez(copy, X=found["X"].astype(np.float16), y=found["y"])
    of_net = ["--route", "orthogonal", "--network", "mlp"]
    train = ["train", "--data", arrays, *TARGET, *of_net, "--audit", "off", "--epochs", "1", *size]
    assert main([*map(str, [*train, "--out", result, "--checkpoint", checkpoint])]) == 0
    reading = {
        "evaluate": ["--held-out"],
        "certify": ["--samples", "5", "--attacks", "none"],
        "explain": ["--samples", "2", "--measured", "0"],
    }
    for command, more in reading.items():
        for of in (result, checkpoint)[: 1 + (command != "evaluate")]:
            named = of_net if of == checkpoint else []
            assert main([*map(str, [command, of, "--data", arrays, *more, *named])]) == 0
            capsys.readouterr()
            said = refused(capsys, command, of, "--data", copy, *more, *named)
            assert "taken for held-out ones" in said or "some that were trained on" in said
    # A file that is not there, or that another model's lies in place of.
    for of in (result, checkpoint):
        file_beside(of).unlink()
        named = of_net if of == checkpoint else []
        said = refused(capsys, "certify", of, "--data", arrays, *reading["certify"], *named)
        assert f"kept in {file_beside(of)}" in said
        assert "stays with the data, since it is private" in said


@pytest.mark.slow
def test_what_was_held_out_is_no_part_of_what_is_released(arrays, tmp_path, capsys):
    """Two models of one seed, whose held-out rows differ, are one file."""
    with np.load(arrays) as found:
        inputs, targets = found["X"], found["y"]
    held = rows_held_out(inputs, targets)
    files = []
    for name, rows in (("all", np.ones(300, bool)), ("fewer", ~held | (held.cumsum() % 2 == 0))):
        np.savez(tmp_path / "rows.npz", X=inputs[rows], y=targets[rows])
        path = tmp_path / f"{name}.pt"
        train = ["train", "--data", tmp_path / "rows.npz", *TARGET, "--route", "orthogonal", "--audit", "off"]
        train += ["--reproducible-seed", "1", "--init-seed", "1", "--epochs", "1", "--out", path]
        assert main([*map(str, train)]) == 0
        files.append(load_checkpoint(path)["settings"]["made"])
        assert file_beside(path).exists()
    assert files[0] == files[1]
    assert "held_out" not in files[0]
    assert file_beside(tmp_path / "all.pt").read_text() != file_beside(tmp_path / "fewer.pt").read_text()


def test_training_goes_on_with_the_rows_that_it_began_with_alone(arrays, tmp_path, capsys):
    checkpoint, out, copy = tmp_path / "run.pt", tmp_path / "model.pt", tmp_path / "copy.npz"
    with np.load(arrays) as found:
        np.savez(copy, X=found["X"].astype(np.float16), y=found["y"])
        np.savez(tmp_path / "split.npz", x_train=found["X"], y_train=found["y"], x_test=found["X"], y_test=found["y"])
    train = ["train", *TARGET, "--route", "orthogonal", "--network", "mlp", "--audit", "off", "--epochs", "1"]
    train += ["--dataset-size", "240", "--checkpoint", checkpoint, "--out", out]
    # What is refused before it begins leaves nothing.
    assert "lr" in refused(capsys, *train, "--data", arrays, "--lr", "-1")
    assert not file_beside(checkpoint).exists()
    assert main([*map(str, [*train, "--data", arrays])]) == 0
    assert f"{file_beside(out)} (private: it stays with the data)" in capsys.readouterr().out
    kept = file_beside(checkpoint).read_bytes()
    assert main([*map(str, [*train, "--data", arrays])]) == 0
    capsys.readouterr()
    assert "when the training of" in refused(capsys, *train, "--data", copy)
    assert file_beside(checkpoint).read_bytes() == kept
    # Of a checkpoint of which nothing says what it began with, nothing is said.
    file_beside(checkpoint).unlink()
    assert main([*map(str, [*train, "--data", arrays])]) == 0
    assert not file_beside(checkpoint).exists()
    assert not file_beside(out).exists()
    capsys.readouterr()
    assert "there is none" in refused(capsys, "evaluate", out, "--data", arrays, "--held-out")


def test_no_command_writes_over_what_says_which_rows_were_held_out(result, arrays, tmp_path, capsys):
    private = file_beside(result)
    before = private.read_bytes()
    for command in ("evaluate", "predict", "certify", "explain"):
        assert "written over" in refused(capsys, command, result, "--data", arrays, "--out", private)
    assert private.read_bytes() == before
    run = tmp_path / "run.pt"
    for out, checkpoint in ((file_beside(run), run), (run, file_beside(run))):
        start = ["train", "--data", arrays, *TARGET, "--out", out, "--checkpoint", checkpoint]
        assert "written over" in refused(capsys, *start)
    assert not list(tmp_path.iterdir())


def test_a_statement_whose_epsilon_its_own_ledger_contradicts_is_not_reported(result, tmp_path, capsys):
    assert main(["report", str(result), "--out", str(tmp_path / "statement")]) == 0
    assert main(["report", str(tmp_path / "statement.json")]) == 0
    capsys.readouterr()
    facts = json.loads((tmp_path / "statement.json").read_text("utf-8"))
    facts["epsilon"]["epsilon"] = 0.03
    (tmp_path / "statement.json").write_text(json.dumps(facts), encoding="utf-8")
    assert "altered" in refused(capsys, "report", tmp_path / "statement.json")
