"""Bytes of a picture file -> its pixels as people see them; tensors as PIL images and PNG files."""
import io

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from support.weights import whole_file

ORIENTATION = 0x0112  # the EXIF tag
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90,
}


def decode(data):
    """Bytes of a picture -> PIL image, RGB.

    Turned as its EXIF data says; 16-bit grey scaled to 8 bits; what is transparent is white; of an
    animation the first frame. Colour profiles are not applied. Raises whatever PIL makes of broken
    bytes, and ValueError for pixels in floating point.

    The published rewards' own code (HPSv2's score, ImageReward's score, PickScore's example) opens
    a file and does no more than PIL's convert("RGB"): no turn by EXIF, transparency dropped, 16-bit
    grey clipped to white. On such files its scores differ."""
    try:
        picture = Image.open(io.BytesIO(data))
    except UnidentifiedImageError:  # whose own message names an object in memory
        raise UnidentifiedImageError("no kind of picture that PIL knows") from None
    picture.load()  # first: PIL turns a TIFF as it loads, and takes the tag away
    if picture.mode == "F":
        raise ValueError("pixels in floating point, of which nothing says what white is")
    turn = TURNS.get(orientation(picture))
    if picture.mode.startswith("I"):
        picture = grey(picture)
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    picture = picture.convert("RGB")
    return picture if turn is None else picture.transpose(turn)


def orientation(picture):
    try:
        return picture.getexif().get(ORIENTATION)
    except Exception:  # broken EXIF data is no reason to lose the picture
        return None


def grey(picture):
    """16-bit grey (PIL's modes I;16 and I) -> 8 bits, with alpha where one value is transparent."""
    values = np.array(picture).clip(0, 65535)
    small = Image.fromarray((values / 257).round().astype(np.uint8))
    clear = picture.info.get("transparency")
    if clear is not None:
        small.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    return small


def what_is_wrong(data, error):
    """The kind of fault, in two words: these bytes made decode() raise this error."""
    if not data:
        return "empty picture"
    if data.lstrip()[:1] == b"<":
        return "web page"
    if isinstance(error, Image.DecompressionBombError):
        return "huge picture"
    if isinstance(error, UnidentifiedImageError):
        return "unknown picture"
    return "truncated picture" if "truncated" in str(error) else "broken picture"


def to_pil(image):
    """[3,H,W] in [0,1] -> PIL image."""
    return Image.fromarray((image * 255).round().byte().permute(1, 2, 0).cpu().numpy())


def to_tensor(picture):
    """PIL image, RGB -> [3,H,W] in [0,1]."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255


def write_png(image, where, **text):
    """A PIL image as PNG, with `text` in its metadata, to a path or an open binary file."""
    info = PngInfo()
    for key, value in text.items():
        info.add_itxt(key, str(value))
    image.save(where, "PNG", pnginfo=info)


def save_png(image, file, **text):
    """Write a PIL image to the Path `file`, with `text` in its metadata. The file appears whole."""
    with whole_file(file) as new:
        write_png(image, new, **text)
