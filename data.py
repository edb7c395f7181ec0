"""Captioned pictures from tar shards in the webdataset layout, which is CC12M's, or from a folder.

    NAME.jpg + NAME.txt     a picture (png, webp, gif, bmp, tif too) and its caption, which may also
                            stand in NAME.caption, or in NAME.json under "caption"
    NAME.npy + NAME.txt     the same encoded: float16 [2,4,h,w], mean and std, unscaled

Encode once, train often:

    python data.py --data 'shards/*.tar' --out encoded/ --model MODEL --resolution 512

Every sample is addressed by its place in its tar, so the order is a pure function of (seed,
position): a run can stop anywhere and go on exactly there, and two processes draw together what
one with twice the rows draws.
"""
import functools
import io
import json
import tarfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from support import cli
from support.cli import POCKET, at_least, make_folder, option, parse, require, run
from support.pictures import decode, what_is_wrong
from support.runs import same_options
from support.shards import (
    CONTENTS,
    BadSample,
    find_files,
    is_loose,
    place_of,
    read_captions,
    read_index,
)
from support.weights import InputError, first_line, read_json, write_whole

TRIES = 100  # samples that are tried for one place in the stream
FOLDER = 10_000  # pictures of a folder that are encoded into one tar


class Shards(torch.utils.data.Dataset):
    """path: tars or a folder of pictures (support/shards.py: find_files). Item i -> (tensor,
    caption); of several captions the first.

    The tensor is an image [3,R,R] in [-1,1] (shortest side resized to `resolution`, centre crop)
    or, where the shards are pre-encoded, the float32 posterior [2,4,h,w]. name: of the option that
    gave the path, for messages; caption_lines: a text holds one caption a line; skip_bad: go on
    without damaged tars, whose names are then in `skipped`."""

    def __init__(self, path, resolution, name="--data", caption_lines=False, skip_bad=False):
        self.resolution, self.caption_lines, self.shape = resolution, caption_lines, None
        self.files = find_files(path, name)
        self.samples, self.left_out, self.skipped = read_index(self.files, skip_bad)
        require(len(self.samples),
                f"{path}: no pairs in these shards; expected NAME.jpg (png, webp, ...) or "
                f"NAME.npy beside NAME.txt ({'; '.join(self.notes()) or 'found neither'})")
        encoded = self.samples[:, 6] == CONTENTS.index(".npy")
        self.encoded = bool(encoded[0])
        require((encoded == self.encoded).all(),
                f"{path}: some shards hold pictures and some hold latents; give one kind")
        if self.encoded:
            self.check_posteriors(path, resolution)

    def check_posteriors(self, path, resolution):
        """Refuse posteriors of several sizes, another shape, or encoded at another resolution."""
        sizes = self.samples[:, 2]
        require((sizes == sizes[0]).all(),
                f"{path}: latents of several sizes; "
                f"give shards that were encoded at one resolution")
        shape = self.first(1)[0][0].shape
        require(len(shape) == 4 and shape[0] == 2 and shape[2] == shape[3],
                f"{self.files[0]}: posteriors {tuple(shape)}; expected (2, C, s, s), mean and std, "
                f"as data.py writes them")
        self.shape = shape
        for folder in {Path(file).parent for file in self.files}:
            if not (folder / "config.json").is_file():
                continue
            encoded_at = read_json(folder / "config.json").get("resolution", resolution)
            require(encoded_at == resolution,
                    f"{path}: encoded at --resolution {encoded_at}, now {resolution}; "
                    f"give the same, or encode them again")

    def notes(self):
        """What of the data is not used, as lines for the user."""
        lines = [f"{count} {noun}{'s' if count > 1 else ''} left out: {reason}"
                 for (noun, reason), count in sorted(self.left_out.items())]
        return lines + [f"shard left out: {reason}" for reason in self.skipped.values()]

    def __len__(self):
        return len(self.samples)

    def read(self, number, offset, size):
        try:
            with open(self.files[number], "rb") as file:
                file.seek(offset)
                return file.read(size)
        except OSError as error:  # of the disk, not of a sample
            raise InputError(f"{self.files[number]}: not readable any more ({error.strerror}); "
                             f"is the disk there? The same command goes on") from None

    def bad(self, number, offset, kind, error):
        return BadSample(place_of(self.files[number], offset), kind, first_line(error))

    def captions(self, i):
        """-> the captions of sample i, one or more. Raises BadSample."""
        number, offset, size, _, kind = self.samples[i, 3:].tolist()
        data = self.read(number, offset, size)
        try:
            return read_captions(data, kind, self.caption_lines)
        except ValueError as error:
            raise self.bad(number, offset, "unreadable caption", error) from None

    def caption(self, i, draw=0):
        """One of the captions of sample i; draw: a random integer, or 0 for the first."""
        captions = self.captions(i)
        return captions[draw % len(captions)]

    def sample(self, i, draw):
        """-> (tensor, caption); draw: as in caption(). Raises BadSample."""
        number, offset, size = self.samples[i, :3].tolist()
        data = self.read(number, offset, size)
        try:
            if not self.encoded:
                tensor = load_picture(data, self.resolution)
            else:
                tensor = torch.from_numpy(np.load(io.BytesIO(data))).float()
                require(self.shape in (None, tensor.shape), f"shape {tuple(tensor.shape)}")
        except Exception as error:  # whatever PIL or numpy make of broken bytes
            kind = "unreadable posterior" if self.encoded else what_is_wrong(data, error)
            raise self.bad(number, offset, kind, error) from None
        return tensor, self.caption(i, draw)

    def __getitem__(self, i):
        return self.sample(i, draw=0)

    def first(self, count):
        """-> the first so many samples that can be read."""
        found, error = [], None
        for i in range(min(len(self), count + TRIES)):
            try:
                found.append(self[i])
            except BadSample as bad:
                error = bad
            if len(found) == count:
                break
        if not found:
            raise error
        return found


