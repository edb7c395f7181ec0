"""pocket/emoji.py: which pictures are kept, and which are held out."""
import io
import json
import sys
import tarfile
from collections import Counter

import pytest
from PIL import Image

from conftest import ROOT
from support.weights import InputError

sys.path.insert(0, str(ROOT / "pocket"))
import emoji
from emoji import FLAGS, SPLITS, STYLES, Sample, Word


def samples(concepts=1200):
    """As many concepts, most of them in all styles, people with a skin tone, flags, some pictures
    under two names."""
    found = []
    for i in range(concepts):
        group = FLAGS if i % 10 == 0 else 1 if i % 3 == 0 else 4
        styles = list(STYLES)[:2] if i % 7 == 0 else list(STYLES)
        for style in styles:
            for tone in ("", ": dark skin tone")[:2 if group == 1 else 1]:
                word = Word(f"word {i}{tone}", f"word {i}", ("tag",), group, not tone)
                pixels = b"twice" if i % 50 == 1 else f"{i} {style} {tone}".encode()
                found.append(Sample(f"{i:x}", style, word, pixels))
    return found


def test_what_is_held_out_is_in_no_training_by_picture_caption_or_pair():
    splits = emoji.hold_out(samples())
    assert {name: len(splits[name]) for name in SPLITS} == SPLITS
    train = splits.pop("train")
    pair = lambda sample: (sample.word.concept, sample.style)
    for fact in (pair, lambda s: s.caption, lambda s: s.pixels):
        held = Counter(fact(sample) for split in splits.values() for sample in split)
        assert max(held.values()) == 1 and not held.keys() & {fact(sample) for sample in train}
    never = {sample.word.concept for sample in splits["unseen"]}
    assert not never & {sample.word.concept for sample in train}


def test_the_concept_of_a_held_out_pair_is_in_training_in_two_other_styles_at_least():
    splits = emoji.hold_out(samples())
    styles = {}
    for sample in splits["train"]:
        styles.setdefault(sample.word.concept, set()).add(sample.style)
    for sample in splits["heldout"] + splits["validation"]:
        assert len(styles[sample.word.concept] - {sample.style}) >= 2


def test_flags_and_skin_tones_are_never_held_out():
    splits = emoji.hold_out(samples())
    for name in SPLITS:
        assert all(s.word.plain and s.word.group != FLAGS for s in splits[name])


def test_of_the_skin_tones_of_a_person_one_is_kept_beside_the_plain_picture():
    words = {f"{i}{tone}": Word(f"{i}{tone}", str(i), (), 1, not tone)
             for i in range(20) for tone in ("", "-a", "-b", "-c")}
    kept = emoji.choose_tones(words, words, "flat")
    tones = Counter(code.partition("-")[2] for code in kept)
    assert tones[""] == 20 and tones.total() == 40 and len(tones) > 2
    assert kept == emoji.choose_tones(words, words, "flat")  # the same at each time
    assert kept != emoji.choose_tones(words, words, "noto")


def test_a_caption_is_label_tags_and_style():
    word = Word("man, running", "man, running", ("race", "fast"), 1, True)
    assert Sample("1", "blob", word, b"").caption == "man and running, race, fast, blob"


def pack(folder, name, **files):
    with tarfile.open(folder / name, "w:gz") as tar:
        for file, content in files.items():
            data = json.dumps(content).encode()
            info = tarfile.TarInfo(f"package/{file.replace('__', '/')}.json")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def test_words_have_the_most_frequent_tags_first_and_toned_ones_none(tmp_path):
    entry = {"label": "person walking facing right", "hexcode": "1F6B6-FE0F", "group": 1,
             "tags": ["hike", "walk", "man", "stroll", "walking"],
             "skins": [{"label": "person walking: dark skin tone", "hexcode": "1F6B6-1F3FF"}]}
    others = [{"label": f"x{i}", "hexcode": f"{i}", "group": 4, "tags": ["man", "stroll"][:i + 1]}
              for i in range(2)]
    letter = {"label": "regional indicator A", "hexcode": "1F1E6", "tags": []}
    pack(tmp_path, "emojibase-data-17.0.0.tgz", en__data=[entry, *others, letter])
    words = emoji.read_words(tmp_path)
    assert words["1f6b6"] == Word(
        "person walking facing right", "person walking", ("man", "stroll", "hike"), 1, True)
    assert words["1f6b6-1f3ff"].tags == () and not words["1f6b6-1f3ff"].plain
    assert words["1f6b6-1f3ff"].concept == "person walking" and "1f1e6" not in words


def test_two_versions_of_a_package_or_none_are_refused(tmp_path):
    with pytest.raises(InputError, match="expected one iconify-json-noto-VERSION.tgz.*none"):
        emoji.package(tmp_path, "iconify-json-noto")
    (tmp_path / "iconify-json-noto-v1-1.2.5.tgz").touch()  # another package
    (tmp_path / "iconify-json-noto-1.2.9.tgz").touch()
    assert emoji.package(tmp_path, "iconify-json-noto").name == "iconify-json-noto-1.2.9.tgz"
    (tmp_path / "iconify-json-noto-1.2.8.tgz").touch()
    with pytest.raises(InputError, match="1.2.8.tgz, iconify-json-noto-1.2.9"):
        emoji.package(tmp_path, "iconify-json-noto")


def test_icons_without_a_size_of_their_own_take_that_of_their_set_and_names_give_codes(tmp_path):
    bodies = {"cat": {"body": "<path/>"}, "wide": {"body": "<g/>", "width": 64},
              "nameless": {"body": ""}}
    icons = {"width": 32, "height": 32, "icons": bodies}
    pack(tmp_path, "iconify-json-noto-1.tgz", icons=icons)
    found = emoji.read_sources(tmp_path / "iconify-json-noto-1.tgz", {"cat": "1f408", "wide": "2"})
    assert found.keys() == {"1f408", "2"}
    assert 'viewBox="0 0 32 32"' in found["1f408"] and "<path/>" in found["1f408"]
    assert 'viewBox="0 0 64 32"' in found["2"]


def test_a_picture_is_put_on_white_and_comes_back_from_its_shard_with_128_colours():
    picture = Image.new("RGBA", (256, 256), (0, 0, 0, 0))
    picture.paste((200, 30, 60, 255), (64, 64, 192, 192))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    pixels = emoji.render(buffer.getvalue())
    assert len(pixels) == 64 * 64 * 3 and pixels[:3] == b"\xff\xff\xff"
    again = Image.open(io.BytesIO(emoji.encode(pixels))).convert("RGB")
    assert again.getpixel((0, 0)) == (255, 255, 255) and again.getpixel((32, 32)) == (200, 30, 60)
