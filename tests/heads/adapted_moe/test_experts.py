import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from builders import InMemory
from normweave.config import (
    DiscriminatorExpertConfig,
    GaussianExpertConfig,
    LayoutExpertConfig,
    MemoryExpertConfig,
    SubspaceExpertConfig,
    TrainingConfig,
)
from normweave.heads.adapted_moe.experts.base import Normals, products
from normweave.heads.adapted_moe.experts.discriminator import DiscriminatorExperts, DiscriminatorStage
from normweave.heads.adapted_moe.experts.gaussian import GaussianExperts
from normweave.heads.adapted_moe.experts.layout import LayoutExperts
from normweave.heads.adapted_moe.experts.memory import MemoryExperts
from normweave.heads.adapted_moe.experts.subspace import SubspaceExperts

D, H, W, K = 4, 6, 5, 3
DISCRIMINATORS = DiscriminatorExpertConfig(
    hidden=7, patches=50, training=TrainingConfig(epochs=3, batch_images=4, learning_rate=1e-3)
)
ASKED = torch.tensor([[2, 0], [1, 2]])


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def normals(*, count=12, seed=0, each_group=1):
    """Images of K subclasses that differ in mean and std."""
    experts = np.arange(count) % K
    kind = random(K, D, 1, 1, seed=1)
    features = (
        random(count, D, H, W, seed=seed) * (1 + torch.from_numpy(experts)[:, None, None, None]) + 2 * kind[experts]
    )
    return Normals(
        InMemory(features.float()),
        np.arange(count),
        experts,
        np.arange(count) // (K * each_group) * K + experts,
    )


def fitted(experts, data=None):
    experts.fit(data or normals(), generator=torch.Generator().manual_seed(0))
    return experts


def own_patches(data, expert):
    return data.source.features[data.experts == expert].permute(0, 2, 3, 1).reshape(-1, D).double().numpy()


def new(kind):
    match kind:
        case "discriminator":
            experts = DiscriminatorExperts(DISCRIMINATORS, shape=(D, H, W))
            experts.start(experts=K, generator=torch.Generator().manual_seed(0))
            experts.running_mean = random(K, 7, seed=5)
            experts.running_variance = random(K, 7, seed=6).exp()
            return experts
        case "memory":
            return fitted(
                MemoryExperts(
                    MemoryExpertConfig(shared=False, max_patches=20, max_pool=60, dimensions=0, calibrated=True),
                    shape=(D, H, W),
                )
            )
        case "gaussian":
            return fitted(GaussianExperts(GaussianExpertConfig(fine=0.75), shape=(D, H, W)))
        case "subspace":
            return fitted(SubspaceExperts(SubspaceExpertConfig(cells=3, variance=0.8, max_images=9), shape=(D, H, W)))
        case "layout":
            return fitted(
                LayoutExperts(
                    LayoutExpertConfig(fine=0.5, cells=3, variance=0.8, components=3, own=0.5, max_images=12),
                    shape=(D, H, W),
                )
            )


KINDS = ["discriminator", "memory", "gaussian", "subspace", "layout"]


@pytest.mark.parametrize("shared", [True, False])
def test_one_product_for_all_experts_is_that_of_each(shared):
    features = random(2, 1 if shared else 2, D, H, W)
    weights, offset = random(2, 2, 7, D, seed=1), random(2, 2, 7, seed=2)

    got = products(features, weights, offset)

    for b in range(2):
        for t in range(2):
            patches = features[b, 0 if shared else t].flatten(1)  # (D, P)
            torch.testing.assert_close(got[b, t], weights[b, t] @ patches + offset[b, t][:, None])


