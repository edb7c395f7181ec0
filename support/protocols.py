"""What an evaluation is made on: prompts from the files that people have, and published protocols
by name, to the letter. Each says in its docstring where it is from.

    NAME.txt             one prompt a line
    NAME.tsv             PartiPrompts: a line of titles, then prompts in the column Prompt
    NAME.json            a list of prompts, or COCO's captions (annotations, images)
    NAME.jsonl           GenEval: one object a line, with "prompt"
    a folder             of DPG-Bench's NAME.txt, one prompt a file; of HPSv2's four STYLE.json
"""
import io
import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from support.cli import require
from support.pictures import decode
from support.shards import PICTURES
from support.weights import InputError, first_line, load_torch, whole_file, write_whole

STYLES = ("anime", "concept-art", "paintings", "photo")  # of HPSv2
# of CLIPScore: the model, and what stands before each prompt
CLIPSCORE, DEPICTS = "clip:ViT-g-14:laion2b_s12b_b42k", "A photo depicts "


@dataclass
class Task:
    """What an evaluation is made on, and how."""
    source: str
    prompts: list
    protocol: str | None = None
    real: Callable | None = None  # numbers of prompts -> their real pictures, PIL
    reference: list | None = None  # files of the pictures that distances are to; None: the real
    n: int = 4  # pictures a prompt
    seen: Callable | None = None  # (PIL, suffix of its file) -> the picture that scorers get
    parts: dict = field(default_factory=dict)  # {folder of pictures: how many prompts it holds}
    rewards: tuple = ()  # what the protocol scores with: the first, unless another is given
    features: str | None = None
    # scores [N] by the protocol's reward -> {name: (mean, low, high, of what)}
    summary: Callable | None = None
    # (folder, number of a prompt, its n pictures): writes what the benchmark's own scorer reads
    write: Callable | None = None
    full: int | None = None  # prompts of the whole protocol
    full_reference: int | None = None  # and real pictures

    def name(self):
        """The protocol's, which says when it was cut short."""
        words = self.protocol
        if self.full not in (None, len(self.prompts)):
            words += f", on {len(self.prompts):,} of its {self.full:,} prompts"
        if self.full_reference not in (None, len(self.reference or ())):
            words += (f", against {len(self.reference):,} of its {self.full_reference:,} real "
                      "pictures")
        return words


# ------------------------------------------------------------------------------------- prompt files

def read_text(file):
    try:
        return Path(file).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: not readable ({error}); expected a UTF-8 file of prompts"
                         ) from None


def read_objects(file):
    """The JSON of a file, or of each line of a .jsonl -> list or dict"""
    text = read_text(file)
    try:
        if Path(file).suffix == ".jsonl":
            return [json.loads(line) for line in text.splitlines() if line.strip()]
        return json.loads(text)
    except ValueError as error:
        raise InputError(f"{file}: not readable as JSON ({error})") from None


def strings(found, file, expected="a JSON list of prompts"):
    good = isinstance(found, list) and found and all(isinstance(one, str) for one in found)
    require(good, f"{file}: expected {expected}")
    return found


def read_lines(file):
    """Prompts of a text file, one a line; empty lines are none."""
    lines = [line.strip() for line in read_text(file).splitlines()]
    return strings([line for line in lines if line], file, "one prompt a line")


def read_tsv(file):
    """The column Prompt. Quotation marks are part of a prompt, not of the format: one begins
    with them, and csv readers would take them away."""
    titles, *lines = read_text(file).splitlines() or [""]
    column = titles.split("\t")
    require("Prompt" in column, f"{file}: expected a line of titles with Prompt, as "
            f"PartiPrompts.tsv has it; found {titles[:60]!r}")
    column = column.index("Prompt")
    rows = [line.split("\t") for line in lines if line.strip()]
    require(all(len(row) > column for row in rows), f"{file}: a line without a prompt")
    return strings([row[column].strip() for row in rows], file, "prompts")


def read_geneval(file):
    """-> the objects of evaluation_metadata.jsonl."""
    found = read_objects(file)
    good = isinstance(found, list) and found and all(
        isinstance(one, dict) and isinstance(one.get("prompt"), str) for one in found)
    require(good, f"{file}: expected one object with \"prompt\" a line, as GenEval's "
            "prompts/evaluation_metadata.jsonl")
    return found


def read_coco(file, count=None):
    """COCO's captions_*.json -> [(prompt, file name of its picture)], one of each picture: the
    caption of the smallest id, in the order of pictures' ids; count: so many, drawn with seed 0."""
    found = read_objects(file)
    try:
        names = {one["id"]: one["file_name"] for one in found["images"]}
        captions = {}
        for one in sorted(found["annotations"], key=lambda one: one["id"]):
            captions.setdefault(one["image_id"], one["caption"].strip())
        pairs = [(captions[i], names[i]) for i in sorted(captions)]
    except (KeyError, TypeError, AttributeError):
        raise InputError(f"{file}: expected COCO's images and annotations, as in "
                         "annotations/captions_val2014.json") from None
    if count is not None and count < len(pairs):
        chosen = sorted(random.Random(0).sample(range(len(pairs)), count))
        pairs = [pairs[i] for i in chosen]
    return pairs


