"""Training of the stand-ins: the mathematics of its losses, determinism, and that the encoder learned without labels."""

import inspect
import math

import pytest
import torch

from vavae_fast.errors import BadInput
from vavae_fast.training.standins import (
    EncoderRecipe,
    affine,
    contrastive_loss,
    jitter,
    random_encoder,
    train_encoder,
    train_perceptual,
    train_supervised_encoder,
)

CLASSES = 4


def shapes(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(count, 3, 16, 16) uint8 and labels: a bar across, a bar down, a cross or a frame, anywhere, of any length and brightness."""
    g = torch.Generator().manual_seed(seed)
    images, labels = torch.zeros(count, 3, 16, 16), torch.arange(count) % CLASSES
    for image, label in zip(images, labels):
        r, c = (torch.randint(4, 13, (2,), generator=g)).tolist()
        n = int(torch.randint(3, 6, (1,), generator=g))
        rows, columns = slice(r - n, r + n), slice(c - n, c + n)
        if label in (0, 2):
            image[:, r - 1 : r + 1, columns] = 1
        if label in (1, 2):
            image[:, rows, c - 1 : c + 1] = 1
        if label == 3:
            image[:, rows, columns] = 1
            image[:, r - n + 2 : r + n - 2, c - n + 2 : c + n - 2] = 0
        image *= 0.6 + 0.4 * torch.rand((), generator=g)
    return (images * 255).to(torch.uint8), labels


def partners_found(encoder) -> float:
    """Share of held-out shapes whose nearest neighbour among the moved copies of all, by the mean feature, is their own copy."""
    images = shapes(128, 2)[0].float() / 127.5 - 1
    moved = affine(images, torch.Generator().manual_seed(3))
    distance = torch.cdist(encoder(images).mean((2, 3)), encoder(moved).mean((2, 3)))
    return (distance.argmin(1) == torch.arange(128)).float().mean().item()


def test_encoder_learns_without_labels():
    """It knows a shape again that has been moved, turned and scaled: what SimCLR asks for, on images it has not seen."""
    x, _ = shapes(256, 1)
    trained, untrained = partners_found(train_encoder(x, seed=0, steps=60, batch=32)), partners_found(random_encoder(x, seed=0))
    assert trained > 1.5 * untrained and trained > 10 / 128, (trained, untrained)
    assert "labels" not in inspect.signature(train_encoder).parameters


@pytest.mark.slow  # 250 steps on the real digits: about 10 s on one thread
def test_encoder_learns_the_digits():
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    x = torch.from_numpy(digits.images * (255 / 16)).round().to(torch.uint8).repeat_interleave(2, 1).repeat_interleave(2, 2)
    x, y = x[:, None].expand(-1, 3, -1, -1), torch.from_numpy(digits.target)
    train, held = slice(0, 1437), slice(1437, None)

    def accuracy(encoder):
        features = encoder(x.float() / 127.5 - 1).mean((2, 3))
        return (y[train][torch.cdist(features[held], features[train]).argmin(1)] == y[held]).float().mean().item()

    trained, untrained = accuracy(train_encoder(x[train], seed=0)), accuracy(random_encoder(x[train], seed=0))
    assert trained > untrained + 0.15 and trained > 0.8, (trained, untrained)


def test_perceptual_network_classifies_held_out_shapes():
    network = train_perceptual(*shapes(256, 1), seed=0, steps=150, batch=32)
    x, y = shapes(128, 2)
    assert network.logits(x.float() / 127.5 - 1).argmax(1).eq(y).float().mean() > 0.85
    assert not any(p.requires_grad for p in network.parameters())


def test_results_depend_on_the_seed_alone_and_leave_the_global_one():
    x, y = shapes(32, 1)

    def all_three(seed):
        networks = train_encoder(x, seed, 3, 16), random_encoder(x, seed), train_perceptual(x, y, seed, 3, 16)
        return torch.cat([value.flatten() for network in networks for value in network.state_dict().values()])

    state = torch.get_rng_state()
    first = all_three(5)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert torch.equal(all_three(5), first)
    assert not torch.equal(all_three(6), first)


def test_random_encoder_is_where_training_starts():
    x, _ = shapes(32, 1)
    control, start = random_encoder(x, 3).state_dict(), train_encoder(x, 3, steps=0, batch=16).state_dict()
    assert all(torch.equal(value, start[name]) for name, value in control.items())


def test_progress_hears_every_step():
    x, y = shapes(16, 1)
    heard = []
    train_encoder(x, 0, 4, 8, progress=lambda step, steps, loss: heard.append((step, steps, loss.isfinite().item())))
    train_perceptual(x, y, 0, 2, 8, progress=lambda step, steps, loss: heard.append((step, steps, loss.isfinite().item())))
    assert heard == [(n, 4, True) for n in (1, 2, 3, 4)] + [(n, 2, True) for n in (1, 2)]


def test_contrastive_loss_knows_its_limits():
    """Partners alike and all others opposite: near 0. All alike: log of the number of candidates."""
    one = torch.ones(4, 8)
    assert contrastive_loss(one).item() == pytest.approx(math.log(3), abs=1e-5)
    apart = torch.tensor([[1.0, 0], [-1, 0]]).repeat(2, 1)
    assert contrastive_loss(apart).item() == pytest.approx(math.log(1 + 2 * math.exp(-2 / 0.2)), abs=1e-6)


def test_augmentations_keep_shape_and_are_drawn_from_the_generator():
    x = torch.rand(4, 3, 16, 16) * 2 - 1
    for augment in (affine, jitter):
        one, same, other = (augment(x, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
        assert one.shape == x.shape and torch.equal(one, same) and not torch.equal(one, other)
    still = affine(x, torch.Generator().manual_seed(0), angle=0, scale=0, shift=0)
    torch.testing.assert_close(still, x, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "images, culprit",
    [(torch.zeros(64, 3, 16, 16), "uint8"), (torch.zeros(64, 1, 16, 16, dtype=torch.uint8), "images"), (shapes(8, 0)[0], "batch")],
)
def test_wrong_images_are_named(images, culprit):
    with pytest.raises(BadInput, match=culprit):
        train_encoder(images, 0, steps=1, batch=16)
    with pytest.raises(BadInput, match=culprit):
        train_perceptual(images, torch.zeros(len(images), dtype=torch.int64), 0, steps=1, batch=16)


def test_recipes_shape_the_encoder_and_choose_its_tasks():
    x, _ = shapes(16, 0)
    deep = EncoderRecipe(patch_size=8, dim=32, depth=1, heads=2, tasks=("patches",))
    encoder = train_encoder(x, 0, 1, 8, recipe=deep)
    assert encoder.arguments | {"patch_size": 8, "dim": 32, "depth": 1, "heads": 2} == encoder.arguments
    states = [train_encoder(x, 0, 2, 8, recipe=EncoderRecipe(tasks=tasks)).state_dict() for tasks in (("views",), ("patches",), ("views", "patches"))]
    assert not any(torch.equal(states[i]["patch.weight"], states[j]["patch.weight"]) for i, j in ((0, 1), (0, 2), (1, 2)))
    with pytest.raises(BadInput, match="tasks"):
        EncoderRecipe(tasks=("labels",))


def test_supervised_encoder_learns_its_labels():
    """By the nearest class mean of its mean feature, better than the untrained one."""
    (x, y), (held, held_labels) = shapes(256, 1), shapes(128, 2)

    def accuracy(encoder):
        seen, new = (encoder(images.float() / 127.5 - 1).mean((2, 3)) for images in (x, held))
        means = torch.stack([seen[y == c].mean(0) for c in range(CLASSES)])
        return (torch.cdist(new, means).argmin(1) == held_labels).float().mean().item()

    trained, untrained = accuracy(train_supervised_encoder(x, y, 0, steps=60, batch=32)), accuracy(random_encoder(x, seed=0))
    assert trained > untrained + 0.1, (trained, untrained)


def test_one_label_an_image():
    with pytest.raises(BadInput, match="labels"):
        train_supervised_encoder(shapes(16, 0)[0], torch.zeros(4, dtype=torch.int64), 0, steps=1, batch=8)
    with pytest.raises(BadInput, match="labels"):
        train_perceptual(shapes(16, 0)[0], torch.zeros(4, dtype=torch.int64), 0, steps=1, batch=8)
