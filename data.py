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
import contextlib
import functools
import io
import json
import signal
import tarfile
import threading
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from support import cli, remote
from support.cli import POCKET, at_least, make_folder, option, parse, require, run
from support.index import read_index
from support.pictures import decode, what_is_wrong
from support.runs import same_options
from support.shards import BadSample, find_files, is_loose, place_of, read_captions
from support.weights import InputError, first_line, read_json, write_whole

TRIES = 100  # samples that are tried for one place in the stream
WINDOW = 8  # remote shards whose samples are shuffled together
FOLDER = 10_000  # pictures of a folder that are encoded into one tar


class Shards(torch.utils.data.Dataset):
    """path: tars or a folder of pictures (support/shards.py: find_files). Item i -> (tensor,
    caption); of several captions the first.

    The tensor is an image [3,R,R] in [-1,1] (shortest side resized to `resolution`, centre crop)
    or, where the shards are pre-encoded, the float32 posterior [2,4,h,w]. name: of the option that
    gave the path, for messages; caption_lines: a text holds one caption a line; skip_bad: go on
    without damaged tars, whose names are then in `skipped`.

    Remote tars are copied before they are read, into the folder `cache` (None: in the cache of the
    user), which never holds more than cache_gb GB."""

    def __init__(self, path, resolution, name="--data", caption_lines=False, skip_bad=False,
                 cache=None, cache_gb=20.0):
        self.resolution, self.caption_lines, self.shape = resolution, caption_lines, None
        self.files = find_files(path, name)
        self.samples = read_index(self.files, skip_bad)
        self.left_out, self.skipped = self.samples.left_out, self.samples.skipped
        require(len(self.samples),
                f"{path}: no pairs in these shards; expected NAME.jpg (png, webp, ...) or "
                f"NAME.npy beside NAME.txt ({'; '.join(self.notes()) or 'found neither'})")
        self.windows = self.window = self.cache = None
        if any(map(remote.is_remote, self.files)):
            self.plan_windows(path, cache, cache_gb)
        pictures, sizes = self.samples.contents()
        self.encoded = bool(sizes)
        require(not (pictures and sizes),
                f"{path}: some shards hold pictures and some hold latents; give one kind")
        if self.encoded:
            require(len(sizes) == 1,
                    f"{path}: latents of several sizes; "
                    f"give shards that were encoded at one resolution")
            self.check_posterior(path, resolution)

    def plan_windows(self, path, cache, cache_gb):
        """Remote shards are visited in windows, each of which fits into the cache."""
        require(not any(map(is_loose, self.files)),
                f"{path}: loose files beside remote shards; put them into a tar")
        self.cache = remote.Cache(cache, cache_gb)
        tars = self.samples.described()
        self.windows = Windows([tar.samples for tar in tars], WINDOW)
        # the window that is read, the next one, which is fetched, and what a slow worker reads yet
        needed = 3 * sum(sorted(tar.bytes for tar in tars)[-WINDOW:])
        needed = min(needed, sum(tar.bytes for tar in tars)) / 1e9
        require(cache_gb >= needed,
                f"--cache-gb {cache_gb:g}: expected {1.01 * needed:.3g} or more, since shards are "
                f"visited {WINDOW} at a time and three times as many are kept")

    def check_posterior(self, path, resolution):
        """Refuse posteriors of another shape, or encoded at another resolution."""
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

    def record(self):
        """-> what tells this data set from another (support/shards.py: changed), for JSON:
        {"count": samples, "hash": str, "files": {name of a shard: [bytes, samples, hash of their
        places]}}, and for remote ones "window", on which their order hangs too."""
        record = self.samples.record()
        if self.windows is not None:
            record["window"] = self.windows.size
            record["hash"] += f"-{self.windows.size}"
        return record

    def __len__(self):
        return len(self.samples)

    def number(self, seed, position):
        """The sample at a place of the endless stream: each epoch is a fresh permutation."""
        if self.windows is not None:
            return self.windows.number(seed, position)
        return number_of(seed, position, len(self))

    def substitute(self, seed, position, attempt):
        """The sample that takes its place if it is broken; of remote ones one of its window, which
        is here already."""
        draw = mix(mix(mix(seed, 3), position), attempt)
        if self.windows is not None:
            return self.windows.another(seed, position, draw)
        return draw % len(self)

    def here(self, number):
        """-> the path of a file on this machine; a remote one is fetched."""
        file = self.files[number]
        if not remote.is_remote(file):
            return file
        tar = self.samples.tar_of(number)
        return self.cache.copy(file, tar.bytes, tar.mark)

    def come_to(self, seed, position):
        """A run has come to this place of the stream: where a window of remote shards begins, the
        next one is fetched in the background."""
        if self.windows is None:
            return
        window, following = self.windows.around(seed, position)
        if window != self.window:
            self.window = window
            threading.Thread(target=self.fetch, args=(window + following,), daemon=True).start()

    def fetch(self, window):
        """Copy remote shards before they are needed. Errors are left to the reader."""
        with contextlib.suppress(InputError):
            for k in window:
                self.here(self.samples.tars[k][0])

    def open_file(self, number):
        for _ in range(TRIES):
            with contextlib.suppress(FileNotFoundError):
                return open(self.here(number), "rb")
            if self.cache is None:
                break
            # else another process made room in the cache between these two calls
        return open(self.here(number), "rb")

    def read(self, number, offset, size):
        try:
            with self.open_file(number) as file:
                file.seek(offset)
                return file.read(size)
        except OSError as error:  # of the disk, not of a sample
            raise InputError(f"{self.files[number]}: not readable any more ({error.strerror}); "
                             f"is the disk there? The same command goes on") from None

    def place(self, i):
        """The names of the shard and of the member that sample i is."""
        return self.named(*self.samples[i][:2])

    def named(self, number, offset):
        return place_of(self.files[number], offset, self.here(number))

    def bad(self, number, offset, kind, error):
        return BadSample(self.named(number, offset), kind, first_line(error))

    def captions(self, i):
        """-> the captions of sample i, one or more. Raises BadSample."""
        number, offset, size, _, kind = self.samples[i][3:]
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
        """-> (uint8 picture [3,R,R] or posterior, caption); draw: as in caption(). Raises
        BadSample."""
        number, offset, size = self.samples[i][:3]
        data = self.read(number, offset, size)
        try:
            if not self.encoded:
                tensor = read_pixels(data, self.resolution)
            else:
                tensor = torch.from_numpy(np.load(io.BytesIO(data))).float()
                require(self.shape in (None, tensor.shape), f"shape {tuple(tensor.shape)}")
        except Exception as error:  # whatever PIL or numpy make of broken bytes
            kind = "unreadable posterior" if self.encoded else what_is_wrong(data, error)
            raise self.bad(number, offset, kind, error) from None
        return tensor, self.caption(i, draw)

    def __getitem__(self, i):
        tensor, caption = self.sample(i, draw=0)
        return as_input(tensor), caption

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


