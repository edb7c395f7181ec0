import io
import re
import struct
import subprocess
import tarfile
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

import data
from conftest import CAPTIONS, agree, call, random_png, write_shard
from data import Shards, StepSampler, batches, load_picture
from support.pictures import decode
from support.weights import InputError
from vae import VAE


def npy(*shape):
    np.save(buffer := io.BytesIO(), np.zeros(shape, np.float16))
    return buffer.getvalue()


def encode(shard, model_folder, out, size, *more):
    return call(data.main, "--data", shard, "--out", out, "--model", model_folder,
                "--resolution", size, "--device", "cpu", *more)


def rows(count=10, seed=0, first=0, last=12, rows=4, **where):
    """The numbers of the samples that each step draws."""
    sampler = StepSampler(count, seed, first, last, rows, **where)
    return [[number for number, _ in step] for step in sampler]


def test_order_is_a_pure_function_of_seed_and_position():
    assert rows() == rows()
    assert rows() != rows(seed=1)
    assert rows(first=5) == rows()[5:]  # resumed = uninterrupted


def test_ranks_together_draw_what_one_process_with_the_doubled_batch_draws():
    first, second = (rows(rows=2, rank=rank, world=2) for rank in (0, 1))
    assert [a + b for a, b in zip(first, second)] == rows()


def test_each_epoch_sees_every_sample_once_and_in_another_order():
    stream = sum(rows(last=10), [])  # 4 epochs of 10, which are not whole numbers of steps
    epochs = [stream[i:i + 10] for i in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_a_batch_larger_than_the_data_set_works():
    assert sorted(rows(count=3, rows=6, last=1)[0]) == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("workers", [0, 1])
def test_resumed_batches_equal_uninterrupted_ones(workers, shard):
    shards = Shards(shard, 16)
    whole = list(batches(shards, 7, 0, 4, 3, workers=workers))
    resumed = list(batches(shards, 7, 2, 4, 3, workers=workers))
    for (images, captions), (images_2, captions_2) in zip(whole[2:], resumed, strict=True):
        assert torch.equal(images, images_2) and captions == captions_2


def test_pictures_and_their_own_captions_are_read(shard):
    shards = Shards(shard, 40)
    assert len(shards) == len(CAPTIONS) and not shards.encoded
    for i, caption in enumerate(CAPTIONS):
        image, text = shards[i]
        assert text == caption and image.shape == (3, 40, 40)
        middle = np.array(Image.open(io.BytesIO(random_png(i))))[:, 4:44]  # centre crop
        agree(image, torch.from_numpy(middle).permute(2, 0, 1) / 127.5 - 1, 1e-6)


def test_pictures_are_resized_and_transparency_is_white():
    buffer = io.BytesIO()
    Image.new("RGBA", (50, 30), (255, 0, 0, 0)).save(buffer, "PNG")
    picture = load_picture(buffer.getvalue(), 16)
    assert picture.shape == (3, 16, 16) and (picture == 1).all()


def saved(picture, kind="PNG", **options):
    picture.save(buffer := io.BytesIO(), kind, **options)
    return buffer.getvalue()


def half_clear(mode):
    """4x4, black, the left half transparent as far as the mode can say it. -> picture, options"""
    if mode == "P":
        picture = Image.new("P", (4, 4), 1)
        picture.putpalette([9, 9, 9, 0, 0, 0])
        picture.paste(0, (0, 0, 2, 4))
        return picture, {"transparency": 0}
    if mode == "I;16":
        columns = np.array([500, 500, 0, 0], dtype=np.uint16)
        return Image.fromarray(np.tile(columns, (4, 1))), {"tRNS": 500}
    if mode in ("L", "RGB"):
        clear = {"L": 9, "RGB": (9, 9, 9)}[mode]
        picture = Image.new(mode, (4, 4), 0)
        picture.paste(clear, (0, 0, 2, 4))
        return picture, {"transparency": clear}
    picture = Image.new("RGBA", (4, 4), (0, 0, 0, 255))
    picture.paste((0, 0, 0, 0), (0, 0, 2, 4))
    return picture.convert(mode), {}


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "RGB", "I;16"])
def test_what_is_transparent_is_white(mode):
    picture, options = half_clear(mode)
    clear = options.pop("tRNS", None)
    content = saved(picture, **options)
    if clear is not None:  # which older PILs read and do not write
        chunk = b"tRNS" + struct.pack(">H", clear)
        chunk = struct.pack(">I", 2) + chunk + struct.pack(">I", zlib.crc32(chunk))
        content = content[:33] + chunk + content[33:]  # after IHDR
    image = load_picture(content, 4)
    assert (image[:, :, :2] == 1).all() and (image[:, :, 2:] == -1).all()


