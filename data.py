"""Captioned pictures from tar shards in the webdataset layout, which is CC12M's.

    NAME.jpg|png|webp + NAME.txt    a picture and its caption
    NAME.npy + NAME.txt             the same encoded: float16 [2,4,h,w], mean and std, unscaled

Encode once, train often:

    python data.py --data 'shards/*.tar' --out encoded/ --model MODEL --resolution 512

Every sample is addressed by its place in its tar, so the order is a pure function of (seed,
position): a run can stop anywhere and go on exactly there, and two processes draw together what
one with twice the rows draws.
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

from support import cli
from support.cli import POCKET, at_least, make_folder, option, parse, require, run
from support.pictures import decode
from support.runs import same_options
from support.weights import InputError, read_json, write_whole

PICTURES = (".jpg", ".jpeg", ".png", ".webp")


class Shards(torch.utils.data.Dataset):
    """path: a tar, a folder of tars, or a glob. Item i -> (tensor, caption).

    The tensor is an image [3,R,R] in [-1,1] (shortest side resized to `resolution`, centre crop)
    or, where the shards are pre-encoded, the float32 posterior [2,4,h,w]. name: of the option that
    gave the path, for messages."""

    def __init__(self, path, resolution, name="--data"):
        self.resolution = resolution
        pattern = Path(path) / "*.tar" if Path(path).is_dir() else path
        self.files = sorted(glob.glob(str(pattern)))
        require(self.files,
                f"{name} {path}: no such shards; expected a .tar, a folder of them, "
                f"or a glob such as 'shards/*.tar'")
        rows = []  # file number, offset and size of the picture or posterior, and of the caption
        kinds = set()
        for number, file in enumerate(self.files):
            for part in members(file).values():
                content = next((s for s in (".npy", *PICTURES) if s in part), None)
                if content and ".txt" in part:
                    rows.append((number, *part[content], *part[".txt"]))
                    kinds.add(content == ".npy")
        self.samples = np.array(rows, dtype=np.int64)  # small, shared by the loading processes
        require(rows,
                f"{path}: no pairs in these shards; "
                f"expected NAME.jpg|png|webp or NAME.npy beside NAME.txt")
        require(len(kinds) == 1,
                f"{path}: some shards hold pictures and some hold latents; give one kind")
        self.encoded = kinds.pop()
        if self.encoded:
            self.check_posteriors(path, resolution)

    def check_posteriors(self, path, resolution):
        """Refuse posteriors of several sizes, another shape, or encoded at another resolution."""
        sizes = self.samples[:, 2]
        require((sizes == sizes[0]).all(),
                f"{path}: latents of several sizes; "
                f"give shards that were encoded at one resolution")
        shape = tuple(self[0][0].shape)
        require(len(shape) == 4 and shape[0] == 2 and shape[2] == shape[3],
                f"{self.files[0]}: posteriors {shape}; expected (2, C, s, s), mean and std, "
                f"as data.py writes them")
        for folder in {Path(file).parent for file in self.files}:
            if not (folder / "config.json").is_file():
                continue
            encoded_at = read_json(folder / "config.json").get("resolution", resolution)
            require(encoded_at == resolution,
                    f"{path}: encoded at --resolution {encoded_at}, now {resolution}; "
                    f"give the same, or encode them again")

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
            if self.encoded:
                tensor = torch.from_numpy(np.load(io.BytesIO(data))).float()
            else:
                tensor = load_picture(data, self.resolution)
        except Exception as error:  # whatever PIL or numpy make of broken bytes
            raise InputError(f"{self.files[number]}: sample {i} is unreadable ({error}); "
                             f"make the shard again") from None
        return tensor, self.caption(i)


def members(file):
    """The files in a tar by name: {NAME: {".suffix": (offset, size)}}."""
    found = {}
    try:
        with tarfile.open(file, "r:") as tar:
            for member in tar:
                stem, dot, suffix = member.name.rpartition(".")
                tar.members = []  # else tarfile keeps them all
                found.setdefault(stem, {})[dot + suffix.lower()] = member.offset_data, member.size
            if tar.offset + tarfile.BLOCKSIZE > os.path.getsize(file):  # no end-of-archive block
                raise tarfile.ReadError("it ends too early")
    except (tarfile.TarError, OSError, EOFError) as error:
        raise InputError(f"{file}: not a whole tar file ({error}); "
                         f"copy the shard again or leave it out") from None
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
    """Yields, for step first, first+1, ...: the sample numbers of this rank's rows of the global
    batch. Each epoch is a fresh permutation; step k takes the positions k*G .. (k+1)*G - 1 of their
    concatenation, G = rows * world."""

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
                numbers.append(permutation(self.seed, epoch, self.count)[place].item())
            yield numbers


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


def batches(shards, seed, first, last, rows, rank=0, world=1, workers=0):
    """An iterator over steps first..last-1 of (tensors [rows,...], list of captions)."""
    sampler = StepSampler(len(shards), seed, first, last, rows, rank, world)
    return torch.utils.data.DataLoader(
        shards, batch_sampler=sampler, num_workers=workers, pin_memory=torch.cuda.is_available())


def add_pair(tar, stem, suffix, data, caption):
    """Write the bytes of a picture or a posterior, and its caption, into an open tar."""
    for name, content in ((f"{stem}.{suffix}", data), (f"{stem}.txt", caption.encode())):
        info = tarfile.TarInfo(name)
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))


@dataclass
class Config:
    data: str = option(
        str(POCKET / "data" / "train-*.tar"), "shards to encode: a tar, a folder or a glob",
        group="what to encode")
    out: str = option("runs/encoded", "folder for the encoded shards")
    model: str = option(str(POCKET), "model folder whose VAE encodes")
    resolution: int = option(64, "side of the square pictures in pixels")
    batch: int = option(32, "pictures at a time", group="the machine")
    device: str = option("auto", "auto, cpu or cuda")
    precision: str = option("auto", "arithmetic of the VAE", choices=("auto", "bf16", "fp32"))


def encode(shards, numbers, vae, tar, args, device, dtype):
    """Write the posteriors of the samples with these numbers, and their captions, into a tar."""
    for start in tqdm(range(0, len(numbers), args.batch), desc=Path(tar.name).stem):
        images, captions = zip(*(shards[i] for i in numbers[start:start + args.batch]))
        with cli.autocast(device, dtype):
            mean, std = vae.posterior(torch.stack(images).to(device))
        posteriors = torch.stack([mean, std], dim=1).to("cpu", torch.float16)  # [B, 2, 4, h, w]
        for i, (posterior, caption) in enumerate(zip(posteriors.numpy(), captions), start):
            buffer = io.BytesIO()
            np.save(buffer, posterior)
            add_pair(tar, f"{i:08d}", "npy", buffer.getvalue(), caption)


@torch.no_grad()
def main():
    from vae import VAE
    args = parse(Config(), __doc__)
    at_least(1, args, "batch")
    device = cli.pick_device(args.device)
    dtype = cli.pick_precision(args.precision, device)
    vae = VAE.from_pretrained(args.model, device=device)
    shards = Shards(args.data, args.resolution)
    require(not shards.encoded, f"{args.data}: already encoded")
    files = [Path(file) for file in shards.files]
    require(len({file.name for file in files}) == len(files),
            f"--data {args.data}: two shards of the same name; encode them into separate folders")
    require(all(file.resolve().parent != Path(args.out).resolve() for file in files),
            f"--out {args.out}: holds the pictures; give another folder")
    out = make_folder(args.out)
    made_from = {"data": args.data, "model": args.model, "resolution": args.resolution}
    same_options(out, made_from)
    write_whole(out / "config.json", json.dumps(made_from, indent=2) + "\n")

    groups = {}  # file number: numbers of its samples
    for i, number in enumerate(shards.samples[:, 0].tolist()):
        groups.setdefault(number, []).append(i)
    for number, numbers in groups.items():
        encoded = out / files[number].name
        if encoded.exists():  # by an earlier, interrupted run
            continue
        new = encoded.with_suffix(".new")
        with tarfile.open(new, "w") as tar:
            encode(shards, numbers, vae, tar, args, device, dtype)
        new.rename(encoded)


if __name__ == "__main__":
    run(main)
