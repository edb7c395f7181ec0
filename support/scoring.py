"""Pictures in, scores and features out, batch by batch: what an evaluation holds in memory of a
picture are its numbers. Batches are shared out over processes, and are the same for any number of
these."""
import hashlib
import os

import numpy as np
import torch
from tqdm import tqdm

from support import metrics, results
from support.cli import require
from support.drawn import in_threads, read
from support.pictures import save_png, to_pil, to_tensor
from support.processes import gather
from support.protocols import open_picture

NEIGHBOURS = 3  # of recall


def cut(things, size):
    """A sequence -> parts of at most so many."""
    return [things[i:i + size] for i in range(0, len(things), size)]


def divided(jobs, work, rank, world, title):
    """[work(job)] in order, on every process. Each does its share; the first shows how far it
    is."""
    mine = range(rank, len(jobs), world)
    with tqdm(mine, desc=title, disable=rank > 0, leave=False) as bar:  # gone before an error
        done = [(i, work(jobs[i])) for i in bar]
    return [found for _, found in sorted(sum(gather(done, world), []), key=lambda part: part[0])]


def stacks(pictures):
    """PIL pictures -> tensors [B,3,H,W] in [0,1], one for each run of pictures of one size."""
    runs = []
    for tensor in map(to_tensor, pictures):
        if not runs or runs[-1][0].shape != tensor.shape:
            runs.append([])
        runs[-1].append(tensor)
    return [torch.stack(run) for run in runs]


def pictures_of(files, task):
    """Picture files -> PIL, as the task's scorers get them."""
    def one(file):
        picture = open_picture(file)
        return task.seen(picture, file.suffix) if task.seen else picture
    return in_threads(one, files)


def real_pictures(task, numbers):
    """The real pictures of these prompts, PIL, as scorers get them."""
    return [task.seen(picture) if task.seen else picture for picture in task.real(numbers)]


# What reads pictures: (k, numbers of prompts) -> their k-th pictures, PIL, as scorers get them, the
# seconds that each took or None, and their files

def of_drawn(drawn, task):
    """Of a network (support.drawn.Drawn). Picture k of prompt i is of seed k N + i."""
    def read_some(k, numbers):
        seeds = [k * len(task.prompts) + i for i in numbers]
        files = drawn([task.prompts[i] for i in numbers], seeds)
        pictures, seconds = zip(*in_threads(read, files))
        return [task.seen(one) if task.seen else one for one in pictures], list(seconds), files
    return read_some


def of_folder(found, task):
    """Of files [N][n]."""
    def read_some(k, numbers):
        files = [found[i][k] for i in numbers]
        return pictures_of(files, task), None, files
    return read_some


def of_real(task, folder, change=None):
    """The real pictures, or what change(images [B,3,H,W]) makes of them; each is written into the
    folder, named by its content."""
    def keep(picture):
        content = str(picture.size).encode() + picture.tobytes()
        name = hashlib.sha256(content).hexdigest()[:24]
        file = folder / name[:2] / f"{name}.png"
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            save_png(picture, file)
        return file

    def read_some(k, numbers):
        pictures = real_pictures(task, numbers)
        if change:
            pictures = [to_pil(image) for images in stacks(pictures) for image in change(images)]
        return pictures, None, [keep(picture) for picture in pictures]
    return read_some


class Scorers:
    """All that looks at pictures for a protocols.Task.

    rewards: {column: Reward}; its "judge", if it is a CLIP, also says which prompt it finds in a
    picture (top1). features: images [B,3,H,W] in [0,1] -> [B,D], or None. round_trip: images ->
    the same through the VAE."""

    def __init__(self, task, rewards, features, round_trip, device):
        self.task, self.rewards, self.features, self.device = task, rewards, features, device
        self.round_trip, self.energy, self.real, self.text = round_trip, None, None, None
        judge = rewards.get("judge")
        if hasattr(judge, "image_features"):
            with torch.no_grad():
                parts = [judge.text_features(part) for part in cut(task.prompts, 256)]
            self.text = torch.cat(parts)  # [N, D]

    def columns(self):
        """The columns of single pictures, and of sets of them."""
        found = [*self.rewards]
        if self.text is not None:
            found.append("top1")
        return found + ["high_frequency", "roughness"] * bool(self.task.real)

    def look(self, images):
        return self.features(images.to(self.device)).float().cpu()

    @torch.no_grad()
    def look_at_real(self, batch, rank=0, world=1):
        """Learn what drawn pictures are compared with: the real ones' features [M,D], and each
        prompt's energy at high frequencies after the VAE [N]."""
        task, files = self.task, self.task.reference
        if self.features and files:
            look = lambda part: [self.look(images) for images in stacks(pictures_of(part, task))]
            self.real = torch.cat(sum(divided(cut(files, batch), look, rank, world, "real"), []))
        if not task.real:
            return

        def measure(numbers):
            (images,) = stacks(real_pictures(task, numbers))
            found = self.look(images) if self.features and not files else None
            return found, metrics.high_frequency(self.round_trip(images))

        numbers = cut(range(len(task.prompts)), batch)
        parts = divided(numbers, measure, rank, world, "real")
        self.energy = torch.cat([energy for _, energy in parts])
        if self.features and not files:
            self.real = torch.cat([features for features, _ in parts])

    @torch.no_grad()
    def __call__(self, pictures, numbers):
        """PIL pictures and the numbers of their prompts -> {column: [B]}, features [B,D] or
        None."""
        found, looked, first = {key: [] for key in self.columns()}, [], 0
        for images in stacks(pictures):
            part = list(numbers[first:first + len(images)])
            first += len(images)
            images = images.to(self.device)
            features = self.features(images) if self.features else None
            if features is not None:
                looked.append(features.float().cpu())
            for key, scores in self.score(images, part, features).items():
                scores = torch.as_tensor(scores).double().cpu()
                require(key not in self.rewards or scores.isfinite().all(),
                        f"{key}: gave NaN or infinity; expected finite scores")
                found[key].append(scores.numpy())
        return ({key: np.concatenate(parts) for key, parts in found.items()},
                torch.cat(looked) if looked else None)

    def score(self, images, numbers, features):
        """Images of one size -> {column: [B]}"""
        found, prompts = {}, [self.task.prompts[i] for i in numbers]
        for key, reward in self.rewards.items():
            if key != "judge" or self.text is None:
                found[key] = reward(images, prompts)
                continue
            image = features if self.features == reward.image_features \
                else reward.image_features(images)
            own = torch.tensor(numbers, device=image.device)
            found["judge"] = (image * self.text[own]).sum(dim=1)
            # is the picture nearest to its own prompt among all, as the judge sees it?
            found["top1"] = (image @ self.text.T).argmax(dim=1) == own
        if self.task.real:
            found |= self.noise(images.cpu(), numbers)
        return found

    def noise(self, images, numbers):
        """How noisy pictures are beside the real one of their prompt; nan at another size."""
        real = [to_tensor(picture) for picture in real_pictures(self.task, numbers)]
        if real[0].shape != images[0].shape:
            return dict.fromkeys(("high_frequency", "roughness"), [float("nan")] * len(numbers))
        energy = self.energy[numbers]
        energy = energy.where(energy > 0, float("nan"))  # a blank real picture has none
        ratio = metrics.high_frequency(images) / energy
        rough = [metrics.roughness(image[None], one[None]) for image, one in zip(images, real)]
        return {"high_frequency": ratio, "roughness": rough}


