"""Captioned pictures from tar shards in the webdataset layout (CC12M's): NAME.jpg|png|webp + NAME.txt, or, pre-encoded,
NAME.npy (float16 [2,4,h,w]: the posterior's mean and std, unscaled) + NAME.txt.

    python data.py --data 'shards/*.tar' --out encoded/ --model MODEL --resolution 512     # encode once, train often

Every sample is addressed by its place in its tar, so the order is a pure function of (seed, position): a run can stop
anywhere and go on exactly there, and two processes draw together what one with twice the rows draws.
"""
import functools
import glob
import io
import json
import os
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from support.cli import (
    POCKET,
    at_least,
    autocast,
    make_folder,
    option,
    parse,
    pick_device,
    pick_precision,
    require,
    run,
)
from support.runs import same_options
from support.weights import InputError, read_json, write_whole

PICTURES = (".jpg", ".jpeg", ".png", ".webp")


class Shards(torch.utils.data.Dataset):
    """path: a tar, a folder of tars, or a glob. Item i -> (tensor, caption); the tensor is an image [3,R,R] in [-1,1] (shortest
    side resized to `resolution`, centre crop) or, where the shards are pre-encoded, the float32 posterior [2,4,h,w]. name: of the option
    that gave the path, for messages."""

    def __init__(self, path, resolution, name="--data"):
        self.resolution = resolution
        self.files = sorted(glob.glob(str(Path(path) / "*.tar") if Path(path).is_dir() else str(path)))
        require(self.files, f"{name} {path}: no such shards; expected a .tar, a folder of them, or a glob such as 'shards/*.tar'")
        rows = []  # file number, offset and size of the picture or posterior, offset and size of the caption
        suffixes = set()
        for number, file in enumerate(self.files):
            parts = {}
            try:
                with tarfile.open(file, "r:") as tar:
                    for member in tar:
                        stem, dot, suffix = member.name.rpartition(".")
                        tar.members = []  # else tarfile keeps them all
                        parts.setdefault(stem, {})[dot + suffix.lower()] = (member.offset_data, member.size)
                    if tar.offset + tarfile.BLOCKSIZE > os.path.getsize(file):  # no end-of-archive block was there
                        raise tarfile.ReadError("it ends too early")
            except (tarfile.TarError, OSError, EOFError) as error:
                raise InputError(f"{file}: not a whole tar file ({error}); copy the shard again or leave it out") from None
            for stem, part in parts.items():
                content = next((s for s in (".npy", *PICTURES) if s in part), None)
                if content and ".txt" in part:
                    rows.append((number, *part[content], *part[".txt"]))
                    suffixes.add(content == ".npy")
        self.samples = np.array(rows, dtype=np.int64)  # one array: small, and shared by the loading processes
        require(rows, f"{path}: no pairs in these shards; expected NAME.jpg|png|webp or NAME.npy beside NAME.txt")
        require(len(suffixes) == 1, f"{path}: some shards hold pictures and some hold latents; give one kind")
        self.encoded = suffixes.pop()
        require(not self.encoded or (self.samples[:, 2] == self.samples[0, 2]).all(),
                f"{path}: latents of several sizes; give shards that were encoded at one resolution")
        if self.encoded:
            shape = tuple(self[0][0].shape)
            require(len(shape) == 4 and shape[0] == 2 and shape[2] == shape[3], f"{self.files[0]}: posteriors {shape}; expected (2, C, s, s), mean and "
                                                                                f"std, as data.py writes them")
            for record in {Path(file).parent / "config.json" for file in self.files}:
                encoded_at = read_json(record).get("resolution", resolution) if record.is_file() else resolution
                require(encoded_at == resolution, f"{path}: encoded at --resolution {encoded_at}, now {resolution}; give the same, or encode them again")

    def __len__(self):
        return len(self.samples)

    def read(self, number, offset, size):
        with open(self.files[number], "rb") as file:
            file.seek(offset)
            return file.read(size)

    def caption(self, i):
        number, _, _, *place = self.samples[i].tolist()
        return self.read(number, *place).decode("utf-8", "replace").strip()

    def __getitem__(self, i):
        number, *place = self.samples[i, :3].tolist()
        data = self.read(number, *place)
        try:
            tensor = torch.from_numpy(np.load(io.BytesIO(data))).float() if self.encoded else load_picture(data, self.resolution)
        except Exception as error:  # whatever PIL or numpy make of broken bytes
            raise InputError(f"{self.files[number]}: sample {i} is unreadable ({error}); make the shard again") from None
        return tensor, self.caption(i)


def load_picture(data, resolution):
    """Bytes of a picture -> [3,R,R] in [-1,1]; transparency on white."""
    picture = Image.open(io.BytesIO(data))
    if picture.mode in ("RGBA", "LA", "P"):
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    picture = picture.convert("RGB")
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
    """Two integers -> one 63-bit seed; neighbours give unrelated seeds (the finaliser of splitmix64)."""
    z = (seed * 0x9E3779B97F4A7C15 + number * 0xD1B54A32D192ED03 + 0x2545F4914F6CDD1D) & (2**64 - 1)
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
    return (z ^ (z >> 31)) >> 1