def shards_of(args, path, name="--data"):
    """The shards at `path`, read as the options of a training say."""
    return Shards(path, args.resolution, name, args.caption_lines, args.skip_bad_shards,
                  args.cache, args.cache_gb)


def read_pixels(data, resolution):
    """Bytes of a picture -> uint8 [3,R,R], as people see it (support/pictures.py): shortest side
    resized, centre crop."""
    picture = decode(data)
    w, h = picture.size
    if (w, h) != (resolution, resolution):
        side = min(w, h)
        box = ((w - side) // 2, (h - side) // 2, (w + side) // 2, (h + side) // 2)
        picture = picture.resize((resolution, resolution), Image.Resampling.LANCZOS, box=box)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def as_input(tensors):
    """uint8 pictures -> float32 in [-1,1]; posteriors as they are. Pictures stay bytes until they
    are where they are needed: a quarter of the memory and of the way to a GPU."""
    return tensors.float() / 127.5 - 1 if tensors.dtype == torch.uint8 else tensors


def load_picture(data, resolution):
    """Bytes of a picture -> [3,R,R] in [-1,1]: see read_pixels."""
    return as_input(read_pixels(data, resolution))


@functools.lru_cache(maxsize=2)
def permutation(seed, epoch, count):
    # int32 draws what int64 does, and takes half of the memory
    return torch.randperm(
        count, generator=torch.Generator().manual_seed(mix(seed, epoch)), dtype=torch.int32)


def number_of(seed, position, count):
    """The sample, of `count`, at a place of the stream where each epoch is a fresh permutation."""
    epoch, place = divmod(position, count)
    return permutation(seed, epoch, count)[place].item()


def mix(seed, number):
    """Two integers -> one 63-bit seed. Neighbours give unrelated seeds (the finaliser of
    splitmix64)."""
    z = (seed * 0x9E3779B97F4A7C15 + number * 0xD1B54A32D192ED03 + 0x2545F4914F6CDD1D) & (2**64 - 1)
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
    return (z ^ (z >> 31)) >> 1


class Windows:
    """The order of samples whose shards are fetched one after the other: each epoch draws another
    row of the shards, cuts it into windows of `size`, and permutes the samples of each window.

    counts: samples of each shard. Shards go by their places in it."""

    def __init__(self, counts, size):
        self.counts, self.size = np.array(counts), size
        self.ends = np.cumsum(self.counts)  # of the shards' numbers of samples

    def find(self, seed, position):
        """-> a seed for the window that this place of the stream falls into, its shards, the place
        in it"""
        epoch, place = divmod(position, int(self.ends[-1]))
        seed = mix(mix(seed, 4), epoch)
        row = permutation_of_shards(seed, len(self.counts))
        ends = np.cumsum(self.counts[row])
        window = int(np.searchsorted(ends, place, "right")) // self.size
        first = window * self.size
        place -= int(ends[first - 1]) if window else 0
        return mix(seed, window), row[first:first + self.size], place

    def pick(self, shards, place):
        """The sample at a place of some shards laid end to end."""
        ends = np.cumsum(self.counts[shards])
        k = int(np.searchsorted(ends, place, "right"))
        return int(self.ends[shards[k]]) - int(ends[k]) + place

    def number(self, seed, position):
        seed, shards, place = self.find(seed, position)
        return self.pick(shards, number_of(seed, place, int(self.counts[shards].sum())))

    def another(self, seed, position, draw):
        """A sample of the window that this place falls into. draw: a random integer"""
        _, shards, _ = self.find(seed, position)
        return self.pick(shards, draw % int(self.counts[shards].sum()))

    def around(self, seed, position):
        """-> the shards of the window that this place falls into, and of the window after it"""
        _, shards, place = self.find(seed, position)
        following = position - place + int(self.counts[shards].sum())
        return shards.tolist(), self.find(seed, following)[1].tolist()


@functools.lru_cache(maxsize=4)
def permutation_of_shards(seed, count):
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).numpy()


