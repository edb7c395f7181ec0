"""A torch pickle -> safetensors, for files that need not be trusted.

    python -m support.convert v2-1_512-ema-pruned.ckpt    # writes v2-1_512-ema-pruned.safetensors

A pickle names functions and classes, and opening it calls them. Here only those that put a tensor
together are found. Any other class, such as the pytorch_lightning ones in SD's published files, is
neither imported nor run: a `Stub` stands for it. A file that names what runs programs or changes
files is refused.
"""
import argparse
import collections
import pickle
import tarfile
import types
import zipfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from support.cli import require, run
from support.weights import InputError, first_line, whole_file

ALLOWED = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch", "Size"): torch.Size,
    ("torch._utils", "_rebuild_tensor"): torch._utils._rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,
}
# Modules that no weights need. They would not be run; but such a file is no accident.
DANGEROUS = {
    "asyncio", "code", "commands", "ctypes", "importlib", "io", "marshal", "multiprocessing", "nt",
    "os", "pickle", "pip", "popen2", "posix", "pty", "runpy", "shutil", "socket", "subprocess",
    "sys", "threading", "urllib", "webbrowser"}
# of the module builtins, what may be named
HARMLESS = {
    "bool", "bytearray", "bytes", "complex", "dict", "float", "frozenset", "int", "list", "object",
    "range", "set", "slice", "str", "tuple"}


class Stub:
    """Stands for an object of a class that is not imported: takes anything and does nothing."""

    def __new__(cls, *_, **__):
        return super().__new__(cls)

    def __init__(self, *_, **__):
        pass

    def ignore(self, *_, **__):
        return self

    __call__ = __setstate__ = __setitem__ = append = extend = add = ignore


class Unpickler(pickle.Unpickler):
    """Finds what is ALLOWED, and a Stub for everything else. torch.load adds the storages."""

    def find_class(self, module, name):
        if (module, name) in ALLOWED:
            return ALLOWED[module, name]
        package = module.split(".")[0].lstrip("_")
        builtin = module in ("builtins", "__builtin__") and name not in HARMLESS
        require(not builtin and package not in DANGEROUS,
                f"names {module}.{name}, which no weights need and which can run programs or "
                "change files: nothing was run; do not open this file in any other way, get it "
                "elsewhere")
        return type(name, (Stub,), {"__module__": module})


def load(file, **options):
    return Unpickler(file, **options).load()


def read(file):
    """What torch.save() wrote into `file`, with a Stub for each object of an unknown class. Tensors
    are mapped from the file where its format allows."""
    restricted = types.SimpleNamespace(__name__="restricted", Unpickler=Unpickler, load=load)
    try:
        names = zipfile.ZipFile(file).namelist() if zipfile.is_zipfile(file) else []
        script = any(Path(name).name == "constants.pkl" for name in names)
        # torch.load would hand the one over to TorchScript, and unpack the other
        require(not script and not tarfile.is_tarfile(file), "a program, or a tar")
        # before torch 1.6 the format was no zip, and cannot be mapped
        return torch.load(
            file, "cpu", restricted, weights_only=False, mmap=True if names else None)
    except Exception as error:  # whatever a broken or a hostile pickle leads to
        raise InputError(f"{file}: not a torch pickle of tensors: {first_line(error)}") from None


def tensors_in(file):
    """The tensors of a torch pickle, or of its `state_dict` -> {name: tensor}. Runs nothing of it.
    Raises InputError if there are none, or one cannot be read."""
    raw = read(file)
    raw = raw.get("state_dict", raw) if isinstance(raw, dict) else raw
    found = {}
    for key, value in raw.items() if isinstance(raw, dict) else ():
        kind = type(value)
        if isinstance(value, torch.Tensor):
            found[str(key)] = value.detach()
        # a tensor of another kind, which would be lost without a word
        require(not (isinstance(value, Stub) and kind.__module__.startswith("torch")),
                f"{file}: {key} is made by {kind.__module__}.{kind.__name__}; "
                "expected plain tensors")
    require(found, f"{file}: no tensors by name in it, or in its state_dict; expected weights")
    return found


def apart(tensors):
    """The same contiguous, and none in the memory of another, as safetensors has it."""
    seen = set()
    for key, tensor in tensors.items():
        memory = tensor.untyped_storage().data_ptr()
        kept = tensor.contiguous()
        yield key, kept.clone() if memory in seen else kept
        seen.add(memory)


def convert(file):
    """Write the tensors of the pickle `file` beside it -> the Path of the new file, which appears
    whole or not at all."""
    file = Path(file)
    require(file.is_file(), f"{file}: no such file; expected a torch pickle such as model.ckpt")
    # transformers' name is another for safetensors
    stem = "model" if file.stem == "pytorch_model" else file.stem
    new = file.with_name(stem + ".safetensors")
    require(not new.exists(), f"{new}: exists already; use it, or move it away to convert again")
    tensors = dict(apart(tensors_in(file)))
    with whole_file(new) as beside:
        save_file(tensors, beside, metadata={"format": "pt"})
    return new


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", help="the .ckpt, .bin, .pt or .pth")
    print(convert(parser.parse_args().file))


if __name__ == "__main__":
    run(main)