@pytest.mark.parametrize("kind", KINDS)
def test_scores_of_an_expert_do_not_depend_on_other_experts(kind):
    """The scores of an expert do not depend on the other experts of the call, their order, or shared features."""
    experts = new(kind)
    features = random(2, 2, D, H, W, seed=3)

    together = experts(features, ASKED)
    shared = experts(features[:, :1], ASKED)

    assert together.shape == (2, 2, 2 if kind == "layout" else 1, H, W)
    for b in range(2):
        for t in range(2):
            alone = experts(features[b, t][None, None], ASKED[b, t][None, None])
            torch.testing.assert_close(together[b, t], alone[0, 0], rtol=1e-3, atol=1e-4)
            alone = experts(features[b, 0][None, None], ASKED[b, t][None, None])
            torch.testing.assert_close(shared[b, t], alone[0, 0], rtol=1e-3, atol=1e-4)


def test_discriminator_by_hand():
    experts = new("discriminator")
    features = random(1, 1, D, H, W, seed=3)

    score = experts(features, torch.tensor([[1]]))[0, 0, 0]

    def parameter(name):
        return getattr(experts, name)[1].detach().double().numpy()

    for row in range(H):
        for column in range(W):
            x = features[0, 0, :, row, column].double().numpy()
            total = 0.0
            for unit in range(7):
                hidden = parameter("weight")[unit] @ x + parameter("bias")[unit]
                hidden = (hidden - parameter("running_mean")[unit]) / math.sqrt(
                    parameter("running_variance")[unit] + 1e-5
                )
                hidden = hidden * parameter("gain")[unit] + parameter("shift")[unit]
                total += parameter("readout")[unit] * (hidden if hidden > 0 else 0.2 * hidden)
            assert score[row, column].item() == pytest.approx(-total, rel=1e-3, abs=1e-4)


def test_discriminators_score_without_noise():
    experts = new("discriminator")
    features = random(2, 1, D, H, W, seed=3)

    torch.manual_seed(0)
    one = experts(features, ASKED)
    torch.manual_seed(1)
    assert torch.equal(one, experts(features, ASKED))
    # Scoring is what validation sees of normal patches.
    seen = experts.discriminate(features[:, 0].flatten(2).transpose(1, 2), torch.tensor([2, 1]), training=False)
    torch.testing.assert_close(-one[:, 0, 0].flatten(1), seen, rtol=1e-4, atol=1e-5)


def stage(experts):
    return DiscriminatorStage(
        experts,
        assign=lambda features, given: given,
        adapt=lambda features, own: features,
    )


def test_batch_norm_is_each_expert_own_and_moves_in_training_only():
    experts = new("discriminator")
    patches = random(2, 9, D, seed=3) + 3
    before = experts.running_mean.clone(), experts.running_variance.clone()

    experts.discriminate(patches, torch.tensor([0, 2]), training=False)
    assert torch.equal(experts.running_mean, before[0])

    got = experts.discriminate(patches, torch.tensor([0, 2]), training=True)
    for place, expert in enumerate((0, 2)):
        norm = torch.nn.BatchNorm1d(7, momentum=0.1)
        hidden = patches[place] @ experts.weight[expert].T + experts.bias[expert]
        expected = F.leaky_relu(norm(hidden), 0.2) @ experts.readout[expert]
        torch.testing.assert_close(got[place], expected, rtol=1e-3, atol=1e-4)
        moved = before[0][expert] * 0.9 + 0.1 * hidden.mean(0)
        torch.testing.assert_close(experts.running_mean[expert], moved.detach(), rtol=1e-3, atol=1e-4)
    assert torch.equal(experts.running_mean[1], before[0][1])
    assert torch.equal(experts.running_variance[1], before[1][1])


