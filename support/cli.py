"""What the scripts share: options made from a dataclass, bad input in one line, the device and
precision to use."""
import argparse
import contextlib
import ctypes
import dataclasses
import functools
import math
import os
import sys
import time
import types
import typing
from pathlib import Path

import torch

from support.weights import InputError

# the embedded model, which every default names
POCKET = Path(__file__).resolve().parent.parent / "pocket"


def parse(defaults, doc, argv=None, presets=None, published=None):
    """A dataclass instance -> the same with the command line's values.

    Each field's help stands in its metadata (option()), and there too: `choices`; `list`, which
    makes an option repeatable; `several`, which lets it take several values, joined by commas;
    `group`, the heading in --help under which this field and those after it stand. bools become
    --name/--no-name.

    presets: {name: {field: value}}. The one that --preset names takes the place of the defaults;
    an option given beside it wins. published: {field: value} that --help shows where they differ
    from the defaults."""
    if presets:
        first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        first.add_argument("--preset", choices=tuple(presets), default=defaults.preset)
        chosen = first.parse_known_args(argv)[0].preset
        defaults = dataclasses.replace(defaults, preset=chosen, **presets[chosen])
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    own = type(defaults).__annotations__  # shown before those of a base class
    groups, section = {}, parser
    for field in sorted(dataclasses.fields(defaults), key=lambda field: field.name not in own):
        title = field.metadata.get("group")
        if title is not None:
            section = groups.get(title) or parser.add_argument_group(title)
            groups[title] = section
        paper = (published or {}).get(field.name)
        add_option(section, field, getattr(defaults, field.name), paper)
    given = {k: v for k, v in vars(parser.parse_args(argv)).items() if v is not None}
    for field in dataclasses.fields(defaults):
        if field.metadata.get("several") and isinstance(given.get(field.name), list):
            given[field.name] = ",".join(given[field.name])
    return dataclasses.replace(defaults, **given)


def add_option(section, field, value, published):
    """One field of a dataclass as an option of an argparse parser or group."""
    name, meta, kind = "--" + field.name.replace("_", "-"), field.metadata, field.type
    if not isinstance(kind, type):  # such as str | None
        kind = next(t for t in typing.get_args(kind) if t is not types.NoneType)
    shown = f"default: {value}"
    if published not in (None, value):
        shown += f"; published: {published}"
    text = f"{meta['help']} ({shown})".replace("%", "%%")
    if kind is bool:
        section.add_argument(
            name, action=argparse.BooleanOptionalAction, default=value, help=text)
    elif meta.get("list"):
        section.add_argument(name, action="append", default=None, help=text)
    elif meta.get("several"):
        section.add_argument(
            name, nargs="+", action="extend", default=None, help=text, metavar=name[2:].upper())
    else:
        kind = number if kind is float else kind
        section.add_argument(
            name, type=kind, default=value, choices=meta.get("choices"), help=text,
            metavar=None if meta.get("choices") else name[2:].upper())


def number(text):
    """A float from the command line. NaN and the infinities are none: no comparison refuses a NaN,
    and one in the arithmetic spoils all that follows."""
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text}: expected a finite number")
    return value


def option(default, help, **more):
    return dataclasses.field(default=default, metadata={"help": help} | more)


