"""MFU: the formula, and the devices it knows."""

import pytest
import torch

from train.config import ModelConfig
from train.model import GPT2
from train.utilisation import flops_per_token, parameters, peak_of_name, peak_tflops, utilisation


def test_flops_are_those_of_the_formula():
    config = ModelConfig(layers=3, width=64, heads=2)
    with torch.device("meta"):
        model = GPT2(config, 1000, 32)
    count = parameters(config, 1000)
    assert count == sum(p.numel() for name, p in model.named_parameters() if name != "positions.weight")
    assert flops_per_token(config, count, 128) == 6 * count + 12 * 3 * 64 * 128


def test_published_utilisation_of_gpt2_124m_on_an_h100():
    config = ModelConfig(preset="gpt2-124m")
    flops = flops_per_token(config, 123_700_000, 1024)
    assert utilisation(462_000, flops, 989.0) == pytest.approx(0.40, abs=0.01)
    assert utilisation(8 * 462_000, flops, 989.0, devices=8) == pytest.approx(0.40, abs=0.01)


def test_devices_are_known_by_their_names():
    assert peak_of_name("NVIDIA H200") == 989.0
    assert peak_of_name("NVIDIA H200 NVL") == 835.0
    assert peak_of_name("NVIDIA H100 80GB HBM3") == 989.0
    assert peak_of_name("NVIDIA H100 PCIe") == 756.0
    assert peak_of_name("NVIDIA A100-SXM4-40GB") == 312.0
    assert peak_of_name("NVIDIA GeForce RTX 4090") == 165.0
    assert peak_of_name("Some A1000 of tomorrow") is None
    assert peak_tflops(torch.device("cpu")) is None
    assert utilisation(1000.0, 10**9, None) is None