def test_hinge_loss_by_hand():
    """mean max(0, m - D(x)) + mean max(0, m + D(x + e)) over the very patches that were drawn."""
    experts = new("discriminator")
    few = random(2, D, H, W, seed=3)
    seen = []
    discriminate = experts.discriminate

    def listen(patches, asked, *, training):
        seen.append((patches, asked))
        return discriminate(patches, asked, training=training)

    experts.discriminate = listen
    loss = stage(experts).loss(few, torch.tensor([2, 0]), generator=torch.Generator().manual_seed(0), training=False)

    ((both, asked),) = seen
    assert asked.tolist() == [0, 2]
    total = 0.0
    for place, expert in enumerate((0, 2)):
        own = few[1 - place].flatten(1).T  # the image of this expert
        x, noised = both[place, :50], both[place, 50:]
        assert all((own == patch).all(dim=1).any() for patch in x)
        assert (noised - x).std().item() == pytest.approx(0.5, rel=0.2)
        D_x = discriminate(x[None], torch.tensor([expert]), training=False)[0].tolist()
        D_e = discriminate(noised[None], torch.tensor([expert]), training=False)[0].tolist()
        total += sum(max(0, 0.5 - d) for d in D_x) / 50 + sum(max(0, 0.5 + d) for d in D_e) / 50
    assert loss["loss"].item() == pytest.approx(total / 2, rel=1e-4)


def test_gradient_reaches_the_discriminators_that_have_images():
    experts = new("discriminator")

    loss = stage(experts).loss(random(2, D, H, W), torch.tensor([0, 2]), generator=torch.Generator(), training=True)
    loss["loss"].backward()

    for name, parameter in experts.named_parameters():
        assert parameter.grad[[0, 2]].abs().sum() > 0, name
        assert parameter.grad[1].abs().sum() == 0, name


def memories(data=None, **changed):
    """Memory experts of every channel, fitted."""
    config = MemoryExpertConfig(**{"max_patches": 20, "max_pool": 60, "dimensions": 0} | changed)
    return fitted(MemoryExperts(config, shape=(D, H, W)), normals() if data is None else data)


def distances(features, bank):
    """Distances of all patches of (D, H, W) to the stored ones, (P, M)."""
    return (features.flatten(1).T[:, None] - bank[None]).square().sum(2).sqrt()


@pytest.mark.parametrize("max_patches", [20, 40], ids=["60 stored", "120 stored, three whole blocks"])
def test_memories_agree_with_brute_force(monkeypatch, max_patches):
    monkeypatch.setattr("normweave.nearest.PATCHES", 5)
    experts = memories(shared=False, max_patches=max_patches)
    assert len(experts.bank) == 3 * max_patches
    features = random(2, 1, D, H, W, seed=2)

    scores = experts(features, ASKED)

    for b in range(2):
        for t in range(2):
            held = experts.bank[experts.owner == ASKED[b, t]]
            torch.testing.assert_close(scores[b, t].flatten(), distances(features[b, 0], held).amin(1))


def test_united_memories_score_by_the_patches_of_all_allowed_experts(monkeypatch):
    monkeypatch.setattr("normweave.nearest.PATCHES", 12)
    experts = memories()
    features = random(2, D, H, W, seed=2)
    allowed = torch.tensor([[True, False, True], [False, True, False]])

    every, some = experts.score_united(features, None)[0], experts.score_united(features, allowed)[0]

    assert experts.united
    for b in range(2):
        torch.testing.assert_close(every[b].flatten(), distances(features[b], experts.bank).amin(1))
        held = experts.bank[allowed[b][experts.owner]]
        torch.testing.assert_close(some[b].flatten(), distances(features[b], held).amin(1))


def test_a_united_memory_refers_to_the_place_of_the_nearest_patch():
    data = normals()
    experts = memories(data)
    for patch, (row, y, x) in zip(experts.bank, experts.origins, strict=True):
        assert torch.equal(patch, data.source.read([row])[0, :, y, x])
    row, y, x = experts.origins[7]
    _, nearest = experts.score_united(data.source.read([row]), None)
    assert (nearest.shape, nearest[0, y, x]) == ((1, H, W), 7)
    assert memories(data, shared=False).origins is None


def test_the_distance_to_a_stored_patch_is_exactly_zero():
    experts = memories()
    experts.bank *= 100

    scores = experts.score_united(experts.bank[:6].T.reshape(1, D, 6, 1), None)[0]

    assert scores.max() == 0


