"""Looking at a model as it will be used leaves no trace in it."""

import pytest
import torch
from torch import nn

from vavae_fast.training.averaged import averaged_weights, evaluating
from vavae_fast.training.optimizer import trainable
from vavae_kernels import AdamWEMA


def trained():
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2))
    optimizer = AdamWEMA(trainable(model).items(), lr=0.1, ema_decay=0.5)
    for _ in range(3):
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
    return model, optimizer


def test_inside_the_weights_are_the_average_and_outside_their_own_bits():
    model, optimizer = trained()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    average = {name: value.clone() for name, value in optimizer.ema_state_dict().items()}
    places = [p.data_ptr() for p in model.parameters()]
    with averaged_weights(model, optimizer.ema_state_dict()):
        assert all(torch.equal(p, average[name]) and not torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(torch.equal(value, average[name]) for name, value in optimizer.ema_state_dict().items())
    assert [p.data_ptr() for p in model.parameters()] == places, "a compiled or captured model reads the same memory"


def test_an_average_in_bf16_will_do():
    model, optimizer = trained()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with averaged_weights(model, {name: value.bfloat16() for name, value in optimizer.ema_state_dict().items()}):
        pass
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_an_error_inside_leaves_the_model_as_it_was():
    model, optimizer = trained()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(KeyError), evaluating(model), averaged_weights(model, optimizer.ema_state_dict()):
        raise KeyError
    assert model.training and model[1].training
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_evaluating_is_without_dropout_and_gradients():
    model, _ = trained()
    with evaluating(model):
        out = model(torch.ones(1, 3))
        assert not model[1].training and not out.requires_grad and torch.equal(out, model(torch.ones(1, 3)))
    assert model[1].training
