"""A training loop through accelerate, with mixed precision, gradient accumulation and a checkpoint."""

import copy

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from foveal.models import transnext
from tests.helpers import assert_near

accelerate = pytest.importorskip("accelerate")


def small():
    return transnext((12, 24), (1, 1), (1, 2), (4, 4), (4, None), pretrain_size=32, num_classes=4)


@pytest.fixture(autouse=True)
def _no_accelerator_left():
    """An Accelerator's settings outlive it, for the whole process."""
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def data():
    return TensorDataset(torch.randn(16, 3, 32, 40), torch.randint(0, 4, (16,)))


def fit(net, data, accelerator):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    net, optimizer, loader = accelerator.prepare(net, optimizer, DataLoader(data, batch_size=4))
    losses = []
    for _ in range(3):
        for images, labels in loader:
            with accelerator.accumulate(net):
                loss = torch.nn.functional.cross_entropy(net(images), labels)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.item())
    return net, losses


def test_equals_the_plain_loop(data):
    net = small()
    plain = copy.deepcopy(net)
    _, losses = fit(net, data, accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2))
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    expected = []
    for _ in range(3):
        for i, (images, labels) in enumerate(DataLoader(data, batch_size=4)):
            loss = torch.nn.functional.cross_entropy(plain(images), labels)
            (loss / 2).backward()
            expected.append(loss.item())
            if i % 2:
                optimizer.step()
                optimizer.zero_grad()
    assert_near(torch.tensor(losses), torch.tensor(expected), tol=1e-6)


def test_bfloat16_and_a_checkpoint(data, tmp_path):
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    net, losses = fit(small(), data, accelerator)
    assert sum(losses[-4:]) < sum(losses[:4])  # an epoch each
    accelerator.save_model(net, tmp_path)
    loaded = small()
    accelerate.load_checkpoint_in_model(loaded, str(tmp_path))
    images = data.tensors[0]
    with torch.no_grad():
        assert torch.equal(loaded.eval()(images), accelerator.unwrap_model(net, keep_fp32_wrapper=False).eval()(images))


def test_empty_weights_then_a_checkpoint(tmp_path):
    with accelerate.init_empty_weights():
        net = small()
    assert {p.device.type for p in net.parameters()} == {"meta"}
    full, x = small().eval(), torch.randn(2, 3, 32, 40)
    torch.save(full.state_dict(), tmp_path / "net.pt")
    net = accelerate.load_checkpoint_and_dispatch(net.eval(), str(tmp_path / "net.pt"), device_map={"": "cpu"})
    with torch.no_grad():
        assert_near(net(x), full(x), tol=1e-6)


def test_weights_that_are_there_only_while_a_layer_is_called():
    net, x = small().eval(), torch.randn(2, 3, 32, 40)
    with torch.no_grad():
        expected = net(x)
        state = {name: value.clone() for name, value in net.state_dict().items()}
        accelerate.cpu_offload(net, execution_device="cpu", state_dict=state)
        assert "meta" in {p.device.type for p in net.parameters()}
        assert_near(net(x), expected, tol=1e-6)
        assert "meta" in {p.device.type for p in net.parameters()}