class Measured:
    """n pictures of each of N prompts, measured. read: what reads them (above)."""

    def __init__(self, read, n, scorers, batch, rank=0, world=1, title=""):
        count = len(scorers.task.prompts)
        jobs = [(k, numbers) for k in range(n) for numbers in cut(range(count), batch)]

        def work(job):
            pictures, seconds, files = read(*job)
            return *scorers(pictures, job[1]), seconds, files

        parts = divided(jobs, work, rank, world, title)
        self.scores = {key: np.full((count, n), np.nan) for key in scorers.columns()}
        self.files = [[None] * n for _ in range(count)]
        self.seconds, rounds = [], [[] for _ in range(n)]
        for (k, numbers), (scores, features, seconds, files) in zip(jobs, parts):
            for key, values in scores.items():
                self.scores[key][numbers, k] = values
            rounds[k].append(features)
            self.seconds += seconds or []
            for i, file in zip(numbers, files):
                self.files[i][k] = file
        self.features = None
        if scorers.features:
            self.features = torch.stack([torch.cat(one) for one in rounds])  # [n, N, D]

    def summary(self, scorers, own=None):
        """-> {column: entry of results.json}. own: the column that the protocol scores with."""
        found = {key: results.summary_of(key, scores) for key, scores in self.scores.items()}
        features, real = self.features, scorers.real
        if features is not None:
            n, count = features.shape[:2]
            if real is not None and min(count, len(real)) > NEIGHBOURS:
                for key, distance in (("frechet", metrics.frechet_distance), ("recall", recall)):
                    values = [distance(one, real) for one in features]
                    found[key] = results.entry(*metrics.spread(values), "sets of seeds")
            if n > 1:
                apart = metrics.diversity(features.transpose(0, 1))
                found["diversity"] = results.entry(*metrics.interval(apart), "prompts")
        if own and scorers.task.summary:
            parts = scorers.task.summary(self.scores[own][:, 0])
            found |= {f"{own}/{name}": results.entry(*part) for name, part in parts.items()}
        return {key: one for key, one in found.items() if one is not None}


def recall(drawn, real):
    return metrics.covered(real, by=drawn, k=NEIGHBOURS)


def joined(parts, scorers, own, here):
    """Measured of one network, or of several training seeds -> what results.json says of them.
    own: the column that the protocol scores with; here: the folder of results.json."""
    summaries = [part.summary(scorers, own) for part in parts]
    summary = summaries[0]
    if len(parts) > 1:
        shared = [key for key in summary if all(key in one for one in summaries)]
        summary = {key: results.entry(*metrics.spread([one[key]["mean"] for one in summaries]),
                                      "training seeds") for key in shared}
    scores = {}
    for key in parts[0].scores:
        values = np.concatenate([part.scores[key] for part in parts], axis=1)  # [N, all n]
        if not np.isnan(values).all():
            scores[key] = [[None if np.isnan(one) else round(float(one), 6) for one in line]
                           for line in values]
    files = [sum(lines, []) for lines in zip(*(part.files for part in parts))]
    seconds = sum((part.seconds for part in parts), [])
    return {"seconds_per_image": float(np.mean(seconds)) if seconds else None,
            "n": len(files[0]), "summary": summary, "win": None, "votes": None, "scores": scores,
            "pictures": [[os.path.relpath(file, here) for file in line] for line in files]}