def read_folder(folder):
    """DPG-Bench's prompts/ -> {name of the file without .txt: prompt}"""
    files = sorted(Path(folder).glob("*.txt"), key=lambda file: natural(file.name))
    require(files, f"{folder}: no prompts there; expected NAME.txt, one prompt a file, as in "
            "DPG-Bench's dpg_bench/prompts")
    return {file.stem: read_text(file).strip() for file in files}


def natural(name):
    """Sorts 2 before 10."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part)
            for part in re.split(r"(\d+)", name) if part]


def read_hpsv2(folder):
    """-> {style: prompts} of the benchmark's four JSON files."""
    found = {}
    for style in STYLES:
        file = Path(folder) / f"{style}.json"
        require(file.is_file(), f"{folder}: no {file.name}; expected {', '.join(STYLES)}.json, the "
                "files benchmark/ of the hub's data set zhwang/HPDv2")
        found[style] = strings(read_objects(file), file)
    return found


def read_prompts(path):
    """The prompts of whatever file or folder `path` is."""
    path = Path(path)
    if path.is_dir():
        if (path / f"{STYLES[0]}.json").is_file():
            return sum(read_hpsv2(path).values(), [])
        return list(read_folder(path).values())
    readers = {".txt": read_lines, ".tsv": read_tsv,
               ".jsonl": lambda file: [one["prompt"] for one in read_geneval(file)]}
    require(path.suffix in (*readers, ".json"),
            f"{path}: expected prompts as .txt, .tsv, .json, .jsonl, or a folder")
    if path.suffix in readers:
        return readers[path.suffix](path)
    found = read_objects(path)
    return [caption for caption, _ in read_coco(path)] if isinstance(found, dict) \
        else strings(found, path)


def is_prompts(path):
    """Is this a file of prompts, not shards?"""
    return Path(path).suffix in (".txt", ".tsv", ".json", ".jsonl")


# ------------------------------------------------------------------------------------- protocols

def counted(prompts, full, path, name):
    require(len(prompts) == full, f"{path}: {len(prompts):,} prompts; {name} has {full:,}")
    return prompts


