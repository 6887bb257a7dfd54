"""segmentation_models_pytorch finds the variants as `tu-...` encoders."""

import pytest
import timm
import torch

import foveal  # noqa: F401  registers the variants

smp = pytest.importorskip("segmentation_models_pytorch")

SHALLOW = {"depths": (1, 1, 1, 1)}


@pytest.fixture(params=["Unet", "UPerNet"])
def net(request):
    kind = getattr(smp, request.param)
    return kind("tu-transnext_micro", encoder_weights=None, classes=5, **SHALLOW)


def test_tiny_by_its_name():
    net = smp.Unet("tu-transnext_tiny", encoder_weights=None, classes=2, **SHALLOW).eval()
    assert net.encoder.out_channels == [3, 0, 72, 144, 288, 576]
    with torch.no_grad():
        assert net(torch.randn(1, 3, 64, 96)).shape == (1, 2, 64, 96)


def test_encoder_gives_the_models_maps(net):
    features = timm.create_model("transnext_micro", features_only=True, **SHALLOW).eval()
    features.load_state_dict(net.eval().encoder.model.state_dict())
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        assert torch.equal(net.encoder(x)[0], x)
        for actual, expected in zip(net.encoder(x)[-4:], features(x), strict=True):
            assert torch.equal(actual, expected)


def test_one_training_step(net):
    """Every parameter gets a gradient, and a small step along it lowers the loss."""
    images, labels = torch.randn(2, 3, 64, 96), torch.randint(0, 5, (2, 64, 96))
    loss_fn = torch.nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    net.train()
    before = loss_fn(net(images), labels)
    before.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.encoder.parameters() if p.requires_grad)
    optimizer.step()
    assert loss_fn(net(images), labels) < before


@pytest.mark.parametrize("size", [(65, 97), (100, 75)])
def test_odd_sizes(size):
    """Unet takes images of any size; UPerNet asks for multiples of 32 itself, whatever the encoder."""
    net = smp.Unet("tu-transnext_micro", encoder_weights=None, classes=5, **SHALLOW).eval()
    padded = smp.UPerNet("tu-transnext_micro", encoder_weights=None, classes=5, **SHALLOW).eval()
    x = torch.randn(1, 3, *size)
    with torch.no_grad():
        assert net(x).shape == (1, 5, *size)
        with pytest.raises(RuntimeError, match="divisible by 32"):
            padded(x)
