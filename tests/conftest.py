import contextlib
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start, too

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

READS = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "_unique2"}
READS |= {"_linalg_check_errors", "linalg_inv", "linalg_matrix_exp"}
BRINGS = {"lift_fresh", "lift_fresh_copy"}  # what torch.tensor(numbers) does
COPIES = {"tolist", "numpy", "cpu", "__array__"}  # seen in Python only, where no copy is needed


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    """Two workers share the files; those that start a Ray cluster begin, one after the other."""
    clusters = ("test_sweep", "test_ray")
    longest = (clusters, "test_evaluate_command", "test_rotary_variants", "test_rotation_runs")

    def rank(item):
        places = [item.path.name.startswith(names) for names in longest]
        return places.index(True) if any(places) else len(longest)

    items.sort(key=rank)
    for item in items:
        name = item.path.name
        group = "clusters" if name.startswith(clusters) else name
        item.add_marker(pytest.mark.xdist_group(group))


class _Operations(TorchDispatchMode):
    def __init__(self, seen):
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        by_mask = name.startswith("index") and any(
            isinstance(i, torch.Tensor) and i.dtype in (torch.bool, torch.uint8)
            for argument in args
            if isinstance(argument, list | tuple)
            for i in argument
        )
        if name in READS | BRINGS or by_mask:
            self.seen.add(name)
        return function(*args, **(kwargs or {}))


class _Methods(TorchFunctionMode):
    def __init__(self, seen):
        super().__init__()
        self.seen = seen

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        if name in COPIES or (
            name == "to" and any(a == "cpu" for a in args[1:] if isinstance(a, str))
        ):
            self.seen.add(name)
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def _waits():
    seen = set()
    with _Operations(seen), _Methods(seen):
        yield seen


@pytest.fixture
def waits():
    """Notes, on a CPU, operations by which a GPU and this process would wait for each other."""
    return _waits
