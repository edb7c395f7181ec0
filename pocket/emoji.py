"""The pocket's pictures: the same words drawn in six styles, from seven npm packages.

`read_families` renders them to captioned 64x64 pictures, `hold_out` draws the pairs of concept and
style that no generator and no reward sees, `write_shards` puts them into webdataset tars. Used by
build.py's stage `data`; needs resvg-py (`pip install resvg-py`), which draws SVG.
"""
import collections
import io
import json
import random
import re
import tarfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from data import add_pair
from support.cli import require

SIZE = 64  # pixels a side
COLOURS = 128  # a picture
# the word that ends a caption -> (the .tgz of `npm pack`, without its version; licence)
STYLES = {
    "3d": ("lobehub-fluent-emoji-3d", "MIT"),
    "gradient": ("iconify-json-fluent-emoji", "MIT"),
    "flat": ("iconify-json-fluent-emoji-flat", "MIT"),
    "noto": ("iconify-json-noto", "Apache-2.0"),
    "blob": ("iconify-json-noto-v1", "Apache-2.0"),
    "twemoji": ("iconify-json-twemoji", "CC-BY-4.0"),
}
WORDS = "emojibase-data"
TONES = 1  # skin tones kept of each person and style beside the plain one, of 5 to 25
# how many pairs of concept and style are held out, and of how many concepts all styles
SPLITS = {"heldout": 256, "validation": 128, "unseen": 64}
FLAGS, NO_WORDS = 9, (None, 2)  # emojibase's groups: flags; single letters and swatches of skin


@dataclass(frozen=True)
class Word:
    """An emoji by name. concept: its name without tone or direction, one for all that look alike
    but for these; tags: what else it is called, the most frequent first, three at most."""
    label: str
    concept: str
    tags: tuple
    group: int
    plain: bool  # no skin tone


@dataclass(frozen=True)
class Sample:
    code: str  # hexcode without variation selectors
    style: str
    word: Word
    pixels: bytes  # RGB, SIZE x SIZE

    @property
    def caption(self):
        """The first comma ends the label, the last begins the style."""
        return ", ".join([self.word.label.replace(", ", " and "), *self.word.tags, self.style])


def package(folder, stem):
    """The one .tgz of an npm package in a folder, whatever its version."""
    found = [file for file in sorted(folder.glob(f"{stem}-*.tgz"))
             if re.fullmatch(re.escape(stem) + r"-\d[^-]*\.tgz", file.name)]
    require(len(found) == 1, f"--packages {folder}: expected one {stem}-VERSION.tgz of `npm pack`, "
                             f"found {', '.join(f.name for f in found) or 'none'}")
    return found[0]


def read_json(tar, name):
    return json.load(tar.extractfile(f"package/{name}"))


def plain_code(code):
    return code.lower().replace("-fe0f", "")


def read_words(folder):
    """-> {code: Word} of every emoji with a name."""
    with tarfile.open(package(folder, WORDS)) as tar:
        entries = read_json(tar, "en/data.json")
    frequency = collections.Counter(tag for entry in entries for tag in entry.get("tags", []))
    words = {}
    for entry in entries:
        if entry.get("group") in NO_WORDS:
            continue
        for emoji in [entry, *entry.get("skins", [])]:
            label = emoji["label"]
            tags = [tag for tag in entry.get("tags", []) if tag not in label.lower()]
            tags.sort(key=lambda tag: (-frequency[tag], tag))
            kept = tags[:3] if emoji is entry else []  # a label with tones is long enough
            concept = entry["label"].removesuffix(" facing right")
            words[plain_code(emoji["hexcode"])] = Word(
                label, concept, tuple(kept), entry["group"], emoji is entry)
    return words


def read_names(folder):
    """-> {name of an icon: code}. Not every package lists its own, but they share the names."""
    names = {}
    for stem, _ in STYLES.values():
        with tarfile.open(package(folder, stem)) as tar:
            if "package/chars.json" in tar.getnames():
                for code, name in read_json(tar, "chars.json").items():
                    names.setdefault(name, plain_code(code))
    return names


def read_sources(file, names):
    """-> {code: bytes of a picture, or an SVG} of one package."""
    sources = {}
    with tarfile.open(file) as tar:
        if "package/icons.json" not in tar.getnames():
            for member in tar:
                if member.name.endswith(".webp"):
                    code = plain_code(Path(member.name).stem)
                    sources[code] = tar.extractfile(member).read()
            return sources
        icons = read_json(tar, "icons.json")
    for name, icon in icons["icons"].items():
        if name in names:
            width, height = (icon.get(side, icons[side]) for side in ("width", "height"))
            sources[names[name]] = (
                '<svg xmlns="http://www.w3.org/2000/svg" '
                'xmlns:xlink="http://www.w3.org/1999/xlink" '
                f'viewBox="0 0 {width} {height}">{icon["body"]}</svg>')
    return sources


