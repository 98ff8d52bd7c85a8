import numpy as np
import torch

from normweave.config import GuardedAdaptionConfig
from normweave.heads.adapted_moe.adaption import (
    GuardedAdaption,
    NoAdaption,
    PaperAdaption,
    statistics,
)
from normweave.heads.novelty import covariance_within

D = 5


def images(count, *, seed=0, grid=(6, 7)):
    generator = torch.Generator().manual_seed(seed)
    shift, spread = torch.randn(2, count, D, 1, 1, generator=generator)
    return torch.randn(count, D, *grid, generator=generator) * (0.3 * spread).exp() + shift


def stats_by_hand(image):
    """[mean; log of the population std] of one (D, h, w) image, channel by channel."""
    patches = image.flatten(1).double().numpy()  # (D, P)
    mean = [row.sum() / len(row) for row in patches]
    deviation = [np.sqrt(((row - m) ** 2).sum() / len(row)) for row, m in zip(patches, mean, strict=True)]
    return np.array(mean + list(np.log(deviation)))


def test_statistics_are_mean_and_log_of_the_population_std():
    few = images(3)

    torch.testing.assert_close(
        statistics(few).double(),
        torch.from_numpy(np.stack([stats_by_hand(image) for image in few])),
        rtol=1e-5,
        atol=1e-6,
    )


def test_a_channel_without_variance_has_finite_statistics():
    assert torch.isfinite(statistics(torch.full((1, D, 4, 4), 3.0))).all()


def paper_fitted(train, experts):
    adaption = PaperAdaption(width=D)
    adaption.fit(statistics(train).numpy(), experts, experts)
    return adaption