class StepSampler:
    """Yields, for step first, first+1, ...: the sample numbers of this rank's rows of the global batch. Each epoch is a fresh
    permutation; step k takes the positions k*G .. (k+1)*G - 1 of their concatenation, G = rows * world."""

    def __init__(self, count, seed, first, last, rows, rank=0, world=1):
        self.count, self.seed, self.steps, self.rows, self.rank, self.world = count, seed, range(first, last), rows, rank, world

    def __len__(self):
        return len(self.steps)

    def __iter__(self):
        for step in self.steps:
            yield [permutation(self.seed, p // self.count, self.count)[p % self.count].item()
                   for p in positions(step, self.rows, self.rank, self.world)]


def positions(step, rows, rank=0, world=1):
    """The places in the endless stream of samples that this rank's `rows` rows of step `step` take."""
    first = (step * world + rank) * rows
    return range(first, first + rows)


def random_draws(seed, places, shape, grid_points, device):
    """Everything random about the samples at `places` of the stream: posterior noise, diffusion noise [B,*shape], grid index
    i [B] and u in [0,1) [B] for w. One generator per sample, so nothing depends on batch, rank or number of processes."""
    rows = []
    for place in places:
        g = torch.Generator().manual_seed(mix(mix(seed, 1), place))
        rows.append((torch.randn(shape, generator=g), torch.randn(shape, generator=g),
                     torch.randint(grid_points, (), generator=g), torch.rand((), generator=g)))
    return [torch.stack(column).to(device, non_blocking=True) for column in zip(*rows)]


def batches(shards, seed, first, last, rows, rank=0, world=1, workers=0):
    """An iterator over steps first..last-1 of (tensors [rows,...], list of captions)."""
    return torch.utils.data.DataLoader(shards, batch_sampler=StepSampler(len(shards), seed, first, last, rows, rank, world),
                                       num_workers=workers, pin_memory=torch.cuda.is_available())


def add_pair(tar, stem, suffix, data, caption):
    """Write the bytes of a picture or a posterior, and its caption, into an open tar."""
    for name, content in ((f"{stem}.{suffix}", data), (f"{stem}.txt", caption.encode())):
        info = tarfile.TarInfo(name)
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))


@dataclass
class Config:
    data: str = option(str(POCKET / "data" / "train-*.tar"), "shards to encode: a tar, a folder or a glob")
    out: str = option("runs/encoded", "folder for the encoded shards")
    model: str = option(str(POCKET), "model folder whose VAE encodes")
    resolution: int = option(64, "side of the square pictures in pixels")
    batch: int = option(32, "pictures at a time")
    device: str = option("auto", "auto, cpu or cuda")
    precision: str = option("auto", "arithmetic of the VAE", choices=("auto", "bf16", "fp32"))


@torch.no_grad()
def main():
    from vae import VAE
    args = parse(Config(), __doc__)
    at_least(1, args, "batch")
    device = pick_device(args.device)
    dtype = pick_precision(args.precision, device)
    vae, shards = VAE.from_pretrained(args.model, device=device), Shards(args.data, args.resolution)
    require(not shards.encoded, f"{args.data}: already encoded")
    names = [Path(file).name for file in shards.files]
    made_from = {"data": args.data, "model": args.model, "resolution": args.resolution}
    require(len(set(names)) == len(names), f"--data {args.data}: two shards of the same name; encode them into separate folders")
    require(all(Path(file).resolve().parent != Path(args.out).resolve() for file in shards.files), f"--out {args.out}: holds the pictures; give another folder")
    out = make_folder(args.out)
    same_options(out, made_from)
    write_whole(out / "config.json", json.dumps(made_from, indent=2) + "\n")
    groups = {}
    for i, number in enumerate(shards.samples[:, 0].tolist()):
        groups.setdefault(number, []).append(i)
    for number, members in groups.items():
        target = out / Path(shards.files[number]).name
        if target.exists():  # encoded by an earlier, interrupted run
            continue
        new = target.with_suffix(".new")
        with tarfile.open(new, "w") as tar:
            for start in tqdm(range(0, len(members), args.batch), desc=target.name):
                images, captions = zip(*(shards[i] for i in members[start:start + args.batch]))
                with autocast(device, dtype):
                    posterior = torch.stack(vae.posterior(torch.stack(images).to(device)), dim=1)  # [B,2,4,h,w]
                for i, (stats, caption) in enumerate(zip(posterior.to("cpu", torch.float16).numpy(), captions), start):
                    buffer = io.BytesIO()
                    np.save(buffer, stats)
                    add_pair(tar, f"{i:08d}", "npy", buffer.getvalue(), caption)
        new.rename(target)


if __name__ == "__main__":
    run(main)
