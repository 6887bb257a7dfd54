"""The roadmap experiment: what its steps are, that it goes on where it stopped, and that it says what came out."""

import json
from functools import partial

import pytest
import torch

import foveal
from foveal.blocks import AggregatedAttention, ConvGLU, LengthScaledCosineAttention, OverlapPatchEmbed
from foveal.models import Backbone, Stage
from tests.examples.running import EXAMPLES, load, run

TINY = ("--train-images", "20", "--img-size", "8", "--epochs", "1", "--batch-size", "10")


@pytest.fixture
def roadmap():
    threads = torch.get_num_threads()
    yield load("roadmap")
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("roadmap")
    out, _ = run("roadmap.py", *TINY, "--seeds", "5", "--output", folder / "small")
    return folder, out


def test_writes_a_table_and_every_run(finished):
    folder, out = finished
    report, page = json.loads((folder / "small.json").read_text()), (folder / "small.md").read_text()
    assert [(run["step"], run["seed"]) for run in report["runs"]] == [(step, 5) for step in range(3, 9)]
    assert all(0.05 < run["accuracy"] < 0.9 for run in report["runs"])
    assert report["made_with"]["torch"] == torch.__version__
    rows = [line for line in page.splitlines() if line.startswith("| ") and line[2].isdigit()]
    assert out.count("\n| ") == 1 + len(rows) == 7
    for row, entry in zip(rows, report["runs"], strict=True):
        assert f"| {100 * entry['accuracy']:.2f} |" in row


def test_the_table_of_two_seeds(finished, roadmap):
    report = json.loads((finished[0] / "small.json").read_text())
    accuracies = {0: [0.5, 0.51, 0.5, 0.5, 0.5, 0.6], 1: [0.52, 0.55, 0.5, 0.5, 0.5, 0.64]}
    report["runs"] = [
        {"step": step, "seed": seed, "accuracy": accuracy, "seconds": 30.0}
        for seed, values in accuracies.items()
        for step, accuracy in enumerate(values, 3)
    ]
    page = roadmap.page(report, [0, 1], "the command", "some.json")
    assert "| 51.00 ± 1.41 (50.00 to 52.00) |  |" in page
    assert "| 53.00 ± 2.83 (51.00 to 55.00) | +2.00 ± 1.41 (+1.00 to +3.00) |" in page
    assert "From step 3 to step 8: +11.00 ± 1.41 (+10.00 to +12.00) points" in page
    assert "The 12 runs took 6 minutes" in page