class StepSampler:
    """Yields, for step first, first+1, ...: (sample number, position) of this rank's rows of the
    global batch. Step k takes the positions k*G .. (k+1)*G - 1 of the stream, G = rows * world.

    shards: the Shards whose order and remote files are wanted; with None each epoch is a fresh
    permutation of `count`."""

    def __init__(self, count, seed, first, last, rows, rank=0, world=1, shards=None):
        self.seed, self.steps, self.shards = seed, range(first, last), shards
        self.rows, self.rank, self.world = rows, rank, world
        self.number = shards.number if shards else functools.partial(number_of, count=count)

    def __len__(self):
        return len(self.steps)

    def __iter__(self):
        for step in self.steps:
            places = positions(step, self.rows, self.rank, self.world)
            if self.shards is not None:
                self.shards.come_to(self.seed, places[0])
            yield [(self.number(self.seed, position), position) for position in places]


class Stream(torch.utils.data.Dataset):
    """Shards as a run draws them. Item (number, position) -> tensor (see Shards.sample), caption,
    [(place, kind, reason) of each broken sample that came up before].

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
                number = self.shards.substitute(self.seed, position, attempt)
        place, kind, reason = broken[-1]
        raise InputError(f"{TRIES} samples drawn one after the other were broken, the last one "
                         f"{place}: {kind} ({reason}); are these the right shards?")


def positions(step, rows, rank=0, world=1):
    """The places in the endless stream of samples that this rank's `rows` rows of a step take."""
    first = (step * world + rank) * rows
    return range(first, first + rows)


