"""What timm's train.py and validate.py are made of, with a variant of foveal's, and the line that starts them.

The scripts themselves are in timm's repository, not in its distributions.
"""

import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_dataset, create_loader, resolve_data_config
from timm.models import load_checkpoint
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import AverageMeter, CheckpointSaver, ModelEmaV3, accuracy

PAGE = Path(__file__).parents[2] / "docs" / "clients.md"
SHALLOW = {"depths": (1, 1, 1, 1), "num_classes": 2}


@pytest.fixture
def images(tmp_path):
    noise = np.random.default_rng(0)
    for name, level in (("dark", 60), ("light", 200)):
        folder = tmp_path / "data" / "val" / name
        folder.mkdir(parents=True)
        for i in range(4):
            pixels = noise.integers(level - 50, level + 50, (40, 50, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.png")
    return tmp_path / "data"


def test_the_documented_line_imports_foveal_first(tmp_path):
    line = re.search(r'python -c "(import foveal, runpy.*?)"', PAGE.read_text())[1]
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, timm\n"
        "if __name__ == '__main__':\n"
        "    model = timm.create_model(sys.argv[1], device='meta')\n"
        "    print(sys.argv[1:], sum(p.numel() for p in model.parameters()))\n"
    )
    command = [sys.executable, "-c", line, str(script), "transnext_micro", "--more"]
    out = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300).stdout
    assert out == "['transnext_micro', '--more'] 12809304\n"


def test_train_and_validate(images, tmp_path):
    model = timm.create_model("transnext_micro", **SHALLOW)
    config = resolve_data_config({"input_size": (3, 32, 32)}, model=model)
    dataset = create_dataset("", root=images, split="val")
    load = {"input_size": config["input_size"], "batch_size": 4, "num_workers": 0, "device": torch.device("cpu")}
    optimizer = create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.9)
    scheduler, epochs = create_scheduler_v2(optimizer, "cosine", num_epochs=2)
    average = ModelEmaV3(model, decay=0.5)
    args = Namespace(model="transnext_micro")
    saver = CheckpointSaver(model, optimizer, args=args, model_ema=average, checkpoint_dir=str(tmp_path))
    losses = []
    for epoch in range(epochs):
        for batch, labels in create_loader(dataset, is_training=True, no_aug=True, **load):
            loss = torch.nn.functional.cross_entropy(model(batch), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            average.update(model)
            losses.append(loss.item())
        scheduler.step(epoch + 1)
        saver.save_checkpoint(epoch, metric=-losses[-1])
    assert np.mean(losses[-2:]) < np.mean(losses[:2])

    validated = timm.create_model("transnext_micro", **SHALLOW).eval()
    load_checkpoint(validated, str(tmp_path / "last.pth.tar"), use_ema=False)
    for name, value in model.state_dict().items():
        assert torch.equal(validated.state_dict()[name], value), name
    top1 = AverageMeter()
    hits = 0
    with torch.no_grad():
        for batch, labels in create_loader(dataset, **load):
            top1.update(accuracy(validated(batch), labels, topk=(1,))[0].item(), len(batch))
            hits += (model.eval()(batch).argmax(1) == labels).sum().item()
    assert top1.count == 8
    assert top1.avg == pytest.approx(100 * hits / 8)
