import pytest
import torch
from toys import fingerprint, images, masked, relative, toy

import tp_amp
from tp_amp.cutting import narrowed


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_narrowed_equals_masked_dense_and_gives_the_parameters_back(
    gated: bool, bias: bool
) -> None:
    model = toy(gated=gated, bias=bias)
    mlp = tp_amp.find_mlps(model, images(1))[1]
    keep = [2, 3, 11]
    expected = masked(model, {mlp.down: keep})(images())
    before = fingerprint(model)
    with narrowed(model, mlp, keep):
        assert relative(model(images()), expected) < 1e-5
        assert model.get_submodule(mlp.down).in_features == 3
        assert all(model.get_submodule(up).out_features == 3 for up in mlp.up)
    assert fingerprint(model) == before


def test_narrowed_gives_back_after_an_error() -> None:
    model = toy()
    mlp = tp_amp.find_mlps(model, images(1))[0]
    before = fingerprint(model)

    def fails() -> None:
        with narrowed(model, mlp, [0]):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fails()
    with pytest.raises(IndexError), narrowed(model, mlp, [99]):
        pass
    assert fingerprint(model) == before


def test_optimizer_state_survives_a_probe() -> None:
    model = toy()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    mlp = tp_amp.find_mlps(model, images(1))[0]
    with narrowed(model, mlp, [0]):
        pass
    assert optimizer.param_groups[0]["params"][0] is next(model.parameters())