def random_draws(seed, places, shape, device, side=None):
    """Everything random about the samples at `places` of the stream, as plain variates.

    -> posterior_noise and noise [B,*shape], unit normal; u_w and u_s [B], uniform in [0,1): for
    the guidance weight and for the timestep. What law they follow is the method's affair
    (train.distillation_loss). One generator per sample, so nothing depends on batch, rank or
    number of processes.
    side: of the pictures; then after these u_view [B,3], uniform, and view_noise [B,3,side,side],
    unit normal, for the way that a reward sees them (brakes.jittered)."""
    rows = []
    for place in places:
        g = torch.Generator().manual_seed(mix(mix(seed, 1), place))
        row = [torch.randn(shape, generator=g), torch.randn(shape, generator=g),
               torch.rand((), generator=g), torch.rand((), generator=g)]
        if side is not None:
            row += [torch.rand(3, generator=g), torch.randn(3, side, side, generator=g)]
        rows.append(row)
    return [torch.stack(column).to(device, non_blocking=True) for column in zip(*rows)]


def batches(shards, seed, first, last, rows, rank=0, world=1, workers=0, broken=None):
    """Yields for steps first..last-1: tensors [rows,...] for as_input, captions. broken: what
    counts broken samples (support/broken.py)."""
    loader = torch.utils.data.DataLoader(
        Stream(shards, seed), num_workers=workers, pin_memory=torch.cuda.is_available(),
        batch_sampler=StepSampler(len(shards), seed, first, last, rows, rank, world, shards),
        collate_fn=collate, worker_init_fn=leave_signals if workers else None)
    for tensors, captions, found in loader:
        if broken is not None:
            broken.add(found)
        yield tensors, captions


def leave_signals(_):
    """Ctrl-C and torchrun's SIGTERM reach data loading processes too, which are needed until their
    run has finished its step. The run stops them, and they notice its death."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def names_of_step(shards, seed, step, rows, rank=0, world=1):
    """-> shard and member of each sample that this rank's rows of a step draw, not counting what
    takes the place of broken ones."""
    return [shards.place(shards.number(seed, position))
            for position in positions(step, rows, rank, world)]


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
        "shards to encode: tars, a folder of them or of pictures, a glob, or {00000..01099}.tar; "
        "here or at https://, s3://, hf://",
        group="what to encode", several=True)
    out: str = option("runs/encoded", "folder for the encoded shards")
    model: str = option(str(POCKET), "model folder whose VAE encodes")
    resolution: int = option(64, "side of the square pictures in pixels")
    skip_bad_shards: bool = option(False, "go on without damaged tars (config.json names them)")
    cache: str | None = option(None, "folder for copies of remote shards: ~/.cache/rg-lcd/shards")
    cache_gb: float = option(20.0, "GB of them that are kept at most")
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
    groups = {}
    for number, numbers in shards.samples.groups():
        if number is None:
            for start in range(0, len(numbers), FOLDER):
                groups[f"pictures-{start // FOLDER:05d}.tar"] = numbers[start:start + FOLDER]
        elif numbers:
            name = remote.name_of(shards.files[number])
            require(name not in groups,
                    "--data: two shards of the same name; encode them into separate folders")
            groups[name] = numbers
    return groups


@torch.no_grad()
def main():
    from vae import VAE
    args = parse(Config(), __doc__)
    at_least(1, args, "batch")
    device = cli.pick_device(args.device)
    dtype = cli.pick_precision(args.precision, device)
    vae = VAE.from_pretrained(args.model, device=device)
    shards = Shards(args.data, args.resolution, skip_bad=args.skip_bad_shards,
                    cache=args.cache, cache_gb=args.cache_gb)
    require(not shards.encoded, f"{args.data}: already encoded")
    groups, here = groups_to_encode(shards), Path(args.out).resolve()
    require(all(Path(file).resolve().parent != here
                for file in shards.files if not remote.is_remote(file)),
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