def test_a_palette_with_alpha_is_decoded_on_white(monkeypatch):
    picture = Image.new("P", (4, 4), 0)
    picture.putpalette([0, 0, 0])
    picture.putalpha(Image.new("L", (4, 4), 0))
    assert picture.mode == "PA"  # which no format of PIL's saves
    monkeypatch.setattr(Image, "open", lambda file: picture)
    assert decode(b"").getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation, corner", [
    (1, (0, 0)), (2, (0, 1)), (3, (1, 1)), (4, (1, 0)),
    (5, (0, 0)), (6, (0, 1)), (7, (1, 1)), (8, (1, 0))])
def test_pictures_are_turned_as_exif_says(kind, orientation, corner):
    picture = Image.new("RGB", (32, 16), "black")
    picture.paste("white", (0, 0, 8, 8))  # at the top left
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = decode(saved(picture, kind, exif=exif))
    assert turned.size == ((32, 16) if orientation < 5 else (16, 32))
    bright = np.array(turned.convert("L")) > 128
    row, column = ((0, bright.shape[i] - 1)[corner[i]] for i in range(2))
    assert bright[row, column] and bright.sum() == pytest.approx(64, abs=20)


def test_broken_exif_data_is_no_reason_to_lose_a_picture():
    data = saved(Image.new("RGB", (8, 8), "white"), "PNG", exif=b"Exif\0\0no TIFF header")
    assert (load_picture(data, 8) == 1).all()


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled(kind):
    values = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    image = load_picture(saved(Image.fromarray(values), kind), 8)
    agree(image[0], torch.from_numpy(values.astype(np.float32)) / 32767.5 - 1, 1 / 255)


