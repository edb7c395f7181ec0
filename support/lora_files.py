"""LoRA files of all programs: the names of their tensors, rank and alpha.

    diffusers   unet.down_blocks.0.resnets.0.conv1.lora_A.weight, .lora_B.weight; alpha in the
                metadata (lora_adapter_metadata), or the rank. Older ones: lora.down, lora.up,
                and attn1.processor.to_q_lora.down
    peft        the same behind base_model.model., in adapter_model.safetensors; alpha in the
                adapter_config.json beside it
    kohya       lora_unet_down_blocks_0_resnets_0_conv1.lora_down.weight, .lora_up.weight, .alpha:
                the published LCM-LoRAs, A1111, ComfyUI; also with LDM's names of the layers

A is [rank, in, ...], B [out, rank, 1...] of a layer with weight [out, in, ...].
Sources: diffusers' train_lcm_distill_lora_sd_wds.py (get_module_kohya_state_dict, the layers) and
loaders/lora_conversion_utils.py; with them the file of lcm-lora-sdv1-5 has 134,621,556 bytes, as
published.
"""
import json
import math
import re
import statistics
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from support import single_file
from support.cli import require
from support.weights import (
    LORA as NAME,
    PEFT,
    InputError,
    Tensors,
    local,
    read_json,
    refuse_quantized,
    whole_file,
)

# fields of the student's UNetConfig that our files keep in their metadata
FACTS = ("time_cond_proj_dim", "lcm_grid", "sample_size")
OURS, THEIRS = "rg_lcd", "lora_adapter_metadata"  # keys of the metadata, JSON each

DOWN, UP = r"lora_down|lora_A|lora\.down", r"lora_up|lora_B|lora\.up"
KEY = re.compile(rf"(?P<layer>.+?)\.(?:(?P<A>{DOWN})|(?P<B>{UP}))(?:\.default)?\.weight"
                 rf"|(?P<of>.+)\.alpha")
PROCESSOR = re.compile(r"\.processor\.(to_[qkv]|to_out)_lora\.")  # of diffusers before 0.22
TEXT = re.compile(r"^(lora_te\d?_|text_encoder(_\d)?\.)")
WIDTHS = {768: "SD1.x", 1024: "SD2.x", 2048: "SDXL"}  # of the text that cross-attention reads


@dataclass
class Found:
    """updates: {name of a layer: (A, B, alpha)}; facts: {field of FACTS: value or None}."""
    updates: dict
    facts: dict


def scales_of(files, texts):
    """LoRA files and the words of --lora-scale -> as many scales as files."""
    given, texts = bool(texts), list(texts) or ["1"]
    try:
        scales = [float(text) for text in texts]
    except ValueError:
        scales = [math.nan]
    require(all(map(math.isfinite, scales)),
            f"--lora-scale {' '.join(texts)}: expected a number, such as 0.5")
    require(files or not given, "--lora-scale: of a LoRA, and there is none; give one too")
    require(len(scales) in (1, len(files)),
            f"--lora-scale: {len(scales)} of them for {len(files)} LoRAs; expected one, or one "
            f"for each")
    return scales * len(files) if len(scales) == 1 else scales


def as_text(files, scales):
    """LoRA files and their scales in words, as a picture's metadata hold them."""
    return " ".join(f"{file} {scale}" for file, scale in zip(files, scales))


def find(path):
    """-> the file of `path`: itself, the one in a folder, or of a hub id."""
    path = local(path, "lora")
    file = path / NAME if path.is_dir() else path
    if (path / PEFT).is_file() and not file.is_file():
        return path / PEFT
    if not file.is_file():
        raise InputError(f"{file}: no such file; expected a LoRA: a .safetensors file, a folder "
                         f"with {NAME}, such as lora_target of a run, or a hub id")
    return file


def facts(paths):
    """What files tell about the student; of what several tell, the last one's word counts.
    -> {field of FACTS: value}, which only time_cond_proj_dim, here maybe None, is always among."""
    found = {"time_cond_proj_dim": None}
    for path in paths:
        told = facts_of(Tensors([find(path)]))
        found |= {key: value for key, value in told.items() if value is not None}
    return found


def facts_of(tensors):
    found = dict.fromkeys(FACTS) | json_of(tensors, OURS)
    for key, shape in tensors.shapes.items():
        if re.search(r"time_embedding.cond_proj\.(lora_down|lora_A)\.", key):
            found["time_cond_proj_dim"] = shape[1]
    return {key: found[key] for key in FACTS}


