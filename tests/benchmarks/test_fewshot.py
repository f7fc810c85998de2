"""The few-shot benchmark on a few episodes: what it prints and writes, its episodes; interrupted; wrong options."""

from functools import partial

import pytest
import torch
from torch import nn

from benchmarks import fewshot, training
from benchmarks.data import CLASSES, Images

from . import results

QUICK = ["--episodes", "3", "--test-episodes", "4", "--seeds", "0"]


@pytest.fixture
def small(monkeypatch):
    """Five classes of twenty images on each side."""

    def part(images, labels):
        chosen = torch.cat([(labels == label).nonzero()[:20, 0] for label in labels.unique()[:5]])
        return images[chosen], labels[chosen]

    def reduced(seed, whole):
        data = whole(seed)
        return Images(part(*data.train), part(*data.test), 5, data.augment)

    for name, whole in CLASSES.items():
        monkeypatch.setitem(CLASSES, name, partial(reduced, whole=whole))
    monkeypatch.setattr(training, "SMOOTHING", 2)


def test_a_run_leaves_a_table_a_file_and_a_plot(tmp_path, capsys, small):
    assert fewshot.main([*QUICK, "--norms", "BN", "SWBN kl", "--step-size", "1e-5", "--out", str(tmp_path)]) == 0
    output = capsys.readouterr().out
    assert "5-way 1-shot %" in output and "5-way 5-shot %" in output and "3 episodes" in output
    result = results(tmp_path)
    assert result["options"]["norms"] == ["BN", "SWBN kl"] and not result["interrupted"]
    for dataset in CLASSES:
        plain, swbn = result[dataset]["rows"]
        assert (plain["norm"], swbn["norm"]) == ("BN", "SWBN kl")
        assert plain["ahead_1"] == plain["ahead_5"] == 0
        for row in (plain, swbn):
            assert 0.2 < row["accuracy_1"] < row["accuracy_5"] <= 1 and row["confidence_1"] > 0
            assert row["ahead_5"] == row["accuracy_5"] - plain["accuracy_5"]
            shown = f"{100 * row['accuracy_1']:.1f} ± {100 * row['confidence_1']:.1f}"
            assert shown in output
        losses = [curve["losses"] for curve in result[dataset]["curves"]]
        # The same weights and the same episode: SWBN begins, as good as, where BN does.
        assert len(losses[0]) == 3 and losses[0][0] == pytest.approx(losses[1][0], rel=0.01)
    assert (tmp_path / "fewshot.png").read_bytes().startswith(b"\x89PNG")


def test_an_interrupt_keeps_what_was_measured(tmp_path, capsys, monkeypatch):
    def fit(network, batches, steps, *, curve, **options):
        curve.losses, curve.seconds = [1.0] * 30, [float(i) for i in range(30)]
        assert steps == 600
        if len(started) == 2:
            raise KeyboardInterrupt
        started.append(1)

    started = []
    monkeypatch.setattr(fewshot, "fit", fit)
    arguments = ["--dataset", "digits", "--norms", "BN", "--seeds", "0", "1", "2", "--test-episodes", "2"]
    assert fewshot.main([*arguments, "--out", str(tmp_path)]) == 130
    assert "interrupted" in capsys.readouterr().err
    result = results(tmp_path)
    assert result["interrupted"] and [row["seed"] for row in result["digits"]["rows"]] == [0, 1, 2]
    assert result["digits"]["rows"][1]["accuracy_1"] > 0.2 and result["digits"]["rows"][2]["accuracy_1"] is None


def test_an_episode_has_other_images_of_other_classes():
    labels = torch.arange(60) % 6 + 3
    drawn = list(fewshot.episodes(labels, 4, 7, 20, torch.Generator().manual_seed(0)))
    again = list(fewshot.episodes(labels, 4, 7, 20, torch.Generator().manual_seed(0)))
    assert len(drawn) == 20 and not torch.equal(drawn[0], drawn[1])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(drawn, again, strict=True))
    for indices in drawn:
        assert indices.shape == (4, 7) and len(indices.unique()) == 28
        classes = labels[indices]
        assert (classes == classes[:, :1]).all() and len(classes[:, 0].unique()) == 4


def test_a_query_belongs_to_the_nearest_mean():
    embedded = torch.tensor([[[0.0, 0.0], [2.0, 0.0], [1.0, 1.0]], [[5.0, 0.0], [5.0, 2.0], [4.0, 1.0]]])
    expected = torch.tensor([[-1.0, -16.0], [-10.0, -1.0]])  # from (1, 0) and (5, 1)
    torch.testing.assert_close(fewshot.logits(embedded, 2), expected, rtol=0, atol=0)


def test_classifying_is_embedding_each_image():
    torch.manual_seed(0)
    network = fewshot.Prototypes(nn.BatchNorm2d, 2).eval()
    images = torch.randn(3, 5, 3, 16, 16)
    assert network(images).shape == (9, 3)
    embedded = torch.stack([network.encoder(one) for one in images])
    torch.testing.assert_close(network(images), fewshot.logits(embedded, 2))
