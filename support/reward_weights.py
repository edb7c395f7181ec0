"""Where the published weights of the rewards lie, and the layouts they come in: safetensors or
torch pickles, with open_clip's names or those of transformers' CLIPModel. Loading is strict, with
weights.load_strictly(): every tensor is used, and every parameter found."""
import contextlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from support.cli import require
from support.single_file import replace_all
from support.weights import (
    Component,
    InputError,
    Tensors,
    conversion,
    finite,
    first_line,
    load_torch,
)


@dataclass(frozen=True)
class Published:
    """Where the weights of a reward lie; `size` in bytes and `sha256` where they are known."""
    repo: str
    file: str
    size: str
    sha256: str = "not known here"


PUBLISHED = {
    "hpsv2.1": Published("xswu/HPSv2", "HPS_v2.1_compressed.pt", "1,972,490,005 bytes",
                         "c57a38fb4a2f7e7c15bf00da2ea377cdf165448b4dd1052a484c215a998c9837"),
    "hpsv2": Published("xswu/HPSv2", "HPS_v2_compressed.pt", "about 1.97 GB"),
    "pickscore": Published("yuvalkirstain/PickScore_v1", "model.safetensors", "about 3.94 GB"),
    "imagereward": Published("zai-org/ImageReward", "ImageReward.pt", "about 1.79 GB"),
    # a mirror of sac+logos+ava1-l14-linearMSE.pth (3,714,759 bytes, sha256 21dd590f...)
    # of christophschuhmann/improved-aesthetic-predictor
    "aesthetic": Published("trl-lib/ddpo-aesthetic-predictor", "aesthetic-model.pth",
                           "about 3.7 MB"),
}


class Pickle:
    """The tensors of a torch pickle, as weights.Tensors has them.

    The file is opened with weights_only=True, which runs no code."""

    def __init__(self, file):
        self.where = str(file)
        raw = load_torch(file, mmap=True, remedy="copy or download it again, or, if it holds more "
                         f"than tensors, convert it, in the repository: {conversion(file)}")
        raw = raw.get("state_dict", raw) if isinstance(raw, dict) else {}
        self.tensors = {}
        for key, tensor in raw.items():
            if isinstance(tensor, torch.Tensor):
                self.tensors[key.removeprefix("module.")] = tensor
        self.shapes = {key: tuple(tensor.shape) for key, tensor in self.tensors.items()}
        self.dtypes = {key: tensor.dtype for key, tensor in self.tensors.items()}

    def read(self, key, dtype, device):
        tensor = self.tensors[key]
        if tensor.is_floating_point():
            require(finite(tensor),
                    f"{self.where}: {key} holds NaN or infinity; the file is damaged, use another")
            tensor = tensor.to(dtype=dtype)
        return tensor.to(device)


CLIP_MODEL = {  # names in transformers' CLIPModel -> in open_clip
    "text_model.embeddings.token_embedding": "token_embedding",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm": "ln_final",
    "text_model.encoder.layers": "transformer.resblocks",
    "text_projection.weight": "text_projection",
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding": "visual.conv1",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.pre_layrnorm": "visual.ln_pre",
    "vision_model.post_layernorm": "visual.ln_post",
    "vision_model.encoder.layers": "visual.transformer.resblocks",
    "visual_projection.weight": "visual.proj",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
CLIP_MODEL |= {
    f"self_attn.{c}_proj.{kind}": f"attn.in_proj_{kind}"
    for c in "qkv" for kind in ("weight", "bias")
}


class AsOpenClip:
    """The tensors of a file in the layout of transformers' CLIPModel, under open_clip's names:
    q, k and v stacked into one tensor, the two projections transposed."""

    def __init__(self, tensors):
        self.tensors, self.where, self.sources = tensors, tensors.where, {}
        self.dtypes = tensors.dtypes  # by the names in the file, for messages
        order = lambda key: (".v_proj." in key, ".k_proj." in key)  # q before k before v
        for key in sorted(tensors.shapes, key=order):
            self.sources.setdefault(replace_all(key, CLIP_MODEL), []).append(key)
        empty = lambda key: torch.empty(tensors.shapes[key], device="meta")
        self.shapes = {}
        for name, keys in self.sources.items():
            self.shapes[name] = tuple(self.join(name, map(empty, keys)).shape)

    @staticmethod
    def join(name, parts):
        parts = list(parts)
        tensor = torch.cat(parts) if len(parts) > 1 else parts[0]
        return tensor.T.contiguous() if name in ("text_projection", "visual.proj") else tensor

    def read(self, key, dtype, device):
        sources = self.sources[key]
        return self.join(key, (self.tensors.read(source, dtype, device) for source in sources))


@contextlib.contextmanager
def parameters_on_meta():
    """Modules built inside have parameters without memory, to be assigned, and real buffers."""
    to_meta = lambda module, name, p: nn.Parameter(p.to("meta"), p.requires_grad)
    hook = register_module_parameter_registration_hook(to_meta)
    try:
        yield
    finally:
        hook.remove()


def find_weights(name, path):
    """The file of a published reward -> Path: `path` itself, the file of the published name in the
    folder `path`, or, without a path, the hub's, by way of its cache.

    InputError, with the file's name and size, where there is none, or where `path` has the name
    of another reward's file."""
    known = PUBLISHED[name]
    what = (f"expected {known.file} of the hub's {known.repo} "
            f"({known.size}, sha256 {known.sha256}), or its tensors as safetensors")
    if not path:
        from huggingface_hub import hf_hub_download
        try:
            return Path(hf_hub_download(known.repo, known.file))
        except Exception as error:
            # of the hub, of HTTP, of the network: all of them mean that it is not to be had now
            raise InputError("could not be fetched from the hub and is not in its cache "
                             f"({first_line(error)}); {what}, "
                             f"as {name}=/path/to/{known.file}") from None
    path = Path(path) / known.file if Path(path).is_dir() else Path(path)
    require(path.is_file(), f"{path}: no such file; {what}")
    for other, theirs in PUBLISHED.items():
        require(path.name != theirs.file or theirs.file == known.file,
                f"{path}: by its name the file of {other}; {what}")
    return path


def open_weights(file, ignored="^$"):
    """A Component of the tensors of a safetensors file or a torch pickle.

    ignored: a regular expression of the keys that need not be used."""
    file = Path(file)
    require(file.is_file(),
            f"{file}: no such file; expected weights as .safetensors or a torch pickle")
    tensors = Tensors([file]) if file.suffix == ".safetensors" else Pickle(file)
    return Component(str(file), {}, tensors, ignored=ignored)


def open_clip_weights(file, ignored):
    """open_weights() of a CLIP, under open_clip's names."""
    component = open_weights(file, ignored)
    if "text_model.embeddings.token_embedding.weight" in component.tensors.shapes:
        component.tensors = AsOpenClip(component.tensors)
    return component
