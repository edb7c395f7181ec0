import math

import numpy as np
import pytest
import torch

from conftest import rand
from support import metrics


def features(n, d, seed, shift=0.0):
    return (rand(n, d, seed=seed) * torch.linspace(0.5, 2, d) + shift).float()


def test_frechet_distance_and_recall_equal_torch_fidelity_on_the_same_features():
    fid = pytest.importorskip("torch_fidelity.metric_fid")
    prc = pytest.importorskip("torch_fidelity.metric_prc")
    for shift, d in ((0.0, 8), (0.7, 24), (2.5, 5)):
        drawn, real = features(230, d, 1, shift), features(300, d, 2)
        statistics = [fid.fid_features_to_statistics(part.double()) for part in (drawn, real)]
        theirs = fid.fid_statistics_to_metric(*statistics, verbose=False)
        ours = metrics.frechet_distance(drawn, real)
        assert ours == pytest.approx(theirs[fid.KEY_METRIC_FID], rel=1e-6)
        theirs = prc.prc_features_to_metric(drawn, real, prc_neighborhood=3, prc_batch_size=10000,
                                            save_cpu_ram=False, verbose=False)
        assert metrics.covered(drawn, by=real) == pytest.approx(theirs["precision"], abs=1e-6)
        assert metrics.covered(real, by=drawn) == pytest.approx(theirs["recall"], abs=1e-6)
        assert shift > 2 or 0.05 < theirs["recall"] < 1


def test_frechet_distance_of_gaussians_is_the_closed_form():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(50, 6, generator=generator, dtype=torch.float64) for _ in range(2))

    def white(x):  # mean 0, covariance 1
        return (x - x.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(x.T.cov())).T

    shift, first, second = torch.arange(6.0), torch.linspace(1, 2, 6), torch.linspace(3, 0.5, 6)
    expected = (shift.square() + (first - second).square()).sum().item()
    x, y = white(a) * first, white(b) * second + shift
    assert metrics.frechet_distance(x, y) == pytest.approx(expected, rel=1e-6)
    turn = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64))[0]
    assert metrics.frechet_distance(x @ turn, y @ turn) == pytest.approx(expected, rel=1e-6)
    assert metrics.frechet_distance(a, a) == pytest.approx(0, abs=1e-6)


def test_frechet_distance_holds_where_the_covariances_do_not_commute():
    a = rand(40, 8, seed=1).double()
    b = rand(60, 8, seed=2).double() @ rand(8, 8, seed=3).double() + 1
    A, B = a.T.cov(), b.T.cov()
    # of the product itself, which is not symmetric
    root = torch.linalg.eigvals(A @ B).real.sqrt().sum()
    expected = (a.mean(0) - b.mean(0)).square().sum() + A.trace() + B.trace() - 2 * root
    assert metrics.frechet_distance(a, b) == pytest.approx(expected.item(), rel=1e-8)


def test_recall_falls_where_one_mode_is_missing_and_precision_does_not():
    left, right = rand(60, 4, seed=1), rand(60, 4, seed=2) + 50
    real, drawn = torch.cat([left, right]), rand(120, 4, seed=3)
    assert metrics.covered(real, by=drawn) < 0.5 < 0.8 < metrics.covered(drawn, by=real)
    assert metrics.covered(real, by=real) == 1.0


def test_diversity_is_the_mean_distance_of_two_pictures_of_a_prompt():
    square = torch.tensor([[0.0, 0], [3, 0], [0, 4]])  # distances 3, 4, 5
    found = metrics.diversity(torch.stack([square, 2 * square, square[:1].expand(3, 2)]))
    assert found.tolist() == pytest.approx([4, 8, 0])


def test_wilson_intervals_are_those_of_the_formula_worked_out_by_hand():
    # 8 of 10: (0.8 + 0.19207) / 1.38415 -+ 1.959964 / 1.38415 * sqrt(0.016 + 0.0096036)
    assert metrics.wilson(0.8, 10) == pytest.approx((0.49016, 0.94331), abs=2e-5)
    assert metrics.wilson(0.5, 100) == pytest.approx((0.40383, 0.59617), abs=2e-5)
    low, high = metrics.wilson(0.0, 5)
    assert low == pytest.approx(0) and high == pytest.approx(3.84146 / (5 + 3.84146), abs=1e-5)
    assert metrics.wilson(1.0, 5) == pytest.approx((1 - high, 1))


def test_ties_count_half_and_pairs_of_the_same_prompt_and_seed_are_compared():
    ours = [[1.0, 2.0], [3.0, 3.0], [0.0, math.nan]]
    theirs = [[1.0, 1.0, 9.0], [4.0, 2.0, 9.0], [-1.0, 0.0, 9.0]]
    groups = metrics.outcomes(ours, theirs)
    assert [group.tolist() for group in groups] == [[0.5, 1.0], [0.0, 1.0], [1.0]]
    found = metrics.win_rate(groups)
    assert found["n"] == 5 and found["rate"] == pytest.approx(3.5 / 5)
    assert metrics.win_rate([[], []]) is None


