"""The example that names images: with a checkpoint in the official layout, and without weights."""

import re

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import ImageNetInfo
from torchvision.transforms import v2

from foveal.models import Backbone
from tests.examples.running import load, run

ATTENTION = {
    "temperature": "temperature",
    "query_embedding": "query_embedding",
    "window_bias": "relative_pos_bias_local",
    "positional_tokens": "learnable_tokens",
    "positional_bias": "learnable_bias",
    "pool.proj": "sr",
    "pool.norm": "norm",
    "log_cpb.fc1": "cpb_fc1",
    "log_cpb.fc2": "cpb_fc2",
    "proj": "proj",
}


def to_official(model: Backbone) -> dict[str, torch.Tensor]:
    """A model's weights in the layout of the official checkpoints."""
    official = {}
    for key, value in model.state_dict().items():
        if key.startswith("head."):
            official[key.replace("head.fc", "head")] = value
            continue
        stage, rest = int(key.split(".")[1]) + 1, key.split(".", 2)[2]
        if rest.startswith("downsample."):
            official[f"patch_embed{stage}.{rest.removeprefix('downsample.')}"] = value
        elif rest.startswith("norm."):
            official[f"norm{stage}.{rest.removeprefix('norm.')}"] = value
        else:
            _, index, part, name = rest.split(".", 3)
            prefix = f"block{stage}.{index}"
            if part != "mixer":
                official[f"{prefix}.{part}.{name.replace('dwconv', 'dwconv.dwconv')}"] = value
            elif name.startswith("qkv.") and stage < 4:  # aggregated attention: queries apart from keys and values
                dim = value.shape[0] // 3
                official[f"{prefix}.attn.q.{name[4:]}"] = value[:dim]
                official[f"{prefix}.attn.kv.{name[4:]}"] = value[dim:]
            else:
                official |= attention_entry(f"{prefix}.attn", name, value)
    return official


def attention_entry(prefix: str, name: str, value: torch.Tensor) -> dict[str, torch.Tensor]:
    module, _, parameter = name.rpartition(".")
    if parameter not in ("weight", "bias"):
        module, parameter = name, ""
    if module in ("temperature",):
        value = value[:, None, None]
    elif module in ("query_embedding", "positional_bias"):
        value = value[:, None]
    elif name == "pool.proj.weight":
        value = value[:, :, None, None]
    return {".".join(filter(None, (prefix, ATTENTION.get(module, module), parameter))): value}


@pytest.fixture(scope="module")
def model() -> Backbone:
    torch.manual_seed(0)
    net = timm.create_model("transnext_micro").eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return net


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Two pictures of other shapes than the model's, beside a file that is none."""
    folder = tmp_path_factory.mktemp("photos")
    noise = np.random.default_rng(0)
    for name, shape in (("wide.png", (200, 320, 3)), ("tall.jpeg", (300, 180, 3))):
        coarse = Image.fromarray(noise.integers(0, 256, (9, 9, 3), dtype=np.uint8))
        coarse.resize(shape[1::-1], Image.Resampling.BICUBIC).save(folder / name)
    (folder / "notes.txt").write_text("no picture")
    return folder