def json_of(tensors, key):
    try:
        found = json.loads(tensors.metadata.get(key, "{}"))
        return found if isinstance(found, dict) else {}
    except ValueError:
        raise InputError(f"{tensors.where}: its metadata {key} is no JSON; "
                         "copy or download the file again") from None


def known_names(unet):
    """{name in a file: our name} of the UNet's linear layers and convolutions."""
    config, names = vars(unet.config), {}
    for key, tensor in unet.state_dict().items():
        if key.endswith(".weight") and tensor.ndim > 1:
            ours = key.removesuffix(".weight")
            ldm = single_file.unet_key(key, config)[0].removeprefix(single_file.PREFIX["unet"])
            for name in (ours, ldm.removesuffix(".weight")):
                names |= {name: ours, "lora_unet_" + name.replace(".", "_"): ours}
    return names


def read(path, unet):
    """The updates in a file, in float32 on the CPU -> Found, in the UNet's order. What it has for
    text encoders is left out, and that is said. Raises InputError if anything else is not for this
    UNet."""
    tensors = Tensors([find(path)])
    refuse_quantized(tensors)
    where, names, parts, unknown, text = tensors.where, known_names(unet), {}, [], 0
    for key in tensors.shapes:
        plain = key.removeprefix("base_model.model.")
        if TEXT.match(plain):
            text += 1
            continue
        match = KEY.fullmatch(PROCESSOR.sub(r".\1.lora.", plain).replace("to_out.lora.",
                                                                         "to_out.0.lora."))
        layer = match and names.get((match["layer"] or match["of"]).removeprefix("unet."))
        if layer is None:
            unknown.append(key)
        else:
            part = "A" if match["A"] else "B" if match["B"] else "alpha"
            parts.setdefault(layer, {})[part] = key
    refuse_unknown(tensors, unet, unknown)
    if text:
        print(f"{where}: {text} tensors for the text encoder are left out; only the UNet's "
              f"are read")
    if not parts:
        raise InputError(f"{where}: no tensors of a LoRA for a UNet; expected names such as "
                         "unet...lora_A.weight or lora_unet_....lora_down.weight")
    order = {key.removesuffix(".weight"): tensor.shape
             for key, tensor in unet.state_dict().items() if key.endswith(".weight")}
    alpha_of, updates = alphas_in(tensors), {}
    for layer, shape in order.items():
        if layer in parts:
            A, B = pair(tensors, parts[layer], layer, shape, unet)
            alpha = alpha_of(layer, len(A))
            if "alpha" in parts[layer]:
                alpha = tensors.read(parts[layer]["alpha"], torch.float32, None).item()
            updates[layer] = A, B, alpha
    return Found(updates, facts_of(tensors))


def pair(tensors, part, layer, shape, unet):
    """-> A [rank, in, ...], B [out, rank, 1...] of one layer, whose weight has that shape."""
    for name in ("A", "B"):
        if name not in part:
            raise InputError(f"{tensors.where}: {layer} has only one of its two matrices; "
                             "copy or download the file again")
        if 0 in tensors.shapes[part[name]]:
            raise InputError(f"{tensors.where}: {part[name]} is {tensors.shapes[part[name]]}, a "
                             "rank of 0; expected 1 or more: write the file again")
    A, B = (tensors.read(part[name], torch.float32, "cpu") for name in ("A", "B"))
    rank = A.shape[0]
    wanted = (rank, *shape[1:]), (shape[0], rank, *(1 for _ in shape[2:]))
    flat = [tuple(size for size in wanted_shape if size > 1) for wanted_shape in wanted]
    found = [tuple(size for size in tensor.shape if size > 1) for tensor in (A, B)]
    if flat != found:  # but for 1x1 convolutions that are linear layers elsewhere
        raise InputError(
            f"{tensors.where}: {layer} is {tuple(A.shape)} and {tuple(B.shape)}, expected "
            f"{wanted[0]} and {wanted[1]}{architectures(tensors, unet)}")
    return A.reshape(wanted[0]), B.reshape(wanted[1])