def load_picture(data, resolution):
    """Bytes of a picture -> [3,R,R] in [-1,1], as people see it (support/pictures.py): shortest
    side resized, centre crop."""
    picture = decode(data)
    w, h = picture.size
    if (w, h) != (resolution, resolution):
        side = min(w, h)
        box = ((w - side) // 2, (h - side) // 2, (w + side) // 2, (h + side) // 2)
        picture = picture.resize((resolution, resolution), Image.Resampling.LANCZOS, box=box)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 127.5 - 1


@functools.lru_cache(maxsize=2)
def permutation(seed, epoch, count):
    return torch.randperm(count, generator=torch.Generator().manual_seed(mix(seed, epoch)))


def mix(seed, number):
    """Two integers -> one 63-bit seed. Neighbours give unrelated seeds (the finaliser of
    splitmix64)."""
    z = (seed * 0x9E3779B97F4A7C15 + number * 0xD1B54A32D192ED03 + 0x2545F4914F6CDD1D) & (2**64 - 1)
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
    return (z ^ (z >> 31)) >> 1


class StepSampler:
    """Yields, for step first, first+1, ...: (sample number, position) of this rank's rows of the
    global batch. Each epoch is a fresh permutation; step k takes the positions k*G .. (k+1)*G - 1
    of their concatenation, G = rows * world."""

    def __init__(self, count, seed, first, last, rows, rank=0, world=1):
        self.count, self.seed, self.steps = count, seed, range(first, last)
        self.rows, self.rank, self.world = rows, rank, world

    def __len__(self):
        return len(self.steps)

    def __iter__(self):
        for step in self.steps:
            numbers = []
            for position in positions(step, self.rows, self.rank, self.world):
                epoch, place = divmod(position, self.count)
                number = permutation(self.seed, epoch, self.count)[place].item()
                numbers.append((number, position))
            yield numbers


class Stream(torch.utils.data.Dataset):
    """Shards as a run draws them. Item (number, position) -> tensor, caption, [(place, kind,
    reason) of each broken sample that came up before].

    A broken sample is replaced by one that is a function of (seed, position, try), so a resumed
    run and another number of processes draw the same. Of several captions one is drawn by (seed,
    position)."""

    def __init__(self, shards, seed):
        self.shards, self.seed = shards, seed

    def __getitem__(self, item):
        number, position = item
        draw, broken = mix(mix(self.seed, 2), position), []
        for attempt in range(TRIES):
            try:
                return *self.shards.sample(number, draw), broken
            except BadSample as bad:
                broken.append((bad.place, bad.kind, bad.reason))
                number = mix(mix(mix(self.seed, 3), position), attempt) % len(self.shards)
        place, kind, reason = broken[-1]
        raise InputError(f"{TRIES} samples drawn one after the other were broken, the last one "
                         f"{place}: {kind} ({reason}); are these the right shards?")


def positions(step, rows, rank=0, world=1):
    """The places in the endless stream of samples that this rank's `rows` rows of a step take."""
    first = (step * world + rank) * rows
    return range(first, first + rows)


def random_draws(seed, places, shape, device):
    """Everything random about the samples at `places` of the stream, as plain variates.

    -> posterior_noise and noise [B,*shape], unit normal; u_w and u_s [B], uniform in [0,1): for
    the guidance weight and for the timestep. What law they follow is the method's affair
    (train.distillation_loss). One generator per sample, so nothing depends on batch, rank or
    number of processes."""
    rows = []
    for place in places:
        g = torch.Generator().manual_seed(mix(mix(seed, 1), place))
        rows.append((torch.randn(shape, generator=g), torch.randn(shape, generator=g),
                     torch.rand((), generator=g), torch.rand((), generator=g)))
    return [torch.stack(column).to(device, non_blocking=True) for column in zip(*rows)]


def batches(shards, seed, first, last, rows, rank=0, world=1, workers=0, broken=None):
    """Yields for steps first..last-1: tensors [rows,...], captions. broken: what counts broken
    samples (support/broken.py)."""
    loader = torch.utils.data.DataLoader(
        Stream(shards, seed), num_workers=workers, pin_memory=torch.cuda.is_available(),
        batch_sampler=StepSampler(len(shards), seed, first, last, rows, rank, world),
        collate_fn=collate)
    for tensors, captions, found in loader:
        if broken is not None:
            broken.add(found)
        yield tensors, captions


def collate(samples):
    tensors, captions, broken = zip(*samples)
    return torch.utils.data.default_collate(tensors), captions, sum(broken, [])


def add_pair(tar, stem, suffix, data, caption):
    """Write the bytes of a picture or a posterior, and its caption or list of captions, into an
    open tar."""
    text = stem + ".txt", caption
    if not isinstance(caption, str):
        text = stem + ".json", json.dumps({"caption": caption})
    for name, content in ((f"{stem}.{suffix}", data), (text[0], text[1].encode())):
        info = tarfile.TarInfo(name)
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))