def test_cmyk_is_read_as_its_colours():
    image = load_picture(saved(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "TIFF"), 8)
    assert (image[0] == 1).all() and (image[1:] == -1).all()  # red


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "TIFF", "PNG"])
def test_an_animation_is_its_first_frame(kind):
    frames = [Image.new("RGB", (8, 8), color) for color in ("white", "black")]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = saved(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert (load_picture(data, 8) == 1).all()


def test_a_folder_and_a_glob_give_the_same_as_the_tar(shard):
    paths = (shard.parent, shard.parent / "*.tar", shard)
    first, *others = (list(Shards(path, 16).samples) for path in paths)
    assert first == others[0] == others[1]


def test_missing_shards_are_refused_by_name(tmp_path):
    with pytest.raises(InputError, match="nothing-\\*.tar"):
        Shards(tmp_path / "nothing-*.tar", 16)


@pytest.mark.parametrize("content", ["cut", "text", "empty"])
def test_a_broken_tar_is_refused_by_name(content, shard, tmp_path, capsys):
    whole = shard.read_bytes()
    file = tmp_path / "broken.tar"
    file.write_bytes({
        "cut": whole[:len(whole) // 2],
        "text": b"<html>not found</html>" * 100,
        "empty": b"",
    }[content])
    with pytest.raises(InputError, match=str(file)):
        Shards(file, 16)
    assert call(lambda: Shards(file, 16)) == 2
    assert str(file) in capsys.readouterr().err  # in the one line that the user sees


def test_a_tar_cut_inside_a_header_is_refused_by_name(shard, tmp_path):
    file = tmp_path / "broken.tar"
    place = Shards(shard, 16).samples[4][1] - 512  # the header of the fifth picture
    file.write_bytes(shard.read_bytes()[:place + 100])
    with pytest.raises(InputError, match=str(file)):
        Shards(file, 16)


def test_a_tar_without_pairs_is_refused_by_name(tmp_path):
    file = write_shard(tmp_path / "pairless.tar", [("a.png", random_png(0)), ("b.txt", b"words")])
    with pytest.raises(InputError, match="pairless.tar.* no pairs"):
        Shards(file, 16)


def flip_bit(png):
    place = png.index(b"IDAT") + 40
    return png[:place] + bytes([png[place] ^ 255]) + png[place + 1:]


@pytest.mark.parametrize(
    "spoil",
    [lambda png: png[:200], flip_bit, lambda png: b"", lambda png: png.replace(b"IHDR", b"IHDX")],
    ids=["cut", "flipped bit", "empty", "no header"])
def test_an_unreadable_picture_is_refused_by_the_name_of_its_shard(spoil, tmp_path):
    file = write_shard(tmp_path / "bad.tar", [("a.png", spoil(random_png(0))), ("a.txt", b"words")])
    with pytest.raises(InputError, match=str(file)):
        Shards(file, 16)[0]


@torch.no_grad()
def test_encoded_shards_hold_the_vaes_posterior(shard, model_folder, tmp_path):
    options = ["--batch", 3, "--precision", "fp32"]
    assert encode(shard, model_folder, tmp_path / "encoded", 32, *options) == 0
    pictures, encoded = Shards(shard, 32), Shards(tmp_path / "encoded", 32)
    assert encoded.encoded and len(encoded) == len(pictures)
    assert {f.name for f in (tmp_path / "encoded").iterdir()} == {shard.name, "config.json"}
    vae = VAE.from_pretrained(model_folder)
    for i in range(8):
        (image, caption), (posterior, caption_2) = pictures[i], encoded[i]
        assert caption == caption_2 and posterior.dtype == torch.float32
        agree(posterior, torch.cat(vae.posterior(image[None])), 1e-3)  # float16 keeps 11 bits


def test_encoding_another_way_into_the_same_folder_is_refused(
        shard, model_folder, tmp_path, capsys):
    assert encode(shard, model_folder, tmp_path, 32) == 0
    assert encode(shard, model_folder, tmp_path, 32) == 0
    assert encode(shard, model_folder, tmp_path, 64) == 2
    assert "resolution 32 (now 64)" in capsys.readouterr().err


def test_latents_of_several_sizes_are_refused(tmp_path):
    files = []
    for side in (4, 8):
        files += [(f"{side}.npy", npy(2, 4, side, side)), (f"{side}.txt", b"words")]
    with pytest.raises(InputError, match="several sizes"):
        Shards(write_shard(tmp_path / "two.tar", files), 16)


@pytest.mark.parametrize("shape", [(4, 8, 8), (3, 4, 8, 8), (2, 4, 8, 12)])
def test_latents_that_are_no_square_posterior_are_refused(shape, tmp_path):
    file = write_shard(tmp_path / "odd.tar", [("a.npy", npy(*shape)), ("a.txt", b"words")])
    with pytest.raises(InputError, match=re.escape(str(shape))):
        Shards(file, 16)


def test_latents_encoded_at_another_resolution_are_refused(shard, model_folder, tmp_path):
    assert encode(shard, model_folder, tmp_path, 32) == 0
    for path in (tmp_path, tmp_path / shard.name):
        with pytest.raises(InputError, match="encoded at --resolution 32, now 64"):
            Shards(path, 64)


def test_pictures_mixed_with_latents_are_refused(shard, tmp_path):
    write_shard(tmp_path / "mixed.tar", [
        ("a.npy", npy(2, 4, 4, 4)), ("a.txt", b"a"), ("b.png", random_png(0)), ("b.txt", b"b")])
    with pytest.raises(InputError, match="one kind"):
        Shards(tmp_path / "mixed.tar", 16)


# ------------------------------------------------------------------------------- what people have

def pair(name, caption="words", suffix=".txt", picture=None, kind=".png"):
    """The members of a sample."""
    return [(name + kind, picture or random_png(0)),
            (name + suffix, caption if isinstance(caption, bytes) else caption.encode())]


def captions_of(shards):
    return [shards.caption(i) for i in range(len(shards))]


@pytest.mark.parametrize("kind", [
    "jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "JPG", "Png", "TIFF"])
def test_pictures_of_these_kinds_are_read(kind, tmp_path):
    form = {"jpg": "JPEG", "tif": "TIFF"}.get(kind.lower(), kind.upper())
    picture = saved(Image.new("RGB", (8, 8), "white"), form)
    members = pair("a", "words", ".TXT", picture, "." + kind)
    shards = Shards(write_shard(tmp_path / "a.tar", members), 8)
    assert (shards[0][0] == 1).all() and shards[0][1] == "words"


def test_captions_are_read_from_txt_then_caption_then_json(tmp_path):
    three = [(".json", b'{"caption": "c", "width": 3}'), (".caption", b"b"), (".txt", b"a")]
    for expected in "cba":
        members = [("x.png", random_png(0))]
        members += [("x" + suffix, data) for suffix, data in three[:"cba".index(expected) + 1]]
        assert captions_of(Shards(write_shard(tmp_path / "x.tar", members), 8)) == [expected]


@pytest.mark.parametrize("suffix, content", [
    (".txt", "\ufeffa cat\n"), (".json", '\ufeff{"caption": " a cat"}')])
def test_a_byte_order_mark_is_no_part_of_a_caption(suffix, content, tmp_path):
    shards = Shards(write_shard(tmp_path / "a.tar", pair("a", content, suffix)), 8)
    assert captions_of(shards) == ["a cat"]


@pytest.mark.parametrize("suffix, content", [
    (".txt", "one\n\n two \nthree\n"), (".json", '{"caption": ["one", "two", null, "three"]}')])
def test_of_several_captions_one_is_drawn_by_seed_and_position(suffix, content, tmp_path):
    file = write_shard(tmp_path / "a.tar", pair("a", content, suffix))
    shards = Shards(file, 8, caption_lines=True)
    drawn = lambda seed, first=0, **where: [
        caption for _, captions in batches(shards, seed, first, 12, 2, **where)
        for caption in captions]
    assert set(drawn(0)) == {"one", "two", "three"}
    assert drawn(0) == drawn(0, workers=2) and drawn(0) != drawn(1)
    assert drawn(0, first=6) == drawn(0)[12:]  # resumed
    halves = [drawn(0, rank=rank, world=2) for rank in (0, 1)]  # steps of four rows
    assert halves[0][:2] + halves[1][:2] == drawn(0)[:4]


def test_without_caption_lines_a_text_is_one_caption(tmp_path):
    file = write_shard(tmp_path / "a.tar", pair("a", "one\ntwo\n"))
    assert captions_of(Shards(file, 8)) == ["one\ntwo"]
    file = write_shard(tmp_path / "a.tar", pair("a", "one\n\n"))
    assert captions_of(Shards(file, 8, caption_lines=True)) == ["one"]


@torch.no_grad()
def test_encoding_keeps_all_captions(model_folder, tmp_path):
    members = pair("a", '{"caption": ["one", "two"]}', ".json") + pair("b", "three\nfour")
    file = write_shard(tmp_path / "a.tar", members)
    assert encode(file, model_folder, tmp_path / "encoded", 32) == 0
    encoded = Shards(tmp_path / "encoded", 32, caption_lines=True)
    assert [encoded.captions(i) for i in range(2)] == [["one", "two"], ["three", "four"]]


@pytest.fixture
def four(tmp_path, monkeypatch):
    """s[1]/00.tar to 03.tar, each with one sample whose caption is its number."""
    (tmp_path / "s[1]").mkdir()
    for i in range(4):
        write_shard(tmp_path / "s[1]" / f"{i:02d}.tar", pair("x", str(i)))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("pattern, numbers", [
    ("s[1]/{01..03}.tar", "123"), ("s[1]/0{0,2}.tar", "02"), ("{s[1],none}/{00..00}.tar", None),
    ("s[1]", "0123"), ("s[1]/*.tar", "0123"), ("s?1?/0[13].tar", "13"), ("~/s[1]/02.tar", "2"),
    ("s[1]/02.tar,s[1]/01.tar,s[1]/*2.tar", "12"), ("s[1]/{00,01}.tar,~/s[1]/03.tar", "013"),
    ("s[1]/{02..04}.tar", None), ("s[1]/00.tar,none.tar", None)])
def test_shards_are_named_by_patterns(pattern, numbers, four):
    if numbers is None:
        with pytest.raises(InputError, match=r"no such shards \(1 of"):
            Shards(pattern, 8)
    else:
        assert sorted(captions_of(Shards(pattern, 8))) == list(numbers)


def test_a_name_with_a_comma_or_braces_is_taken_as_it_stands(four):
    for name in ("a,b.tar", "{1..2}.tar"):
        write_shard(four / name, pair("x", "odd"))
        assert captions_of(Shards(name, 8)) == ["odd"]


def test_data_may_be_given_as_several_values(four, model_folder):
    files = ["s[1]/00.tar", "s[1]/02.tar", "--data", "s[1]/03.tar"]
    assert call(data.main, "--data", *files, "--out", "encoded", "--model", model_folder,
                "--resolution", 32, "--device", "cpu") == 0
    assert captions_of(Shards("encoded", 32)) == ["0", "2", "3"]


@torch.no_grad()
def test_a_plain_folder_is_read_and_encoded(tmp_path, model_folder):
    for name, content in [*pair("a", "one"), *pair("deep/er/b.v2", "two", ".caption"),
                          *pair("c", '{"caption": "three"}', ".json"), *pair(".hidden"),
                          ("deep/alone.jpg", random_png(0)), ("notes.md", b"")]:
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(content)
    shards = Shards(tmp_path / "in", 32)
    assert captions_of(shards) == ["one", "three", "two"]
    agree(shards[0][0], load_picture(random_png(0), 32))
    assert "1 picture left out: no caption (.txt, .caption, .json)" in shards.notes()
    assert encode(tmp_path / "in", model_folder, tmp_path / "encoded", 32) == 0
    assert captions_of(Shards(tmp_path / "encoded", 32)) == ["one", "three", "two"]


@pytest.mark.parametrize("name", ["x.tar.gz", "x.tgz", "x.tar", "x.tar.bz2"])
def test_a_packed_tar_is_refused_with_the_command_that_unpacks_it(name, tmp_path):
    mode = "w:bz2" if name.endswith("bz2") else "w:gz"
    with tarfile.open(tmp_path / name, mode) as tar:
        data.add_pair(tar, "a", "png", random_png(0), "words")
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(InputError, match=f"{name}: packed.*repack: ") as refused:
            Shards(path, 8)
    command = str(refused.value).partition("repack: ")[2]
    subprocess.run(command, shell=True, check=True)
    plain = command.rpartition("> ")[2]
    assert captions_of(Shards(plain, 8)) == ["words"]


def test_pipes_are_refused_with_the_reason():
    with pytest.raises(InputError, match="pipe:cat a.tar.*any order"):
        Shards("pipe:cat a.tar", 8)


def test_members_that_are_no_samples_are_passed_over_and_counted(tmp_path):
    members = pair("./v1.0/a", "kept") + [
        ("./v1.0/._a.png", b"fork"), ("__MACOSX/a.png", b"fork"), ("__MACOSX/a.txt", b"fork"),
        ("v1.0/README", b"text"), ("00_stats.json", b"{}"), ("00.parquet", b"PAR1"),
        ("b.jpg", random_png(0)), ("c.jpg", random_png(0)), ("d.txt", b"no picture")]
    file = write_shard(tmp_path / "a.tar", members)
    with tarfile.open(file, "a") as tar:
        for name, kind in (("folder.jpg", tarfile.DIRTYPE), ("e.jpg", tarfile.SYMTYPE),
                           ("f.jpg", tarfile.LNKTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "./v1.0/a.png"
            tar.addfile(info)
    shards = Shards(file, 8)
    assert captions_of(shards) == ["kept"]
    assert shards.notes() == [
        "1 caption left out: no picture of its name",
        "3 files left out: hidden (._NAME, __MACOSX)",
        "2 links left out: not followed",
        "2 pictures left out: no caption (.txt, .caption, .json)"]


def test_names_with_dots_go_together_up_to_the_last_one(tmp_path):
    members = pair("v1.0/a", "one") + pair("v1.0/b.x", "two") + pair("v1.0/b.y", "three")
    members += [("v1.0/a.seg.png", random_png(1))]  # a mask, which is no sample
    shards = Shards(write_shard(tmp_path / "a.tar", members), 8)
    assert captions_of(shards) == ["one", "two", "three"]


def test_pictures_travel_as_bytes_and_arrive_as_load_picture_gives_them(shard):
    shards = Shards(shard, 32)
    (tensors, captions), = batches(shards, 0, 0, 1, 8)
    assert tensors.dtype == torch.uint8 and tensors.shape == (8, 3, 32, 32)
    by_caption = dict(zip(captions, data.as_input(tensors)))
    for image, caption in shards.first(8):
        assert image.dtype == torch.float32 and torch.equal(by_caption[caption], image)