def run(main):
    """Call main(); bad input becomes one line on stderr and exit code 2."""
    if hasattr(sys.stdout, "reconfigure"):
        # a terminal that cannot show a prompt's letters shows their numbers
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        readable(sys.argv)
        main()
    except InputError as error:
        # a data loading process wraps the message in a traceback, and libraries write messages of
        # several lines
        message = str(error).rpartition("weights.InputError: ")[2]
        print("error: " + " ".join(message.split()), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def readable(argv):
    """Raise InputError if an argument holds bytes that are no text. Python has let them through as
    lone surrogates, which neither tokenizers nor JSON nor safetensors can take."""
    for text in argv:
        try:
            text.encode()
        except UnicodeEncodeError:
            encoding = sys.getfilesystemencoding()
            raise InputError(f"argument {ascii(text)}: its bytes are no text in {encoding}, the "
                             "encoding of this shell; expected UTF-8, in a locale that has it "
                             "(LANG=C.UTF-8); rename a file whose name is none") from None


def pick_device(name):
    """"auto", "cpu", "cuda" or "cuda:1" -> torch.device; InputError if it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name}: not usable ({str(error).splitlines()[0]}); "
                         f"expected auto, cpu or cuda") from None
    if device.type == "cpu":
        keep_freed_memory()
    return device


# glibc's malloc.h
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4


@functools.cache
def keep_freed_memory():
    """On Linux, let this process keep the memory that its tensors free, and have it in huge pages.

    glibc gives every large block back to the system, and the next tensor of that size begins with
    thousands of page faults; with pages of 4 kB the processor then looks up addresses for as long
    as it computes. What a user has set in the environment stays."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # PyTorch asks for huge pages
    if sys.platform != "linux" or any(name.startswith("MALLOC_") for name in os.environ):
        return
    with contextlib.suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_MAX, 0)  # no block of its own for a large tensor
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_TOP_PAD, 2**26)  # grow by 64 MiB at a time


PRECISIONS = {"bf16": torch.bfloat16, "fp32": torch.float32}


def pick_precision(name, device):
    """"auto", "bf16" or "fp32" -> torch.dtype of the networks' arithmetic. auto: bf16 where the
    hardware is faster in it."""
    if name != "auto":
        return PRECISIONS[name]
    if device.type == "cuda":
        faster = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        faster = cpu_is_faster_in_bf16()
    return torch.bfloat16 if faster else torch.float32


def precision_name(dtype):
    """The inverse of pick_precision."""
    return next(name for name, known in PRECISIONS.items() if known == dtype)


@functools.cache
def cpu_is_faster_in_bf16():
    """Only a CPU with bf16 units may be, and not each of those is (Intel's with AVX512-BF16 and no
    AMX are half as fast), so it is timed on a few matrix products."""
    has = [getattr(torch.cpu, f"_is_{unit}_supported", lambda: False)()
           for unit in ("amx_tile", "avx512_bf16")]
    if not any(has):
        return False

    def seconds(matrix):
        start = time.perf_counter()
        matrix @ matrix
        return time.perf_counter() - start

    matrix = torch.ones(768, 768)
    pairs = [(seconds(matrix.bfloat16()), seconds(matrix)) for _ in range(6)]
    bf16, fp32 = map(min, zip(*pairs))
    return bf16 < 0.8 * fp32


def autocast(device, dtype):
    """The autocast context for that precision. In float32 it does nothing."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype)


def peak_memory(device):
    """GiB that the process has held at most: of the GPU if it uses one, else of the machine."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource  # not on Windows
    unit = 2**30 if sys.platform == "darwin" else 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def cores():
    """-> how many of the CPU's cores this process may use"""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def make_folder(path, name="--out"):
    """Create a folder for output, or say why that cannot be."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        probe = Path(path) / f".writable.{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"{name} {path}: not writable ({error.strerror}); "
                         f"give a folder you can write to") from None
    return Path(path)


def parse_size(text, factor):
    """"512x768" -> (512, 768): height and width in pixels, both multiples of `factor`."""
    try:
        h, w = (int(x) for x in text.lower().split("x"))
    except ValueError:
        raise InputError(f"--size {text}: expected HxW in pixels, such as 512x768") from None
    require(h > 0 and w > 0 and h % factor == w % factor == 0,
            f"--size {text}: height and width must be multiples of {factor}")
    return h, w


def require(condition, message):
    if not condition:
        raise InputError(message)


def at_least(least, args, *names):
    """Of the options `args`, those of these names must be so much or more."""
    for name in names:
        value = getattr(args, name)
        require(value >= least, f"--{name.replace('_', '-')} {value}: expected {least} or more")


def positive(args, *names):
    """Of the options `args`, those of these names must be more than 0."""
    for name in names:
        value = getattr(args, name)
        require(value > 0, f"--{name.replace('_', '-')} {value}: expected more than 0")