@dataclass
class Config:
    data: str = option(
        str(POCKET / "data" / "train-*.tar"),
        "shards to encode: tars, a folder of them or of pictures, a glob, or {00000..01099}.tar",
        group="what to encode", several=True)
    out: str = option("runs/encoded", "folder for the encoded shards")
    model: str = option(str(POCKET), "model folder whose VAE encodes")
    resolution: int = option(64, "side of the square pictures in pixels")
    skip_bad_shards: bool = option(False, "go on without damaged tars (config.json names them)")
    batch: int = option(32, "pictures at a time", group="the machine")
    device: str = option("auto", "auto, cpu or cuda")
    precision: str = option("auto", "arithmetic of the VAE", choices=("auto", "bf16", "fp32"))


def encode(shards, numbers, vae, tar, args, device, dtype):
    """Write the posteriors of the samples with these numbers, and their captions, into a tar.
    -> how many were left out because they are broken, by kind"""
    broken = Counter()
    for start in tqdm(range(0, len(numbers), args.batch), desc=Path(tar.name).stem):
        images, captions, names = [], [], []
        for i, number in enumerate(numbers[start:start + args.batch], start):
            try:
                image, all_captions = shards[number][0], shards.captions(number)
            except BadSample as bad:
                broken[bad.kind] += 1
                tqdm.write(f"left out: {bad.place}: {bad.kind} ({bad.reason})")
                continue
            images.append(image)
            captions.append(all_captions if len(all_captions) > 1 else all_captions[0])
            names.append(f"{i:08d}")
        if not images:
            continue
        with cli.autocast(device, dtype):
            mean, std = vae.posterior(torch.stack(images).to(device))
        posteriors = torch.stack([mean, std], dim=1).to("cpu", torch.float16)  # [B, 2, 4, h, w]
        for name, posterior, caption in zip(names, posteriors.numpy(), captions):
            buffer = io.BytesIO()
            np.save(buffer, posterior)
            add_pair(tar, name, "npy", buffer.getvalue(), caption)
    return broken


def groups_to_encode(shards):
    """-> {name of an encoded tar: numbers of its samples}; a tar keeps its name."""
    tars = [Path(file).name for file in shards.files if not is_loose(file)]
    require(len(set(tars)) == len(tars),
            "--data: two shards of the same name; encode them into separate folders")
    groups, loose = {}, 0
    for i, number in enumerate(shards.samples[:, 0].tolist()):
        name = Path(shards.files[number]).name
        if is_loose(name):
            name = f"pictures-{loose // FOLDER:05d}.tar"
            loose += 1
        groups.setdefault(name, []).append(i)
    return groups


@torch.no_grad()
def main():
    from vae import VAE
    args = parse(Config(), __doc__)
    at_least(1, args, "batch")
    device = cli.pick_device(args.device)
    dtype = cli.pick_precision(args.precision, device)
    vae = VAE.from_pretrained(args.model, device=device)
    shards = Shards(args.data, args.resolution, skip_bad=args.skip_bad_shards)
    require(not shards.encoded, f"{args.data}: already encoded")
    groups, here = groups_to_encode(shards), Path(args.out).resolve()
    require(all(Path(file).resolve().parent != here for file in shards.files),
            f"--out {args.out}: holds the pictures; give another folder")
    out = make_folder(args.out)
    made_from = {"data": args.data, "model": args.model, "resolution": args.resolution,
                 "skipped_shards": sorted(shards.skipped) or None}
    same_options(out, made_from)
    write_whole(out / "config.json", json.dumps(made_from, indent=2) + "\n")
    for note in shards.notes():
        print(note)

    broken = Counter()
    for name, numbers in groups.items():
        encoded = out / name
        if encoded.exists():  # by an earlier, interrupted run
            continue
        new = encoded.with_suffix(".new")
        with tarfile.open(new, "w") as tar:
            broken += encode(shards, numbers, vae, tar, args, device, dtype)
        new.rename(encoded)
    if broken:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(broken.items()))
        print(f"{broken.total()} broken samples left out ({kinds})")


if __name__ == "__main__":
    run(main)
