"""The video benchmark on a few clips: what it prints and writes, counts, an interrupt, wrong options."""

import pytest

from benchmarks import video
from benchmarks.output import medians

from . import results

QUICK = ["--videos", "16", "--size", "16", "--length", "4", "--frames", "2", "--epochs", "2", "--batch-size", "8"]
TITLES = ["parameters, and operations", "milliseconds for a clip", "16 videos of 8 classes, 2 epochs"]


@pytest.fixture
def brief(monkeypatch):
    """Without the large video, and with a short look at the small one."""
    monkeypatch.setattr(video, "LARGE", (48, 6, 2))


def test_a_run_leaves_tables_a_file_and_pictures(tmp_path, capsys, brief):
    assert video.main([*QUICK, "--seeds", "0", "--out", str(tmp_path)]) == 0
    output = capsys.readouterr().out
    assert all(title in output for title in TITLES)
    result = results(tmp_path)
    assert not result["interrupted"] and len(result["tables"]) == 3
    runs = [(run["variant"], run["layers"]) for run in result["runs"]]
    assert runs == [(variant, layers) for variant in video.VARIANTS for layers in video.LAYERS]
    assert all(len(run["epochs"]) == 2 for run in result["runs"])
    # Batches and first weights are the same: of a student without a teacher, and of one with whitened layers.
    first = {run: one["epochs"][0]["train_loss"] for run, one in zip(runs, result["runs"], strict=True)}
    assert first["residual", "plain"] != first["residual, taught", "plain"]
    for name in ("accuracy", "sheet"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert all(row[name] > 0 for row in result["times"] for name in ("decode_ms", "raw_ms", "residual_ms"))


def test_counts_stand_beside_the_published_ones():
    rows = {row["network"]: row for row in video.count_all()}
    assert round(rows["mfnet3d"]["parameters"], 1) == 8.0 and round(rows["mfnet3d"]["operations"], 1) == 11.1
    assert round(rows["CoViAR"]["parameters"], 1) == 83.6  # 60.2 and twice 11.7
    assert rows["mfcd_net"]["fewer_parameters"] > 11 and rows["mfcd_net"]["fewer_operations"] > 3


def test_leads_are_over_the_same_seed():
    def run(variant, layers, seed, accuracy):
        figures = {"test_accuracy": accuracy, "test_loss": 1.0, "train_accuracy": 0.5, "seconds": 2.0}
        return {"variant": variant, "layers": layers, "seed": seed, "epochs": [figures, figures]}

    rows = video.summarise(
        [
            run("residual", "plain", 0, 0.5),
            run("residual", "whitened", 0, 0.6),
            run("residual, taught", "plain", 0, 0.7),
            run("residual, taught", "whitened", 0, 0.65),
            run("residual", "plain", 1, 0.1),
            run("residual, taught", "plain", 1, 0.2),
        ]
    )
    assert [round(row["over_untaught"]) for row in rows] == [0, 0, 20, 5, 0, 10]
    assert [round(row["over_plain"]) for row in rows] == [0, 10, 0, -5, 0, 0]
    assert all(row["seconds"] == 4 for row in rows)
    assert [row["over_untaught"] for row in medians(rows, ["variant", "layers"])][2] == pytest.approx(15)


@pytest.mark.slow
def test_an_interrupt_keeps_what_was_measured(tmp_path, capsys, brief, monkeypatch):
    whole, started = video.train, []

    def train(*arguments):
        started.append(1)
        if len(started) == 2:
            raise KeyboardInterrupt
        return whole(*arguments)

    monkeypatch.setattr(video, "train", train)
    assert video.main([*QUICK, "--out", str(tmp_path)]) == 130
    result = results(tmp_path)
    assert result["interrupted"] and len(result["runs"]) == 1 and len(result["tables"]) == 3


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--frames", "12"], "--frames 12: a video has 12, and the first is left out"),
        (["--size", "17"], "--size 17: give an even number from 16 to 80"),
        (["--size", "82"], "--size 82: give an even number from 16 to 80"),
        (["--videos", "16"], "--batch-size 32: there are 16 videos"),
        (["--distill-weight", "2"], "argument --distill-weight: invalid number in [0, 1] value: '2'"),
    ],
)
def test_wrong_options(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        video.main([*arguments, "--out", str(tmp_path)])
    assert ended.value.code == 2 and message in capsys.readouterr().err