def test_goes_on_where_it_stopped(finished, roadmap, tmp_path, monkeypatch):
    """With the same numbers: nothing depends on what ran before."""
    report = json.loads((finished[0] / "small.json").read_text())
    path = tmp_path / "small.json"
    path.write_text(json.dumps({**report, "runs": report["runs"][:4]}))
    command = [*TINY, "--seeds", "5", "--output", str(tmp_path / "small")]

    def stop(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(roadmap, "train", stop)
        assert roadmap.main(command) == 130
    assert not (tmp_path / "small.md").exists()
    with foveal.ops.backend("reference"):  # as in the process of `finished`
        assert roadmap.main(command) == 0
    runs = json.loads(path.read_text())["runs"]
    assert [run["accuracy"] for run in runs] == [run["accuracy"] for run in report["runs"]]

    monkeypatch.setattr(roadmap, "train", stop)
    assert roadmap.main(command) == 0  # nothing is left to run


def test_the_last_step_is_transnext(roadmap):
    stem = partial(OverlapPatchEmbed, patch_size=3, stride=2)
    mixers = [
        partial(AggregatedAttention, num_heads=2, pool_ratio=4),
        partial(AggregatedAttention, num_heads=4, pool_ratio=2),
        partial(LengthScaledCosineAttention, num_heads=8),
    ]
    stages = [
        Stage(dim=dim, depth=2, mixer=mixer, mlp=ConvGLU, downsample=stem)
        for dim, mixer in zip((48, 96, 192), mixers, strict=True)
    ]
    net = Backbone(stages, in_chans=1, num_classes=10, pretrain_size=16).eval()
    ours = roadmap.build(roadmap.ROADMAP[-1], 16).eval()
    net.load_state_dict(ours.state_dict())
    images = torch.randn(2, 1, 16, 16)
    assert torch.equal(net(images), ours(images))


def test_the_page_of_the_documentation_has_these_costs(roadmap):
    page = (EXAMPLES.parent / "docs" / "roadmap.md").read_text()
    for step in roadmap.ROADMAP:
        parameters, multiply_adds = roadmap.cost(step, 32)
        assert f"| {step.change} | {parameters / 1e6:.3f}M | {multiply_adds / 1e6:.1f}M |" in page


def test_what_the_steps_add(roadmap):
    parameters, multiply_adds = zip(*(roadmap.cost(step, 32) for step in roadmap.ROADMAP), strict=True)
    focused_dim, dim = 48 + 96, 48 + 96 + 192
    gates = sum(int(width * 8 / 3) for width in (48, 96, 192))
    assert parameters[2] - parameters[1] == 2 * 10 * gates  # a 3 x 3 depthwise convolution with its bias
    assert multiply_adds[2] - multiply_adds[1] == 2 * 9 * sum(
        int(width * 8 / 3) * side**2 for width, side in ((48, 16), (96, 8), (192, 4))
    )
    assert parameters[4] - parameters[3] == 2 * 9 * (focused_dim + 2 + 4)  # positional tokens and biases
    assert parameters[5] - parameters[4] == 2 * dim  # query embeddings


def test_a_seed_draws_disjoint_stratified_parts(roadmap):
    split = roadmap.draw_split(0, 100, 8)
    assert len(split.labels) == 100
    assert len(split.test_labels) == 1697
    assert all(9 <= count <= 11 for count in split.labels.bincount())
    images = {image.numpy().tobytes() for image in split.images}
    assert not images & {image.numpy().tobytes() for image in split.test_images}
    assert not torch.equal(split.labels, roadmap.draw_split(1, 100, 8).labels)


def test_all_steps_see_the_same_images_in_the_same_order(roadmap, monkeypatch):
    """Whatever the number of weights that a model drew before."""
    drawn = []

    def stop(*args, **kwargs):
        drawn.append(torch.get_rng_state())
        raise KeyboardInterrupt

    monkeypatch.setattr(roadmap, "create_optimizer_v2", stop)
    settings = {"train_images": 20, "img_size": 8, "epochs": 1, "batch_size": 10, "lr": 0.1}
    for step in (roadmap.ROADMAP[0], roadmap.ROADMAP[-1]):
        with pytest.raises(KeyboardInterrupt):
            roadmap.train(step, 0, settings, None)
    assert torch.equal(*drawn)


def test_claims_no_more_than_the_seeds_show(roadmap):
    text = roadmap.verdict([[1.0, 2.0], [-1.0, -0.1], [0.0, 1.0], [-1.0, 1.0], [0.1, 0.2]], [0.1, 0.3])
    assert "Better with every seed than the step before: step 4, 8." in text
    assert "Worse with every seed than the step before: step 5." in text
    assert "Within the spread, with gains of either sign or none: step 6, 7." in text
    assert "step 3 to step 8: +0.20 ± 0.14 (+0.10 to +0.30) points" in text
    assert "2 seeds agree by chance once in 2 times" in text


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--train-images", "1790"], "argument --train-images: must be 10 to 1787"),
        (["--seeds", "1", "1"], "argument --seeds: must differ, got 1 1"),
        (["--epochs", "0"], "argument --epochs: must be at least 1"),
        ([*TINY, "--lr", "0.1", "--output", "{}/small"], "{}/small.json was begun with lr 0.002, now it is 0.1"),
        (["--output", "{}/broken"], "argument --output: {}/broken.json is no report"),
    ],
)
def test_errors_name_the_argument(args, message, finished, roadmap, capsys):
    folder = finished[0]
    (folder / "broken.json").write_text("{")
    with pytest.raises(SystemExit) as exit_info:
        roadmap.main([arg.format(folder) for arg in args])
    assert exit_info.value.code == 2
    assert message.format(folder) in capsys.readouterr().err
