import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """Bit-for-bit claims hold for a number of threads; these tests use one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