def hpsv2(path, limit=None, reference=None):
    """HPS v2's benchmark: 4 styles of 800 prompts, one picture each, saved by Pillow as JPEG with
    its defaults; the score is the cosine x 100. Of a style: mean and standard deviation (over n)
    of the means of groups of 80; the average is over all pictures.

    tgxs002/HPSv2 at 866735e: README.md (custom evaluation: STYLE/%05d.jpg), hpsv2/evaluation.py
    (evaluate_benchmark). It computes in half precision on GPUs, and resizes as reward.load_reward
    says. path: the folder of the four JSON files. limit: the first of each style."""
    styles = read_hpsv2(path)
    for style, prompts in styles.items():
        counted(prompts, 800, Path(path) / f"{style}.json", "each style of hpsv2")
    if limit:
        require(limit >= 4, f"--limit {limit}: expected 4 or more, as hpsv2 has four styles")
        styles = {style: prompts[:limit // 4] for style, prompts in styles.items()}
    ends = np.cumsum([len(prompts) for prompts in styles.values()])

    def summary(scores):
        scores, found = 100 * np.asarray(scores), {}
        for style, part in zip(styles, np.split(scores, ends[:-1])):
            groups = [part[i:i + 80].mean() for i in range(0, len(part), 80)]
            mean, deviation = float(np.mean(groups)), float(np.std(groups))
            found[style] = (mean, mean - deviation, mean + deviation, "groups of 80")
        return found | {"average": (float(scores.mean()), None, None, None)}

    def write(folder, number, pictures):
        part = int(np.searchsorted(ends, number, "right"))
        place = number - (int(ends[part - 1]) if part else 0)
        with new_file(folder / list(styles)[part] / f"{place:05d}.jpg") as file:
            pictures[0].save(file, "JPEG")

    return Task(str(path), sum(styles.values(), []), "hpsv2", n=1, seen=as_jpeg, write=write,
                parts={style: len(prompts) for style, prompts in styles.items()},
                rewards=("hpsv2.1", "hpsv2"), summary=summary, full=3200)


def as_jpeg(picture, suffix=""):
    """As it is once Pillow has saved it as JPEG by its defaults (quality 75, 4:2:0)."""
    if suffix.lower() in (".jpg", ".jpeg"):
        return picture  # saved so already
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG")
    return Image.open(buffer).convert("RGB")


def coco2014(path, limit=None, reference=None):
    """Zero-shot FID on COCO 2014: 30,000 captions of val2014 with one picture each, against all
    40,504 pictures of val2014; both cut to the square in the middle and resized to 256 by
    Pillow's Lanczos filter. Three pictures a prompt give three FIDs of 30,000 each, whose mean
    and spread are shown.

    mingukkang/GigaGAN at b2d3716, evaluation/evaluation.py and data_util.py; the same in
    tianweiy/DMD2 at 8d8fa55, main/coco_eval/coco_evaluator.py. These take clean-fid's Inception,
    which enlarges to 299 by Pillow's bicubic filter; torch-fidelity's does by TensorFlow 1's
    bilinear one, as the FID's first code, so theirs and ours differ by that step. Which 30,000
    captions: DMD2's main/coco_eval/captions_coco14_test.txt fixes them, one a line (path); of
    COCO's captions_val2014.json our own choice is drawn (read_coco). reference: the folder
    val2014."""
    require(reference, "--protocol coco2014-30k-256 needs --reference, COCO's folder val2014")
    return captions_2014(path, limit, reference, protocol="coco2014-30k-256",
                         features="inception", full_reference=40_504)


def captions_2014(path, limit, reference, **more):
    """-> Task of the 30,000 captions, whose pictures are seen as squares of 256."""
    full = 30_000
    if Path(path).suffix == ".json":
        pairs = read_coco(path, full)
        prompts, names = [caption for caption, _ in pairs], [name for _, name in pairs]
    else:
        prompts, names = read_lines(path), None
    counted(prompts, full, path, more["protocol"])
    files = pictures_in(reference) if reference else None
    real = None
    if files and names:
        by_name = {file.name: file for file in files}
        missing = [name for name in names if name not in by_name]
        require(not missing, f"{reference}: no {(missing or [''])[0]}, which {path} names; "
                "expected the folder val2014")
        real = lambda numbers: [open_picture(by_name[names[i]]) for i in numbers]
    return Task(str(path), prompts[:limit], real=real, reference=files, n=1, seen=square_256,
                full=full, **more)


def square_256(picture, suffix=""):
    """The square in the middle, at 256 pixels by Lanczos."""
    width, height = picture.size
    side = min(width, height)
    left, top = round((width - side) / 2), round((height - side) / 2)
    square = picture.crop((left, top, left + side, top + side))
    return square.resize((256, 256), Image.Resampling.LANCZOS)


def clipscore_g14(path, limit=None, reference=None):
    """CLIP score as papers on few-step students print it: the mean cosine by open_clip's ViT-g-14
    laion2b_s12b_b42k of "A photo depicts " + caption and the picture, cut and resized to 256 as
    in coco2014-30k-256, of the same 30,000 captions. No factor of 2.5.

    mingukkang/GigaGAN at b2d3716, evaluation/evaluation.py (compute_clip_score)."""
    return captions_2014(path, limit, reference, protocol="clipscore-g14",
                         rewards=("clipscore",))


def partiprompts(path, limit=None, reference=None):
    """PartiPrompts (P2), 1,632 prompts: google-research/parti at 5a65797, PartiPrompts.tsv. It
    fixes no score and no number of pictures."""
    prompts = counted(read_tsv(path), 1632, path, "PartiPrompts")
    return Task(str(path), prompts[:limit], "partiprompts", full=1632)


def geneval(path, limit=None, reference=None):
    """GenEval: 553 prompts, 4 pictures each, as NUMBER/samples/%04d.png beside the prompt's line
    in NUMBER/metadata.jsonl, which its evaluation/evaluate_images.py reads.

    djghosh13/geneval at af4902f: README.md, prompts/evaluation_metadata.jsonl (path)."""
    lines = counted(read_geneval(path), 553, path, "GenEval")[:limit]

    def write(folder, number, pictures):
        place = folder / f"{number:05d}"
        (place / "samples").mkdir(parents=True, exist_ok=True)
        write_whole(place / "metadata.jsonl", json.dumps(lines[number]))
        for i, picture in enumerate(pictures):
            with new_file(place / "samples" / f"{i:04d}.png") as file:
                picture.save(file, "PNG")

    return Task(str(path), [line["prompt"] for line in lines], "geneval", write=write, full=553)


def dpg_bench(path, limit=None, reference=None):
    """DPG-Bench: 1,065 prompts, 4 pictures each as one of 2x2, named as the prompt's file, in a
    folder that holds nothing else; its --resolution is the side of one.

    TencentQQGYLab/ELLA at 3c228f1: README.md, dpg_bench/compute_dpg_bench.py; prompts in
    dpg_bench/prompts (path)."""
    found = counted(read_folder(path), 1065, path, "DPG-Bench")
    names = list(found)[:limit]

    def write(folder, number, pictures):
        width, height = pictures[0].size
        sheet = Image.new("RGB", (2 * width, 2 * height))
        for i, picture in enumerate(pictures[:4]):  # left to right, then down
            sheet.paste(picture, (i % 2 * width, i // 2 * height))
        with new_file(folder / f"{names[number]}.png") as file:
            sheet.save(file, "PNG")

    return Task(str(path), [found[name] for name in names], "dpg-bench", write=write, full=1065)


PROTOCOLS = {"hpsv2": hpsv2, "coco2014-30k-256": coco2014, "clipscore-g14": clipscore_g14,
             "partiprompts": partiprompts, "geneval": geneval, "dpg-bench": dpg_bench}


def write_layout(rows, task, out):
    """The pictures of each model in the rows of results.json, which lies in `out`, in the folders
    that the benchmark's own scorer reads."""
    for row in rows:
        if row["kind"] in ("teacher", "student"):
            name = "".join(c if c.isalnum() or c in "-." else "_" for c in row["name"])
            folder = out / task.protocol / name
            for i, files in enumerate(row["pictures"]):
                task.write(folder, i, [open_picture(out / file) for file in files[:task.n]])
            print(folder)


def new_file(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    return whole_file(path)


# ------------------------------------------------------------------------------------- pictures

def open_picture(file):
    """A picture file -> PIL, RGB, as people see it."""
    try:
        return decode(Path(file).read_bytes())
    except Exception as error:  # whatever PIL makes of broken bytes
        raise InputError(f"{file}: not a readable picture ({first_line(error)})") from None


def pictures_in(folder):
    """The picture files of a folder, in the order of their names' numbers."""
    require(Path(folder).is_dir(), f"{folder}: no such folder; expected one of pictures")
    files = [file for file in Path(folder).iterdir()
             if file.suffix.lower() in PICTURES and not file.name.startswith(".")]
    require(files, f"{folder}: no pictures there")
    return sorted(files, key=lambda file: natural(file.name))


def numbered(folder, count):
    """Pictures drawn elsewhere -> their files, [[one of each seed] of each of `count` prompts].

    Names are the prompt's number, or PROMPT_SEED, with any words before it: 00012.png, 12_0.jpg.
    Numbers begin at 0 or 1 and leave none out."""
    found = {}
    for file in pictures_in(folder):
        numbers = re.search(r"(\d+)(?:_(\d+))?$", file.stem)
        require(numbers, f"{file}: a picture without a number; expected 00012.png, or 00012_3.png "
                "for its fourth picture")
        prompt, seed = int(numbers[1]), int(numbers[2] or 0)
        require((prompt, seed) not in found, f"{folder}: two pictures number {prompt}, seed {seed}")
        found[prompt, seed] = file
    first = min(prompt for prompt, _ in found)
    numbers = {prompt for prompt, _ in found}
    have = sum(first + i in numbers for i in range(count))
    require(first in (0, 1) and have == count,
            f"folder:{folder}: {len(numbers):,} pictures, of which {have:,} have the numbers of "
            f"the {count:,} prompts; expected one of each, counted from 0 or 1")
    rows = []
    for i in range(first, first + count):
        rows.append([found[key] for key in sorted(key for key in found if key[0] == i)])
    return rows


def find_drawn(folder, task):
    """numbered() for a task, whose pictures may lie by parts -> the same number of files each."""
    parts = task.parts if all((Path(folder) / part).is_dir() for part in task.parts) else {}
    if parts:
        rows = sum((numbered(Path(folder) / part, count) for part, count in parts.items()), [])
    else:
        rows = numbered(folder, len(task.prompts))
    seeds = min(map(len, rows))
    return [row[:seeds] for row in rows]


# ------------------------------------------------------------------------------------- Inception

def inception(path, device):
    """torch-fidelity's Inception, the extra `evaluate` -> a function: images [B,3,H,W] in [0,1] ->
    features [B,2048]. path: its weights-inception-2015-12-05-6726825d.pth; None: from its cache,
    or fetched into it."""
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError:
        raise InputError("--features inception needs the package torch-fidelity: "
                         "pip install 'rg-lcd[evaluate]'") from None
    if path:
        require(Path(path).is_file(), f"--features inception={path}: no such file")
        load_torch(path)  # for its refusal of a pickle that runs code: torch-fidelity's opens any
    try:
        network = FeatureExtractorInceptionV3("inception", ["2048"], path or None).to(device)
    except Exception as error:
        remedy = "give the release's weights-inception-2015-12-05-6726825d.pth"
        raise InputError(f"--features inception: no weights ({first_line(error)}); {remedy} as "
                         "inception=FILE") from None

    def features(images):
        return network((images * 255).round().to(torch.uint8).to(device))[0]
    return features
