"""The knobs of our own transformer, as a controller on a plain training loop moves them."""

import pytest
import torch

from metactl import AttachError, Controller
from metactl.adapters import find_adapters
from metactl.adapters.adaptive import ADAPTIVE_KNOBS
from metactl.controllers import RandomMoves
from models import KNOB_NAMES, AdaptiveTransformer, Noise, TransformerConfig, cross_entropy

USUAL = ["rope_base", "attention_span", "embedding_width", "dropout"]


def build(n=1, **options):
    model = AdaptiveTransformer(TransformerConfig(vocab_size=32, **options), n)
    model.initialise(list(range(n)), list(range(n)))
    return model


def found(model, names):
    return find_adapters(names, model, torch.optim.AdamW(model.parameters()))


@pytest.mark.parametrize("n", [1, 3])
def test_every_knob_is_tried_and_put_back_bit_for_bit(n):
    model = build(n, rotation="rope+free")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    adapters, missing = found(model, [*USUAL, "position_scale", "orthogonality_weight"])
    assert missing == {}
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    for adapter in adapters:
        far = adapter.far()
        adapter.write(far)
        assert adapter.read() == far
        assert model.knobs.values()[adapter.knob.name].allclose(torch.tensor(adapter.read()))
        adapter.restore()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_knob_that_moves_nothing_is_no_silent_no_op():
    _, missing = found(build(), ["rotation_strength"])
    assert missing == {"rotation_strength": "moving it does not change the model's output"}
    model = build(2)
    model.set_knobs({"dropout": [0.1, 0.2]})
    _, missing = found(model, ["dropout"])
    assert missing["dropout"].startswith("it differs among replicas")
    model.set_knobs({"dropout": 0.9})
    _, missing = found(model, ["dropout"])
    assert missing["dropout"] == "it must be in [0, 0.6], the model has 0.9"


def test_a_change_of_width_fades_in_over_ten_optimizer_steps():
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    (width,), _ = find_adapters(["embedding_width"], model, optimizer)
    width.write(0.75)
    seen = []
    for _ in range(11):
        optimizer.step()
        seen.append(round(float(model.knobs.gates[0, -1]), 3))
    assert seen == [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0, 0.0]
    width.write(0.5)
    width.close()  # nobody would fade it any further
    assert not model.knobs.gates_moving


def test_gates_that_somebody_else_moves_are_left_alone():
    """As in shadow mode, where only the owner of the run changes its width."""
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    model.set_knobs({"embedding_width": 0.5})
    (width,), missing = find_adapters(["embedding_width"], model, optimizer)
    assert missing == {}
    assert model.knobs.gates[0].tolist() == [1, 1, 1, 1]
    optimizer.step()
    assert model.knobs.gates[0].tolist() == [1, 1, 1, 1]
    width.close()
    assert model.knobs.gates_moving


def train(mode, steps=24, stop=None, state=None):
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    controller = Controller(RandomMoves(seed=5), n_control_steps=8)
    if mode is not None:
        controller.attach(model, optimizer, total_steps=24, knobs=USUAL, mode=mode)
    start = 0
    if state is not None:
        start = state["step"]
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        controller.load_state_dict(state["controller"])
    losses, decisions = [], []
    for i in range(start, steps):
        tokens = torch.randint(0, 32, (1, 4, 17), generator=torch.Generator().manual_seed(i))
        noise = Noise(torch.tensor([3]), torch.tensor([i]))
        loss = cross_entropy(model(tokens[..., :-1], noise), tokens[..., 1:]).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        decision = controller.step(loss=loss) if mode is not None else None
        if decision is not None:
            decisions.append(decision.values)
        if i + 1 == stop:
            parts = {"model": model, "optimizer": optimizer, "controller": controller}
            saved = {name: part.state_dict() for name, part in parts.items()}
            return losses, decisions, {"step": stop} | saved
    return losses, decisions, model


def test_shadow_and_off_change_nothing_and_act_moves_all_four():
    alone = train(None)[0]
    assert train("shadow")[0] == alone
    assert train("off")[0] == alone
    losses, decisions, model = train("act")
    assert losses != alone
    assert set(decisions[-1]) == set(USUAL)
    for name, value in decisions[-1].items():
        assert float(model.knobs.values()[name][0]) == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize("stop", [5, 9, 16])
def test_resuming_is_bit_identical(stop, tmp_path):
    losses, decisions, _ = train("act")
    first, early, state = train("act", stop=stop)
    torch.save(state, tmp_path / "state.pt")
    again = torch.load(tmp_path / "state.pt", weights_only=True)
    second, late, _ = train("act", state=again)
    assert first + second == losses
    assert early + late == decisions


def test_a_model_that_has_no_width_is_refused_in_words_or_goes_without():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout(0.1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options = {"knobs": ["embedding_width", "dropout"], "example": torch.ones(1, 2)}
    controller = Controller(RandomMoves(seed=0))
    with pytest.raises(AttachError, match="embedding_width: no way to move it in this model"):
        controller.attach(model, optimizer, **options)
    controller.attach(model, optimizer, on_unsupported="mask", **options)
    assert list(controller.state_dict()["knobs"]) == ["dropout"]


def test_the_adapters_know_the_knobs_that_the_model_has():
    assert ADAPTIVE_KNOBS == KNOB_NAMES == tuple(TransformerConfig().knob_ranges())