def test_memory_banks_hold_patches_of_their_own_subclass_up_to_the_limit():
    data = normals()
    experts = memories(data, shared=False)

    assert experts.owner.bincount().tolist() == [20] * K
    for expert in range(K):
        own = torch.from_numpy(own_patches(data, expert)).float()
        assert all((own == patch).all(dim=1).any() for patch in experts.bank[experts.owner == expert])


def test_a_shared_memory_bank_has_one_limit_and_patches_of_every_subclass():
    assert memories().owner.bincount().sum() == 20
    assert (memories().owner.bincount(minlength=K) > 0).all()


def test_principal_components_keep_the_largest_distances():
    """Patches that differ in two directions only have the same distances in two components."""
    data = normals()
    plane = data.source.features.permute(0, 2, 3, 1) @ random(D, 2, seed=7) @ random(2, D, seed=8)
    flat = Normals(InMemory(plane.permute(0, 3, 1, 2)), data.rows, data.experts, data.groups)
    features = plane[:2].permute(0, 3, 1, 2) * 1.5

    two, all_channels = memories(flat, dimensions=2), memories(flat)

    assert two.bank.shape == (20, 2)
    expected = distances(features[0], two.bank @ two.components.T).amin(1)
    torch.testing.assert_close(two.score_united(features, None)[0][0].flatten(), expected, rtol=1e-3, atol=1e-3)
    assert all_channels.bank.shape == (20, D)


@pytest.mark.parametrize("max_pool", [2, 7])
def test_memories_of_few_patches_of_many_images(max_pool):
    experts = memories(normals(count=30), shared=False, max_pool=max_pool, calibrated=True)

    assert experts.owner.bincount().max() <= max_pool
    assert torch.isfinite(experts(random(2, 1, D, H, W), ASKED)).all()


def test_what_is_usual_around_a_stored_patch_by_hand():
    """mu(m): mean distance of patches of other groups that have m as nearest, 3 pseudo-counts, 10 neighbours."""
    data = normals(count=12, each_group=2)
    experts = memories(data, max_patches=25, max_pool=10_000, calibrated=True)

    bank = experts.bank.double().numpy()
    images = data.source.features.permute(0, 2, 3, 1).double().numpy()
    owner = [next(i for i, image in enumerate(images) if (image == m).all(axis=2).any()) for m in bank]
    groups = [data.groups[image] for image in owner]
    found = [[] for _ in bank]
    for image, group in zip(images, data.groups, strict=True):
        for patch in image.reshape(-1, D):
            gaps = [np.linalg.norm(patch - m) if g != group else np.inf for m, g in zip(bank, groups, strict=True)]
            found[int(np.argmin(gaps))].append(min(gaps))
    overall = np.mean([d for each in found for d in each])
    shrunk = np.array([(sum(each) + 3 * overall) / (len(each) + 3) for each in found])
    for place, m in enumerate(bank):
        near = np.argsort([np.linalg.norm(m - other) for other in bank])[:10]
        assert experts.usual[place].item() == pytest.approx(shrunk[near].mean(), rel=1e-4)


def test_calibration_divides_by_what_is_usual():
    plain, calibrated = memories(), memories(calibrated=True)
    features = random(2, D, H, W, seed=3)
    index = distances(features[0], plain.bank).argmin(1)

    expected = plain.score_united(features, None)[0][0].flatten() / calibrated.usual[index]

    torch.testing.assert_close(calibrated.score_united(features, None)[0][0].flatten(), expected)


def test_one_group_only_leaves_memories_uncalibrated():
    data = normals()
    data = Normals(data.source, data.rows, data.experts, np.zeros(12, dtype=np.int64))
    experts = memories(data, calibrated=True)

    assert (experts.usual == 1).all()