def test_identical_scores_win_half_and_the_interval_is_around_it():
    scores = rand(40, 3).numpy()
    found = metrics.win_rate(metrics.outcomes(scores, scores))
    assert found["rate"] == 0.5 and found["low"] < 0.5 < found["high"] and found["n"] == 120


def test_a_win_rates_interval_takes_as_many_comparisons_as_are_independent():
    alike = [[1.0] * 4] * 30 + [[0.0] * 4] * 20  # four times the same
    mixed = [[1.0, 1, 1, 0, 0]] * 40  # no prompt says more than another
    single = [[1.0]] * 30 + [[0.0]] * 20
    bounds = lambda groups: (metrics.win_rate(groups)["low"], metrics.win_rate(groups)["high"])
    assert bounds(single) == pytest.approx(metrics.wilson(0.6, 50))
    assert bounds(alike) == pytest.approx(metrics.wilson(0.6, 50))
    assert bounds(mixed) == pytest.approx(metrics.wilson(0.6, 200))


def test_bootstrap_gives_the_interval_of_all_samples_worked_out_by_hand():
    # of two values 0 and 1, a quarter of the draws has mean 0, a quarter 1
    assert metrics.interval([0.0, 1.0]) == (0.5, 0.0, 1.0)
    assert metrics.interval([2.0, 2.0, 2.0]) == pytest.approx((2, 2, 2))
    values = rand(400).double().numpy()
    mean, low, high = metrics.interval(values)
    half = 1.96 * values.std() / 20  # the normal distribution's
    assert mean == pytest.approx(values.mean())
    assert (low, high) == pytest.approx((mean - half, mean + half), abs=0.15 * half)
    assert metrics.interval(values) == (mean, low, high)  # the same draws


def test_the_bootstrap_is_paired_so_what_rows_share_cancels():
    shared, small = 10 * rand(100, seed=1).numpy(), 0.1 * rand(100, seed=2).numpy()
    _, low, high = metrics.interval((shared + small + 0.1) - shared)
    assert 0 < low < 0.1 < high < 0.2


def test_one_sample_has_a_mean_and_no_interval():
    assert metrics.interval([0.7]) == (0.7, None, None)
    assert metrics.interval([0.7], np.median) == (0.7, None, None)
    assert metrics.spread([0.7]) == (0.7, None, None)
    assert metrics.interval([]) == (None, None, None)


def test_the_spread_of_runs_is_their_standard_deviation():
    assert metrics.spread([1.0, 2.0, 3.0]) == pytest.approx((2, 1, 3))


def test_a_median_is_not_moved_by_an_outlier():
    mean, low, high = metrics.interval([*np.linspace(0, 1, 101), 1e9], np.median)
    assert 0.3 < low < mean < high < 0.7


def test_prompts_without_a_score_are_left_out_and_those_with_some_are_averaged():
    assert metrics.by_prompt([[1.0, 3.0], [math.nan, 5.0], [math.nan] * 2]).tolist() == [2, 5]


def test_high_frequency_is_the_energy_above_half_the_nyquist_frequency():
    def wave(cycles):
        return torch.cos(2 * torch.pi * cycles * torch.arange(64.0) / 64).expand(1, 3, 64, 64)

    for images in (wave(24), wave(24).transpose(2, 3), wave(24) + wave(8) + 1):
        assert metrics.high_frequency(images).item() == pytest.approx(0.5, rel=1e-4)
    assert metrics.high_frequency(wave(8)).item() < 1e-6


def test_noise_raises_both_noise_measures_and_blur_lowers_high_frequency():
    def measures_of(x):
        return metrics.high_frequency(x).mean().item(), metrics.roughness(x, real)

    real = torch.ones(4, 3, 64, 64)
    real[:, :, 20:44, 20:44] = rand(4, 3, 24, 24).sigmoid()
    clean, noisy = measures_of(real), measures_of(real + 0.02 * rand(4, 3, 64, 64, seed=2))
    assert noisy[0] > clean[0] and noisy[1] > clean[1] + 2
    assert measures_of(torch.nn.functional.avg_pool2d(real, 3, 1, 1))[0] < clean[0]


def test_roughness_looks_only_where_the_real_picture_is_flat_white():
    real = torch.ones(2, 3, 64, 64)
    real[:, :, :, 32:] = 0.5
    drawn = real.clone()
    drawn[:, :, :, 36:] = rand(2, 3, 64, 28)  # noise in the object alone
    assert metrics.roughness(drawn, real) == 0
    for stripes in (drawn[:, :, :, 0:28:2], drawn[:, :, 0::2, :28]):  # in the background
        stripes -= 10 / 255
        roughness = metrics.roughness(torch.cat([drawn, drawn]), real)
        assert roughness == pytest.approx(5, abs=1e-3)  # in one of two directions
        stripes += 10 / 255


def test_roughness_leaves_out_white_that_is_near_an_edge():
    real = torch.ones(1, 3, 64, 64)
    real[:, :, :50, ::4] = 0.5  # white lines three pixels wide above, flat white below
    drawn = real.clone()
    drawn[:, :, :46] = rand(1, 3, 46, 64)
    assert metrics.roughness(drawn, real) == 0
    assert math.isnan(metrics.roughness(drawn, torch.zeros_like(real)))  # nothing is white