def test_centres_and_stds_are_those_of_all_patches_of_a_subclass():
    train, experts = images(6), np.array([0, 1, 0, 1, 1, 0])
    adaption = paper_fitted(train, experts)

    for expert in (0, 1):
        patches = train[torch.from_numpy(experts == expert)].permute(1, 0, 2, 3).flatten(1).numpy()  # (D, n*P)
        np.testing.assert_allclose(adaption.centres[expert], patches.mean(axis=1), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(adaption.stds[expert], patches.std(axis=1), rtol=1e-4)


def test_agrees_with_equations_5_and_6():
    """x' = (x - mean(x)) * std_k / std(x) + c_k, then x' / |x'|, patch by patch and channel by channel."""
    train, test = images(4), images(2, seed=1)
    adaption = paper_fitted(train, np.array([0, 1, 2, 1]))
    asked = torch.tensor([[2, 0], [1, 2]])

    adapted = adaption(test, statistics(test), asked)

    assert adapted.shape == (2, 2, D, 6, 7)
    for image in range(2):
        for place, expert in enumerate(asked[image].tolist()):
            by_hand = np.empty((D, 6, 7))
            for channel in range(D):
                x = test[image, channel].double().numpy()
                std_k = float(adaption.stds[expert, channel])
                by_hand[channel] = (x - x.mean()) * std_k / x.std() + float(adaption.centres[expert, channel])
            for row in range(6):
                for column in range(7):
                    by_hand[:, row, column] /= np.sqrt((by_hand[:, row, column] ** 2).sum())
            np.testing.assert_allclose(adapted[image, place], by_hand, rtol=1e-4, atol=1e-5)


def test_papers_adaption_leaves_an_image_with_the_subclass_own_statistics_but_for_its_length():
    image = images(1)
    adaption = paper_fitted(image, np.array([0]))

    (adapted,) = adaption(image, statistics(image), torch.tensor([[0]]))

    torch.testing.assert_close(adapted, torch.nn.functional.normalize(image, dim=1))


def test_papers_adaption_removes_any_change_of_light():
    train, test = images(4), images(1, seed=1)
    adaption = paper_fitted(train, np.zeros(4, dtype=np.int64))
    brighter = 1.7 * test + torch.randn(1, D, 1, 1)
    only = torch.tensor([[0]])

    torch.testing.assert_close(
        adaption(brighter, statistics(brighter), only),
        adaption(test, statistics(test), only),
        rtol=1e-3,
        atol=1e-4,
    )


def guarded_fitted(samples, subclasses, *, directions=2, prior=4.0, shrinkage=0.1):
    adaption = GuardedAdaption(GuardedAdaptionConfig(directions=directions, prior=prior, shrinkage=shrinkage), width=D)
    adaption.fit(samples, subclasses, subclasses)
    return adaption


def three_subclasses():
    """Statistics of images of three subclasses on a straight line, and the direction of the line."""
    generator = np.random.default_rng(0)
    line = generator.normal(size=2 * D)
    line /= np.linalg.norm(line)
    subclasses = np.arange(60) % 3
    samples = (subclasses[:, None] - 1) * line + 0.1 * generator.normal(size=(60, 2 * D))
    return samples.astype(np.float32), subclasses, line


def test_guarded_adaption_agrees_with_its_equations():
    samples, subclasses, _ = three_subclasses()
    adaption = guarded_fitted(samples, subclasses)
    image = images(1, seed=2)[0]

    t_k = np.stack([samples[subclasses == each].astype(float).mean(axis=0) for each in range(3)])
    t = t_k.sum(axis=0) / 3
    _, S = covariance_within(samples, subclasses, shrinkage=0.1)
    # Leading directions of the t_k - t as eigenvectors of their scatter, without svd.
    values, vectors = np.linalg.eigh((t_k - t).T @ (t_k - t))
    B = vectors[:, [-1, -2]] * np.sqrt(values[[-1, -2]] / (3 - 1))
    s = stats_by_hand(image)
    z = np.linalg.inv(B.T @ np.linalg.inv(S) @ B + np.eye(2) / 4.0) @ B.T @ np.linalg.inv(S) @ (s - t)
    estimate = t + B @ z
    by_hand = np.empty(image.shape)
    for channel in range(D):
        by_hand[channel] = (image[channel].numpy() - estimate[channel]) / np.exp(estimate[D + channel])

    adapted = adaption(image[None], statistics(image[None]), torch.tensor([[0, 1]]))

    assert adapted.shape == (1, 1, D, 6, 7)  # the same for all experts
    np.testing.assert_allclose(adapted[0, 0], by_hand, rtol=1e-3, atol=1e-4)


def test_guarded_adaption_extrapolates_along_the_known_line_only():
    samples, subclasses, line = three_subclasses()
    adaption = guarded_fitted(samples, subclasses, directions=1)
    aside = np.random.default_rng(1).normal(size=2 * D)
    aside -= (aside @ line) * line
    aside /= np.linalg.norm(aside)

    def estimate(place):
        z = adaption.coordinates(torch.from_numpy(place[None].astype(np.float32)))
        return (adaption.centre + z @ adaption.directions.T)[0].numpy()

    np.testing.assert_allclose(estimate(2.5 * line), 2.5 * line, atol=0.25)  # "brighter" than any known subclass
    assert np.linalg.norm(estimate(2.5 * aside) - estimate(0 * aside)) < 0.5  # the adaption does not remove a defect


def test_guarded_adaption_brings_subclasses_together():
    samples, subclasses, _ = three_subclasses()
    adaption = guarded_fitted(samples, subclasses)
    pattern = torch.randn(1, D, 16, 16, generator=torch.Generator().manual_seed(0))
    pattern = (pattern - pattern.mean((2, 3), keepdim=True)) / pattern.std((2, 3), keepdim=True, correction=0)
    mean, log_deviation = adaption.centre.chunk(2)
    seen = [
        pattern * (log_deviation + step[D:])[:, None, None].exp() + (mean + step[:D])[:, None, None]
        for step in (1.5 * adaption.directions[:, 0], -1.5 * adaption.directions[:, 0])
    ]

    bright, dark = (adaption(image, statistics(image), torch.tensor([[0]])) for image in seen)

    assert (seen[0] - seen[1]).abs().mean() > 5 * (bright - dark).abs().mean()


def test_guarded_adaption_with_one_subclass_is_off():
    samples, _, _ = three_subclasses()
    adaption = guarded_fitted(samples, np.zeros(60, dtype=np.int64))
    few = images(2)

    torch.testing.assert_close(adaption(few, statistics(few), torch.tensor([[0], [0]]))[:, 0], few)
    assert adaption.changes(statistics(few)).tolist() == [False, False]


def test_no_adaption_changes_nothing_and_reports_it():
    few = images(2)

    assert torch.equal(NoAdaption()(few, statistics(few), torch.tensor([[0], [0]]))[:, 0], few)
    assert NoAdaption().changes(statistics(few)).tolist() == [False, False]


def test_adapted_images_are_marked():
    samples, subclasses, _ = three_subclasses()
    few = statistics(images(2))

    assert guarded_fitted(samples, subclasses).changes(few).tolist() == [True, True]
    assert PaperAdaption(width=D).changes(few).tolist() == [True, True]