def test_mahalanobis_distance_by_hand():
    data = normals()
    experts = fitted(GaussianExperts(GaussianExpertConfig(fine=0.75), shape=(D, H, W)), data)
    features = random(2, 1, D, H, W, seed=3)

    scores = experts(features, ASKED)

    everything = np.concatenate([own_patches(data, expert) for expert in range(K)])[:, :3]
    for b in range(2):
        for t in range(2):
            own = own_patches(data, int(ASKED[b, t]))[:, :3]
            S = 0.75 * np.cov(own.T, bias=True) + 0.25 * np.cov(everything.T, bias=True)
            S = 0.9 * S + 0.1 * np.trace(S) / 3 * np.eye(3)
            for row in range(H):
                for column in range(W):
                    away = features[b, 0, :3, row, column].numpy() - own.mean(axis=0)
                    expected = math.sqrt(away @ np.linalg.inv(S) @ away)
                    assert scores[b, t, 0, row, column].item() == pytest.approx(expected, rel=1e-4)


def test_subspace_residual_by_hand():
    """On a grid that is not averaged: the cells are the patches, and no cell is interpolated."""
    count, grid = 12, (2, 2)
    source = InMemory(random(count, D, *grid))
    data = Normals(source, np.arange(count), np.arange(count) % 2, np.arange(count))
    experts = fitted(
        SubspaceExperts(SubspaceExpertConfig(cells=8, variance=0.7, max_images=100), shape=(D, *grid)), data
    )
    features = random(1, 1, D, *grid, seed=3)

    scores = experts(features, torch.tensor([[1, 0]]))

    for place, expert in enumerate((1, 0)):
        rows = source.features[data.experts == expert].flatten(1).double().numpy()
        mean = rows.mean(axis=0)
        _, values, vectors = np.linalg.svd(rows - mean, full_matrices=False)
        share = np.cumsum(values**2) / (values**2).sum()
        basis = vectors[: int((share < 0.7).sum()) + 1]
        centred = features.flatten().double().numpy() - mean
        residual = (centred - basis.T @ (basis @ centred)).reshape(D, *grid)
        np.testing.assert_allclose(scores[0, place, 0], np.sqrt((residual**2).sum(axis=0)), rtol=1e-3, atol=1e-4)


def layout_data(count=24):
    """Images on which each cell has its own mean, and the third expert's scatter twice as much."""
    place = random(D, H, W, seed=1)
    experts = np.arange(count) % K
    spread = torch.tensor([0.3, 0.3, 0.6])[experts][:, None, None, None]
    source = InMemory(place + spread * random(count, D, H, W, seed=2))
    return Normals(source, np.arange(count), experts, np.arange(count)), place


def test_layouts_measure_by_what_is_usual_for_the_expert_own():
    data, place = layout_data()
    experts = fitted(
        LayoutExperts(
            LayoutExpertConfig(fine=0.5, cells=3, variance=0.5, components=3, own=1.0, max_images=100),
            shape=(D, H, W),
        ),
        data,
    )
    fresh = place + 0.3 * random(30, D, H, W, seed=5)

    scores = experts(fresh[:, None], torch.arange(K).expand(30, K)).mean(dim=(0, 2, 3, 4))  # (K,)

    assert abs(scores[0]) < 1  # about the mean of the training images
    assert scores[2] < scores[0] - 0.5  # the third expert was fitted on images with twice the std


