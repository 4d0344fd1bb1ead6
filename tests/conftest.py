import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("quick", max_examples=30, deadline=None)
hypothesis.settings.load_profile("quick")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
