"""What an evaluation measures: pure functions of features, scores and pictures. Deterministic, the
bootstrap too: its draws are the same for every row and every run.

A score of several pictures a prompt is [N,n]: N prompts, n pictures of each. Prompts are drawn for
an interval, and the pictures of one go along with it, because they are alike.
"""
import math

import numpy as np
import torch
import torch.nn.functional as F

Z = 1.959964  # the normal distribution's 97.5% point: 95% intervals
DRAWS = 2000  # of the bootstrap


# --------------------------------------------------------------------------------------- features

def frechet_distance(a, b):
    """Features [N,D] and [M,D] -> |mean difference|^2 + tr(A + B - 2 (AB)^(1/2)) of the Gaussians
    with their means and covariances A and B (arXiv 1706.08500, eq. 6). Too large for few
    features, the more so the fewer they are: compare equal numbers."""
    a, b = a.double(), b.double()
    A, B = a.T.cov(), b.T.cov()
    # the eigenvalues of AB are those of the symmetric A^(1/2) B A^(1/2)
    values, vectors = torch.linalg.eigh(A)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ B @ root).clamp(min=0).sqrt().sum()
    distance = (a.mean(0) - b.mean(0)).square().sum() + A.trace() + B.trace() - 2 * cross
    return distance.clamp(min=0).item()  # rounding may go below


def covered(points, by, k=3):
    """The share of points [N,D] that lie in the manifold of `by` [M,D], M > k: within the distance
    of any of these to its k-th nearest neighbour among them (arXiv 1904.06991, eq. 1 and 2).

    covered(drawn, by=real) is precision, covered(real, by=drawn) is recall. Both rise with the
    number of features: compare equal numbers."""
    points, by = points.double(), by.double()
    radii = [torch.cdist(part, by).kthvalue(k + 1).values for part in by.split(1000)]
    radii = torch.cat(radii)  # [M]; the nearest is the point itself
    inside = [(torch.cdist(part, by) <= radii).any(dim=1) for part in points.split(1000)]
    return torch.cat(inside).double().mean().item()


def diversity(features):
    """Features [N,n,D] of n >= 2 pictures of each prompt -> [N]: the mean distance of two of
    them."""
    n = features.shape[1]
    distances = torch.cdist(features.double(), features.double(),
                            compute_mode="donot_use_mm_for_euclid_dist")
    return distances.sum(dim=(1, 2)) / (n * (n - 1))


# --------------------------------------------------------------------------------------- pictures

def high_frequency(images):
    """Images [N,3,H,W] -> mean energy per pixel above half the Nyquist frequency (in either
    direction), [N]."""
    h, w = images.shape[-2:]
    high = (torch.fft.fftfreq(h).abs()[:, None] > 0.25) | (torch.fft.fftfreq(w).abs()[None] > 0.25)
    spectrum = torch.fft.fft2(images, norm="ortho").abs().square()
    return (spectrum * high.to(images.device)).mean(dim=(1, 2, 3))


def roughness(images, real):
    """Images [n*N,3,H,W] and the N real ones -> median difference of neighbouring pixels (in both
    directions) where the real one is white for two pixels around, in units of 1/255; nan where
    nothing is. The median, because an object may stand elsewhere than in the real picture."""
    darkest = -F.max_pool2d(-real.amin(dim=1, keepdim=True), 5, 1, 2)  # within two pixels
    white = (darkest > 0.99)[:, 0, 1:, 1:].repeat(len(images) // len(real), 1, 1)
    across = images.diff(dim=3).abs().mean(dim=1)[:, 1:]  # [n*N,H-1,W-1], like white
    down = images.diff(dim=2).abs().mean(dim=1)[:, :, 1:]
    return 255 * torch.stack([across[white], down[white]]).mean(dim=0).median().item()


# ------------------------------------------------------------------------------------- statistics

def by_prompt(scores):
    """Scores [N,n], nan where there is none -> each prompt's mean over what it has, [n of prompts
    that have any]."""
    scores = np.asarray(scores, dtype=np.float64)
    found = ~np.isnan(scores)
    sums, counts = np.where(found, scores, 0).sum(axis=1), found.sum(axis=1)
    return sums[counts > 0] / counts[counts > 0]


def interval(values, middle=np.mean):
    """One value of each of N prompts -> their mean (or another middle) and the ends of its 95%
    interval by bootstrap over prompts (Efron's percentiles), which are None for fewer than two.

    Of the differences of two rows this is the paired bootstrap: both have the prompts drawn."""
    values, rng = np.asarray(values, dtype=np.float64), np.random.default_rng(0)
    count = len(values)
    if count < 2:
        return (float(values[0]) if count else None), None, None
    drawn = [middle(values[rng.integers(count, size=count)]) for _ in range(DRAWS)]
    low, high = np.percentile(drawn, [2.5, 97.5])
    return float(middle(values)), float(low), float(high)


def spread(values):
    """One value of each of several runs -> mean, and that minus and plus their standard
    deviation, None for one run."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, None, None
    deviation = float(np.std(values, ddof=1))
    return mean, mean - deviation, mean + deviation


def wilson(share, n):
    """A share of n independent trials -> the ends of its 95% interval (Wilson, J. Am. Stat. Assoc.
    22, 1927). n need not be whole."""
    middle = (share + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * math.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def win_rate(groups):
    """The outcomes of comparisons, 1 won, 0 lost, 1/2 a tie, as one list a prompt -> {"rate",
    "low", "high", "n"}: the share won and its Wilson interval, None if nothing was compared.

    Comparisons of one prompt are alike, so the interval is that of as many independent ones as
    the spread between prompts speaks for, which are at least as many as there are prompts and at
    most n."""
    groups = [np.asarray(group, dtype=np.float64) for group in groups if len(group)]
    n, prompts = sum(map(len, groups)), len(groups)
    if not n:
        return None
    rate = sum(group.sum() for group in groups) / n
    independent = n
    if prompts > 1:
        # the variance of a mean over clusters (Cochran, Sampling Techniques, eq. 9A.2)
        residuals = np.array([group.sum() - rate * len(group) for group in groups])
        variance = prompts / (prompts - 1) * np.square(residuals).sum() / n**2
        if variance > 0:
            independent = float(np.clip(rate * (1 - rate) / variance, prompts, n))
    low, high = wilson(float(rate), independent)
    return {"rate": float(rate), "low": low, "high": high, "n": n}


def outcomes(ours, theirs):
    """Scores [N,n] and [N,m] of the same prompts -> for each prompt the outcomes of its first
    min(n,m) pairs. A pair without one of the scores is left out."""
    ours, theirs = (np.asarray(scores, dtype=np.float64) for scores in (ours, theirs))
    n = min(ours.shape[1], theirs.shape[1])
    difference = ours[:, :n] - theirs[:, :n]
    return [(np.sign(row[~np.isnan(row)]) + 1) / 2 for row in difference]