def test_layouts_standardise_on_images_left_out():
    """New normals score as those that were left out: mean 0, std 1 over draws. Measured on the fit they would not."""
    position = random(D, H, W, seed=1)
    new = position + 0.3 * random(200, D, H, W, seed=3)
    index = torch.zeros(200, 1, dtype=torch.int64)
    config = LayoutExpertConfig(fine=0.5, cells=3, variance=0.97, components=200, own=0.5, max_images=100)

    def scores(seed, groups):
        source = InMemory(position + 0.3 * random(60, D, H, W, seed=seed))
        data = Normals(source, np.arange(60), np.zeros(60, dtype=np.int64), groups)
        experts = fitted(LayoutExperts(config, shape=(D, H, W)), data)
        residuals = [view.residual(new) for view in experts.views]
        views = [view(residual, index) for view, residual in zip(experts.views, residuals, strict=True)]
        return [*views, experts.detail(new, residuals[0], index)]

    draws = [scores(seed, np.arange(60)) for seed in (2, 5, 6, 7, 8, 9, 10, 11)]
    for part in zip(*draws, strict=True):
        assert abs(np.mean([float(each.mean()) for each in part])) < 0.5
        assert 0.7 < np.mean([float(each.std()) for each in part]) < 1.3  # of one draw it depends on the processor too
    on_the_fit = scores(2, np.zeros(60, dtype=np.int64))  # one group: nothing can be left out
    assert on_the_fit[0].mean() > 1.5


def test_layouts_measure_the_detail_around_the_rebuilt_layout():
    """g = x - up(pool(x) - r), and sqrt(sum over channels of w (g - m)^2), channel by channel and cell by cell."""
    data, place = layout_data()
    detail = fitted(
        LayoutExperts(
            LayoutExpertConfig(fine=0.5, cells=3, variance=0.8, components=3, own=0.5, max_images=100),
            shape=(D, H, W),
        ),
        data,
    ).detail
    features, left = place + random(2, D, H, W, seed=5), random(2, D, 3, 3, seed=6)
    asked = torch.tensor([[2, 0], [1, 2]])

    got = detail(features, left, asked)  # (2, 2, H, W)

    pooled = torch.nn.functional.adaptive_avg_pool2d(features, 3) - left
    up = torch.nn.functional.interpolate(pooled, size=(H, W), mode="bilinear", align_corners=False)
    rest = features - up
    for image in range(2):
        for place_asked, expert in enumerate(asked[image]):
            for row in range(H):
                for column in range(W):
                    total = sum(
                        detail.weights[expert, d, row, column]
                        * (rest[image, d, row, column] - detail.mean[d, row, column]) ** 2
                        for d in range(D)
                    )
                    wanted = (total.sqrt() - detail.centre[expert]) / detail.std[expert]
                    assert got[image, place_asked, row, column].item() == pytest.approx(wanted.item(), abs=1e-3)


def test_layouts_see_what_is_smaller_than_their_cells():
    """A change of one cell of the grid gives the maximum at this cell, though the subspace averages many cells."""
    place = random(D, 12, 12, seed=1)
    source = InMemory(place + 0.3 * random(60, D, 12, 12, seed=2))
    data = Normals(source, np.arange(60), np.zeros(60, dtype=np.int64), np.arange(60))
    experts = fitted(
        LayoutExperts(
            LayoutExpertConfig(fine=0.5, cells=3, variance=0.8, components=20, own=0.5, max_images=100),
            shape=(D, 12, 12),
        ),
        data,
    )
    damaged = place + 0.3 * random(1, D, 12, 12, seed=3)
    damaged[0, :, 7, 2] += 3

    where = experts(damaged[:, None], torch.zeros(1, 1, dtype=torch.int64))[0, 0, 0]

    assert divmod(int(where.argmax()), 12) == (7, 2)
    assert where[7, 2] > where.flatten().sort().values[-2] + 1