@torch.no_grad()
def expected_lines(net: Backbone, path) -> list[str]:
    """The five best classes by the evaluation that NUMERICS.md describes, written down once more."""
    prepare = v2.Compose(
        [
            v2.Resize(256, interpolation=v2.InterpolationMode.BICUBIC),
            v2.CenterCrop(224),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    best = net(prepare(Image.open(path).convert("RGB"))[None]).softmax(-1)[0].topk(5)
    info = ImageNetInfo("imagenet-1k")
    return [f"{value:.1%} {info.index_to_description(int(i))}" for value, i in zip(*best, strict=True)]


def test_official_checkpoint_on_a_folder(model, photos, tmp_path):
    checkpoint = tmp_path / "transnext_micro_224_1k.pth"
    torch.save({"model": to_official(model)}, checkpoint)
    out, err = run("classify.py", photos, "--model", "transnext_micro", "--checkpoint", checkpoint, "--batch-size", 1)
    blocks = {block.split("\n")[0]: block.split("\n")[1:6] for block in re.split(r"\n(?! )", out.strip())}
    assert list(blocks) == [str(photos / "tall.jpeg"), str(photos / "wide.png")]
    for path, lines in blocks.items():
        assert [" ".join(line.split()) for line in lines] == expected_lines(model, path)
    assert "2/2" in err  # the progress bar


def test_own_checkpoint_gives_the_same_model(model, tmp_path):
    from safetensors.torch import save_model

    save_model(model, str(tmp_path / "own.safetensors"))
    torch.save(to_official(model), tmp_path / "official.pth")
    for name in ("own.safetensors", "official.pth"):
        loaded = load("classify").load_model("transnext_micro", tmp_path / name, random_weights=False)
        assert all(torch.equal(value, model.state_dict()[key]) for key, value in loaded.state_dict().items())


def test_the_384_variants_see_the_whole_image():
    """Squashed to a square, not cropped: the red frame of the image stays in view."""
    example = load("classify")
    pixels = np.zeros((100, 300, 3), dtype=np.uint8)
    pixels[:20], pixels[-20:], pixels[:, :20], pixels[:, -20:] = 4 * [[255, 0, 0]]
    framed = Image.fromarray(pixels)
    views = {}
    for name in ("transnext_small.in1k_384", "transnext_small.in1k"):
        net = timm.create_model(name, device="meta")
        views[name] = example.create_transform(**example.resolve_model_data_config(net))(framed)
    squashed, cropped = views.values()
    assert squashed.shape == (3, 384, 384)
    assert cropped.shape == (3, 224, 224)
    assert (squashed[0, 192, 0] > 2, cropped[0, 112, 0] > 2) == (True, False)


def test_refuses_without_weights(photos, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(SystemExit) as exit_info:
        load("classify").main([str(photos), "--model", "transnext_micro"])
    assert exit_info.value.code == 2
    captured = capsys.readouterr()
    assert "argument --model: no weights of transnext_micro from the hub" in captured.err
    assert "--checkpoint or --random-weights" in captured.err
    assert not captured.out


def test_random_weights_say_so(photos, capsys):
    load("classify").main([str(photos / "wide.png"), "--model", "test_vit", "--random-weights"])
    captured = capsys.readouterr()
    assert "weights are random" in captured.err
    assert len(captured.out.strip().splitlines()) == 6


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["nowhere"], "argument images: no file or folder nowhere"),
        (["{photos}/notes.txt", "--model", "test_vit", "--random-weights"], "argument images: cannot read"),
        (["{photos}", "--model", "transnext_huge"], "argument --model: timm knows no model 'transnext_huge'"),
        (["{photos}", "--checkpoint", "nowhere.pth"], "argument --checkpoint: there is no file nowhere.pth"),
        (["{photos}", "--checkpoint", "{photos}/notes.txt"], "notes.txt holds no weights"),
        (["{photos}", "--checkpoint", "a", "--random-weights"], "argument --random-weights: not allowed with"),
        (["{photos}", "--batch-size", "0"], "argument --batch-size: must be at least 1"),
        (["{photos}", "--device", "abacus"], "argument --device: "),
    ],
)
def test_errors_name_the_argument(args, message, photos, capsys, monkeypatch):
    example = load("classify")
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, **kwargs: create("test_vit", **kwargs))
    with pytest.raises(SystemExit) as exit_info:
        example.main([arg.format(photos=photos) for arg in args])
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err


def test_refuses_the_checkpoint_of_another_model(model, tmp_path, capsys):
    torch.save({"model": to_official(model)}, tmp_path / "micro.pth")
    with pytest.raises(SystemExit):
        load("classify").load_model("transnext_micro_aaaa", tmp_path / "micro.pth", random_weights=False)
    assert "holds no weights of transnext_micro_aaaa" in capsys.readouterr().err
