"""Weight folders in the diffusers layout: find one, load it strictly, save it whole.

    folder/config.json + folder/diffusion_pytorch_model.safetensors        (UNet, VAE)

Attribute names of our modules equal the keys of the files, so loading is `load_state_dict` with nothing in between.
"""
import dataclasses
import json
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

WEIGHTS = "diffusion_pytorch_model.safetensors"


class InputError(ValueError):
    """The user's input is at fault. The message says what was expected, what was found and what to do; the
    scripts print it as one line and exit with code 2."""


def find_component(path, name):
    """The folder that holds component `name` ("unet", "vae", ...): `path` itself or `path/name`."""
    path = Path(path)
    for folder in (path / name, path):
        if (folder / "config.json").is_file():
            return folder
    what = "no such folder" if not path.is_dir() else f"neither it nor {name}/ in it has a config.json"
    raise InputError(f"{path}: {what}; expected a model folder with {name}/config.json, or the {name} folder itself")


def read_json(file):
    """The JSON object in `file`."""
    try:
        raw = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: not readable as JSON ({error}); was the folder copied whole?") from None
    if not isinstance(raw, dict):
        raise InputError(f"{file}: holds {type(raw).__name__}, expected a JSON object; was the folder copied whole?")
    return raw


def load_tokenizer(folder):
    """The CLIP tokenizer of a tokenizer/ folder (vocab.json and merges.txt, or tokenizer.json)."""
    from transformers import CLIPTokenizer
    folder = Path(folder)
    if not any((folder / name).is_file() for name in ("vocab.json", "tokenizer.json")):
        raise InputError(f"{folder}: no tokenizer there; expected vocab.json and merges.txt")
    try:
        return CLIPTokenizer.from_pretrained(folder)
    except Exception as error:  # the tokenizers library raises bare Exceptions for broken files
        raise InputError(f"{folder}: not a whole tokenizer ({error}); copy the folder again") from None


def read_config(folder, config_class):
    """config.json -> `config_class`. Fields that the class does not know are let through only when `config_class.ignored`
    names them or they hold a value under which they do nothing (None, False, [] ...)."""
    file = Path(folder) / "config.json"
    raw = read_json(file)
    known = {field.name for field in dataclasses.fields(config_class)}
    for key, value in raw.items():
        if key in known or key.startswith("_") or key in config_class.ignored or value in config_class.inert.get(key, ()):
            continue
        if value not in (None, False, 0, [], {}):
            raise InputError(f"{file}: {key} = {value!r} asks for something {config_class.__name__[:-6]} does not build")
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in raw.items() if k in known}
    return config_class(**values)


def load_strictly(module, file, may_lack=(), ignore=(), rename=lambda key: key):
    """Put the tensors of a safetensors file into `module` (built on the meta device). Every key and shape must agree;
    only keys in `may_lack` may be absent, and keys that end in one of `ignore` are passed over. Returns the absent ones."""
    file = Path(file)
    if not file.is_file():
        raise InputError(f"{file}: missing; expected the weights beside config.json")
    try:
        state = load_file(file)
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{file}: not a whole safetensors file ({error}); copy or download it again") from None
    state = {rename(k): v for k, v in state.items() if not ignore or not k.endswith(ignore)}
    expected = {k: tuple(v.shape) for k, v in module.state_dict().items()}
    found = {k: tuple(v.shape) for k, v in state.items()}
    missing = [k for k in expected if k not in found and k not in may_lack]
    surplus = [k for k in found if k not in expected]
    misshapen = [f"{k} {found[k]} for {expected[k]}" for k in expected if k in found and found[k] != expected[k]]
    for problem, keys in (("lacks", missing), ("has unknown", surplus), ("has misshapen", misshapen)):
        if keys:
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            raise InputError(f"{file}: {problem} {', '.join(keys[:3])}{more}; does config.json belong to these weights?")
    module.load_state_dict(state, strict=not may_lack, assign=True)
    return [k for k in expected if k not in found]


def load_component(module_class, path, name, dtype=None, device=None, may_lack=(), **overrides):
    """Build `module_class` from the config.json of component `name` under `path`, on the meta device, and load it. `dtype`
    (float32 if not given) is that of the module, whatever the file holds."""
    folder = find_component(path, name)
    config = dataclasses.replace(read_config(folder, module_class.Config), **overrides)
    with torch.device("meta"):
        module = module_class(config)
    absent = load_strictly(module, folder / WEIGHTS, may_lack)
    for key in absent:  # only cond_proj: zero, so that the student starts as the teacher
        owner, attribute = key.rsplit(".", 1)
        shape = module.get_parameter(key).shape
        setattr(module.get_submodule(owner), attribute, torch.nn.Parameter(torch.zeros(shape)))
    return module.to(dtype=dtype or torch.float32, device=device).eval()


def save_component(module, folder, class_name, dtype=None, **extra):
    """Write config.json and the weights into `folder` so that diffusers' `class_name` opens it. The folder appears whole
    or not at all."""
    state = {k: v.detach().to("cpu", dtype if v.is_floating_point() else None).contiguous() for k, v in module.state_dict().items()}
    fields = {k: v for k, v in dataclasses.asdict(module.config).items() if v is not None}
    config = {"_class_name": class_name} | fields | extra
    with whole_folder(folder) as new:
        (new / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        save_file(state, new / WEIGHTS, metadata={"format": "pt"})


class whole_folder:
    """`with whole_folder(path) as new:` fill `new`; on success it takes the place of `path` by rename."""

    def __init__(self, path):
        self.path = Path(path)
        self.new = self.path.with_name(f".{self.path.name}.{os.getpid()}.new")

    def __enter__(self):
        shutil.rmtree(self.new, ignore_errors=True)
        self.new.mkdir(parents=True)
        return self.new

    def __exit__(self, kind, *_):
        if kind is not None:
            shutil.rmtree(self.new, ignore_errors=True)
            return
        old = self.path.with_name(f".{self.path.name}.{os.getpid()}.old")
        if self.path.exists():
            self.path.rename(old)
        self.new.rename(self.path)
        shutil.rmtree(old, ignore_errors=True)


def write_whole(path, data):
    """Write bytes or text to `path` by way of a file beside it and a rename."""
    path = Path(path)
    new = path.with_name(f".{path.name}.{os.getpid()}.new")
    new.write_bytes(data.encode() if isinstance(data, str) else data)
    new.rename(path)