def test_layouts_by_hand():
    """Both measures, on one grid cell, from the residuals of images left out one group at a time."""
    data = Normals(InMemory(random(8, D, 1, 1)), np.arange(8), np.arange(8) % 2, np.arange(8) % 4)
    experts = fitted(
        LayoutExperts(
            LayoutExpertConfig(fine=0.25, cells=1, variance=0.5, components=1, own=0.6, max_images=100),
            shape=(D, 1, 1),
        ),
        data,
    )
    rows = data.source.features.flatten(1).double().numpy()
    x = random(1, 1, D, 1, 1, seed=3)

    def residual_of(test, train):
        mean = train.mean(axis=0)
        _, _, vectors = np.linalg.svd(train - mean, full_matrices=False)
        centred = test - mean
        return centred - centred @ vectors[:1].T @ vectors[:1]

    def left_out(columns):
        return np.stack(
            [residual_of(rows[i, columns], rows[data.groups != data.groups[i]][:, columns]) for i in range(8)]
        )

    def mixed(measure, R, expert):
        return 0.6 * measure(R[data.experts == expert]) + 0.4 * measure(R)

    for expert in (0, 1):
        got = experts(x, torch.tensor([[expert]]))[0, 0, :, 0, 0]
        own = data.experts == expert

        R = left_out(slice(None))
        square = mixed(lambda few: (few**2).mean(axis=0), R, expert)
        cells = np.sqrt((R[own] ** 2 / square).sum(axis=1))
        r = residual_of(x.flatten().numpy(), rows)
        by_cells = (np.sqrt((r**2 / square).sum()) - cells.mean()) / cells.std()
        # On a grid of one cell the detail is what the subspace leaves, around its mean.
        square = mixed(lambda few, middle=R.mean(axis=0): ((few - middle) ** 2).mean(axis=0), R, expert)
        cells = np.sqrt(((R[own] - R.mean(axis=0)) ** 2 / square).sum(axis=1))
        detail = (np.sqrt(((r - R.mean(axis=0)) ** 2 / square).sum()) - cells.mean()) / cells.std()
        assert got[0].item() == pytest.approx(max(by_cells, detail), rel=1e-2)

        R = left_out(slice(1, D))
        S = mixed(lambda few: few.T @ few / len(few), R, expert)
        inverse = np.linalg.inv(0.5 * S + 0.5 * np.trace(S) / 3 * np.eye(3))
        distance = np.sqrt(np.einsum("ni,ij,nj->n", R, inverse, R))
        usual = np.sqrt(0.6 * (distance[own] ** 2).mean() + 0.4 * (distance**2).mean())
        r = residual_of(x.flatten().numpy()[1:], rows[:, 1:])
        score = (np.sqrt(r @ inverse @ r) - distance[own].mean()) / distance[own].std()
        assert usual > 0
        assert got[1].item() == pytest.approx(score, rel=1e-2)


def test_layouts_have_an_image_of_every_expert_however_few_are_drawn():
    experts = fitted(
        LayoutExperts(
            LayoutExpertConfig(fine=0.5, cells=3, variance=0.8, components=3, own=0.5, max_images=2),
            shape=(D, H, W),
        ),
        layout_data()[0],
    )

    assert len(experts.views[0].centre) == K
    assert torch.isfinite(experts(random(2, 1, D, H, W), ASKED)).all()


def test_layouts_of_one_group_are_finite():
    data, _ = layout_data()
    data = Normals(data.source, data.rows, data.experts, np.zeros(24, dtype=np.int64))
    experts = fitted(
        LayoutExperts(
            LayoutExpertConfig(fine=0.5, cells=3, variance=0.8, components=3, own=0.5, max_images=100),
            shape=(D, H, W),
        ),
        data,
    )

    assert torch.isfinite(experts(random(2, 1, D, H, W), ASKED)).all()


def test_layouts_of_many_channels_in_the_coarsest_stage_can_be_fit():
    """432 channels: what stride 32 of a small network, or any stage of a large one, brings."""
    width = 450
    source = InMemory(random(12, width, 4, 4))
    data = Normals(source, np.arange(12), np.arange(12) % 3, np.arange(12))
    experts = fitted(
        LayoutExperts(
            LayoutExpertConfig(fine=1 - 432 / width, cells=2, variance=0.9, components=10, own=0.5, max_images=100),
            shape=(width, 4, 4),
        ),
        data,
    )

    assert torch.isfinite(experts(random(1, 1, width, 4, 4), torch.tensor([[0, 2]]))).all()