def render(source):
    """Bytes of a picture or an SVG -> RGB bytes on white, SIZE x SIZE, reduced from four times
    that."""
    if isinstance(source, str):
        import resvg_py
        source = bytes(resvg_py.svg_to_bytes(svg_string=source, width=4 * SIZE, height=4 * SIZE,
                                             skip_system_fonts=True))
    picture = Image.open(io.BytesIO(source)).convert("RGBA")
    picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB").resize((SIZE, SIZE), Image.Resampling.LANCZOS).tobytes()


def choose_tones(codes, words, style):
    """Of each person the plain picture and TONES others: tones are most of every set, and teach
    less than other things."""
    tones = collections.defaultdict(list)
    for code in sorted(codes):
        tones[words[code].concept, words[code].plain].append(code)
    kept = []
    for (concept, plain), found in tones.items():
        rng = random.Random(f"{style} {concept}")
        kept += found if plain else rng.sample(found, min(TONES, len(found)))
    return kept


def read_families(folder):
    """-> every Sample that is kept, in a random order."""
    words, names, samples = read_words(folder), read_names(folder), []
    with ProcessPoolExecutor() as pool:
        for style, (stem, _) in STYLES.items():
            sources = read_sources(package(folder, stem), names)
            named = sources.keys() & words.keys()
            kept = choose_tones(named, words, style)
            pictures = pool.map(render, [sources[code] for code in kept], chunksize=32)
            samples += [Sample(code, style, words[code], pixels)
                        for code, pixels in zip(kept, pictures)]
            print(f"data: {style}: {len(kept)} of {len(sources)} pictures; left out: "
                  f"{len(sources) - len(named)} without a name in {WORDS}, "
                  f"{len(named) - len(kept)} skin tones", flush=True)
    samples.sort(key=lambda sample: (sample.style, sample.code))
    random.Random(0).shuffle(samples)
    return samples


def hold_out(samples):
    """-> {split: its samples}, with "train" among the splits; a concept is in one of the others at
    most.

    unseen: concepts that are in training in no style, each in one style. heldout, validation: pairs
    of concept and style whose concept is in training in at least two other styles. Flags are in
    training alone. A picture that equals one of another name stays there too."""
    by_concept = collections.defaultdict(list)
    for sample in samples:
        by_concept[sample.word.concept].append(sample)
    copies = collections.Counter(sample.pixels for sample in samples)
    splits = collections.defaultdict(list)
    rng = random.Random(1)
    candidates = [sample for sample in samples
                  if sample.word.plain and sample.word.group != FLAGS
                  and copies[sample.pixels] == 1
                  and len({other.style for other in by_concept[sample.word.concept]}) >= 3]
    rng.shuffle(candidates)
    taken = set()  # concepts
    for split, count in SPLITS.items():
        for sample in candidates:
            if len(splits[split]) < count and sample.word.concept not in taken:
                splits[split].append(sample)
                taken.add(sample.word.concept)
    gone = {(sample.word.concept, sample.style) for split in splits.values() for sample in split}
    never = {sample.word.concept for sample in splits["unseen"]}
    splits["train"] = [sample for sample in samples
                       if (sample.word.concept, sample.style) not in gone
                       and sample.word.concept not in never]
    return dict(splits)


def encode(pixels):
    """RGB bytes -> lossless WebP of COLOURS colours. At 1.5 kB a picture that comes within 38 (3d)
    to 50 dB (flat) of the original; lossy WebP of that size, which halves the resolution of
    colours, within 32 to 34."""
    picture = Image.frombytes("RGB", (SIZE, SIZE), pixels)
    picture = picture.quantize(COLOURS, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, "WEBP", lossless=True, quality=100, method=4)
    return buffer.getvalue()


def write_shards(splits, folder):
    folder.mkdir(parents=True, exist_ok=True)
    for split, samples in splits.items():
        with tarfile.open(folder / f"{split}-000.tar", "w") as tar:
            for sample in samples:
                add_pair(tar, f"{sample.style}-{sample.code}", "webp", encode(sample.pixels),
                         sample.caption)
        styles = collections.Counter(sample.style for sample in samples)
        print(f"data: {split}: {len(samples)} pictures,",
              ", ".join(f"{count} {style}" for style, count in styles.most_common()))