def alphas_in(tensors):
    """What diffusers' metadata or peft's file beside say of alpha -> a function from a layer and
    its rank to its alpha, which is the rank where they say nothing."""
    config, beside = json_of(tensors, THEIRS), Path(tensors.where).parent / "adapter_config.json"
    config = {key.removeprefix("unet."): value for key, value in config.items()}
    if Path(tensors.where).name == PEFT and beside.is_file():
        config = read_json(beside)
    patterns, others = config.get("alpha_pattern") or {}, config.get("lora_alpha")

    def alpha_of(layer, rank):
        # a pattern stands for the layers whose names end so (peft's get_pattern_key)
        own = [alpha for pattern, alpha in patterns.items()
               if re.fullmatch(rf"(.*\.)?({pattern})", layer)]
        alpha = own[0] if own else others
        if alpha is None:
            return rank
        # rank-stabilized: alpha / sqrt(rank) times, not alpha / rank (arXiv 2312.03732)
        return alpha * math.sqrt(rank) if config.get("use_rslora") else alpha
    return alpha_of


def refuse_unknown(tensors, unet, unknown):
    """Raise InputError if there are `unknown` keys in a file."""
    if not unknown:
        return
    kinds = {"hada_": "LoHa", "lokr_": "LoKr", "dora_scale": "DoRA", "magnitude_vector": "DoRA",
             "lora_mid": "a LoCon with a core", ".diff": "a full difference"}
    for sign, kind in kinds.items():
        if any(sign in key for key in unknown):
            raise InputError(f"{tensors.where}: {kind} ({unknown[0]}); expected LoRA, "
                             "two matrices a layer")
    more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
    raise InputError(f"{tensors.where}: {unknown[0]}{more}: no layers of this UNet"
                     f"{architectures(tensors, unet)}")


def architectures(tensors, unet):
    """What the file is for and what the UNet is, in words, where that is not the same."""
    width = unet.config.cross_attention_dim
    ours = WIDTHS.get(width, f"a model whose text is {width} wide")
    theirs = architecture(tensors.shapes)
    if theirs == ours:
        return "; is the file whole, and made for this model?"
    return (f": a LoRA for {theirs}, the UNet is of {ours}; "
            "take a LoRA and a model that belong together")


def architecture(shapes):
    """{key: shape} -> "SD1.x", "SD2.x", "SDXL", ..., by what its keys tell."""
    joined = " ".join(shapes)
    marks = {"SD3 or Flux": r"joint_|double_blocks|single_transformer|context_embedder",
             "SDXL": r"lora_te2_|text_encoder_2\.|transformer_blocks[._][1-9]|add_embedding"}
    for name, mark in marks.items():
        if re.search(mark, joined):
            return name
    for key, shape in shapes.items():
        if re.search(r"attn2.*to_k.*(lora_down|lora_A|\.down)", key) and len(shape) > 1:
            return WIDTHS.get(shape[1], f"a model whose text is {shape[1]} wide")
    return "an unknown model"


def write(lora, file, layout="diffusers", dtype=None):
    """A LoRA (lora.py) at its scale -> a .safetensors, which appears whole. dtype: float32 if
    None."""
    state, ranks, alphas = {}, {}, {}
    to_file = lambda tensor: tensor.detach().to("cpu", dtype or torch.float32).contiguous()
    for name, update in lora.updates.items():
        alphas[name], ranks[name] = update.alpha, len(update.A)
        A, B = to_file(update.A), to_file(update.B * update.scale)
        if layout == "kohya":
            layer = "lora_unet_" + name.replace(".", "_")
            state |= {f"{layer}.lora_down.weight": A, f"{layer}.lora_up.weight": B,
                      f"{layer}.alpha": torch.tensor(float(update.alpha), dtype=A.dtype)}
        else:
            state |= {f"unet.{name}.lora_A.weight": A, f"unet.{name}.lora_B.weight": B}
    metadata = {"format": "pt", OURS: json.dumps(lora.facts)}
    if layout == "diffusers":
        # what most layers have; the others are named
        rank, alpha = (statistics.mode(found.values()) for found in (ranks, alphas))
        metadata[THEIRS] = json.dumps({
            "unet.r": rank, "unet.lora_alpha": alpha, "unet.target_modules": list(ranks),
            "unet.rank_pattern": {k: v for k, v in ranks.items() if v != rank},
            "unet.alpha_pattern": {k: v for k, v in alphas.items() if v != alpha}})
    with whole_file(Path(file)) as new:
        save_file(state, new, metadata=metadata)
