"""The original single file of Stable Diffusion 1.x and 2.x, such as
`v2-1_512-ema-pruned.safetensors`: what the file does not say (configs, tokenizer, prediction type),
and the LDM name of every tensor.

    model.diffusion_model.*     UNet
    first_stage_model.*         VAE
    cond_stage_model.*          text encoder: transformers' names (SD1), or open_clip's with
                                fused q, k, v (SD2)

A key function takes one of our keys (the names of the diffusers folder) and gives (key in the file,
third). `third` is None, or 0, 1, 2 where the file stacks q, k and v in one tensor. The same
functions serve reading and writing.
Source of the names: CompVis/stable-diffusion and Stability-AI/stablediffusion, `ldm/modules`.
"""
import re

# what both generations have in common
UNET = {
    "block_out_channels": [320, 640, 1280, 1280], "layers_per_block": 2, "sample_size": 64,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3}
TEXT = {
    "model_type": "clip_text_model", "max_position_embeddings": 77, "vocab_size": 49408,
    "layer_norm_eps": 1e-5}
CONFIGS = {
    "sd1": {
        "unet": UNET | {
            "cross_attention_dim": 768, "attention_head_dim": 8, "use_linear_projection": False},
        "vae": {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2},
        "text_encoder": TEXT | {
            "hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12,
            "num_hidden_layers": 12, "hidden_act": "quick_gelu"}},
    "sd2": {
        "unet": UNET | {
            "cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20],
            "use_linear_projection": True},
        "vae": {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2},
        "text_encoder": TEXT | {
            "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16,
            "num_hidden_layers": 23,  # of 24: SD2 reads the penultimate
            "hidden_act": "gelu"}},
}
GRID = "rg_lcd.lcm_grid"  # metadata of a student that export.py has written
V_PREDICTION = {"sample_size": 96, "upcast_attention": True}  # what 2.1-768 adds to UNet's config
PREFIX = {
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text_encoder": "cond_stage_model."}
TEXT_PREFIX = {
    "sd1": "cond_stage_model.transformer.text_model.",
    "sd2": "cond_stage_model.model."}
# of the tensors under the prefix, those passed over: training's leftovers and the last text layer
IGNORED = {
    "unet": r"^$",
    "vae": r"loss\.",
    "text_encoder": r"resblocks\.23\.|text_projection|logit_scale|attn_mask|position_ids"}


def generation(keys):
    """"sd1", "sd2", or None if these are not the keys of such a file: told by the text encoder's
    names, and by any of them, so that one that is missing can be named."""
    if not any(key.startswith(PREFIX["unet"]) for key in keys):
        return None
    ours = [key for key in keys if not re.search(IGNORED["text_encoder"], key)]
    return next((kind for kind, prefix in TEXT_PREFIX.items()
                 if any(key.startswith(prefix) for key in ours)), None)


# what metadata call the two, in lower case with _ between words
PREDICTIONS = {
    "epsilon": "epsilon", "eps": "epsilon", "eps_pred": "epsilon", "eps_prediction": "epsilon",
    "epsilon_prediction": "epsilon", "v": "v_prediction", "vpred": "v_prediction",
    "v_pred": "v_prediction", "v_prediction": "v_prediction"}


def said_prediction(metadata, keys):
    """What a file says that it predicts -> {where and how it says so: "epsilon", "v_prediction", or
    None for a word that is neither}. Empty words say nothing.

    Read are the ModelSpec standard, kohya's ss_v_parameterization, and the tensor `v_pred` that
    newer files carry as a mark. The weights themselves are not asked. One program takes 2.x for v
    where the spread of one norm's bias is above 0.09; by its own comment its author did not know
    whether that works, and we found no measured value."""
    said = {}
    for key in ("modelspec.prediction_type", "prediction_type"):
        word = re.sub(r"[\s-]+", "_", metadata.get(key, "").strip().lower())
        if word:
            said[f"{key} = {metadata[key]}"] = PREDICTIONS.get(word)
    flag = {"true": "v_prediction", "1": "v_prediction", "false": "epsilon", "0": "epsilon"}
    word = metadata.get("ss_v_parameterization", "").strip().lower()
    if word not in ("", "none"):
        said[f"ss_v_parameterization = {word}"] = flag.get(word)
    if metadata.get("modelspec.architecture", "").startswith("stable-diffusion-v2-768-v"):
        said["modelspec.architecture = stable-diffusion-v2-768-v"] = "v_prediction"
    if "v_pred" in keys:
        said["a tensor v_pred"] = "v_prediction"
    return said


# words of a file name for epsilon and for v: those that say it, then those of SD2 as published
VPRED = r"\bv ?(pred|prediction)\b"
NAMED = {
    "sd1": [(r"\b(eps|epsilon)(pred)?\b", VPRED)],
    "sd2": [(r"\b(eps|epsilon)(pred)?\b", VPRED + r"|\bv\b(?! \d)"),  # no "v" of "v 2 1"
            (r"(?<!\d)512(?!\d)|\bbase\b", r"(?<!\d)768(?!\d)")]}


def named_prediction(kind, name):
    """"epsilon" or "v_prediction", from the words in a file's name; None if they tell neither or
    both. Without a word an SD1 file predicts epsilon, as all published ones do."""
    words = " ".join(re.split(r"[^a-z0-9]+", name.lower()))
    for epsilon, v in NAMED[kind or "sd2"]:
        epsilon, v = re.search(epsilon, words), re.search(v, words)
        if epsilon and v:
            return None
        if epsilon or v:
            return "epsilon" if epsilon else "v_prediction"
    return "epsilon" if kind == "sd1" else None


# ------------------------------------------------------------------------------------------ names

# ours -> LDM's
UNET_TOP = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "time_embedding.cond_proj": "time_embed.cond_proj",  # students only; no published file has it
    "conv_norm_out": "out.0",
    "conv_out": "out.2"}
UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection"}
VAE_NAMES = {
    "conv_shortcut": "nin_shortcut",
    "downsamplers.0": "downsample",
    "upsamplers.0": "upsample",
    "conv_norm_out": "norm_out",
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.resnets.1": "mid.block_2",
    "mid_block.attentions.0": "mid.attn_1",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out"}
TEXT_NAMES = {
    "embeddings.token_embedding": "token_embedding",
    "embeddings.position_embedding.weight": "positional_embedding",
    "encoder.layers": "transformer.resblocks",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "final_layer_norm": "ln_final"}


def replace_all(key, names):
    """The key with whole dotted parts replaced, in the order of `names`."""
    for ours, theirs in names.items():
        key = re.sub(rf"(^|\.){re.escape(ours)}(\.|$)", rf"\g<1>{theirs}\g<2>", key)
    return key


def unet_key(key, config):
    """LDM numbers the stages of the down path (input_blocks; 0 is conv_in) and those of the up path
    (output_blocks) straight through, layers + 1 to a level. The modules of a stage are numbered
    too: here its `slot`s."""
    layers = config["layers_per_block"]
    for ours, theirs in UNET_TOP.items():
        if key.startswith(ours + "."):
            return PREFIX["unet"] + theirs + key[len(ours):], None
    if key.startswith("mid_block."):  # resnets.0, attentions.0, resnets.1
        kind, i, rest = key.removeprefix("mid_block.").split(".", 2)
        place = f"middle_block.{1 if kind == 'attentions' else 2 * int(i)}"
    else:
        way, level, kind, i, rest = key.split(".", 4)
        level, i = int(level), int(i)
        if way == "down_blocks":  # a downsampler is a stage of its own, the last of its level
            stage = 1 + level * (layers + 1) + (layers if kind == "downsamplers" else i)
            slot = 1 if kind == "attentions" else 0
            place = f"input_blocks.{stage}.{slot}"
            if kind == "downsamplers":
                rest = rest.replace("conv.", "op.")
        else:  # an upsampler is the last slot of its level's last stage
            stage = level * (layers + 1) + (layers if kind == "upsamplers" else i)
            attends = config["up_block_types"][level].startswith("CrossAttn")
            slot = {"resnets": 0, "attentions": 1, "upsamplers": 1 + attends}[kind]
            place = f"output_blocks.{stage}.{slot}"
    if kind == "resnets":
        rest = replace_all(rest, UNET_RESNET)
    return f"{PREFIX['unet']}{place}.{rest}", None


def vae_key(key, config):
    """LDM counts the decoder's levels from the finest, we and diffusers from the coarsest."""
    last = len(config["block_out_channels"]) - 1
    key = re.sub(r"^encoder\.down_blocks\.(\d+)", r"encoder.down.\1", key)
    key = re.sub(r"^decoder\.up_blocks\.(\d+)", lambda m: f"decoder.up.{last - int(m[1])}", key)
    key = replace_all(key, VAE_NAMES)  # the middle's resnets first: they have names of their own
    return PREFIX["vae"] + re.sub(r"\.resnets\.", ".block.", key), None


def text_key(key, config):
    """The keys of transformers' text tower, which some of its versions prefix with `text_model.`"""
    key = key.removeprefix("text_model.")
    if config["hidden_act"] == "quick_gelu":  # SD1: transformers' own names
        return TEXT_PREFIX["sd1"] + key, None
    fused = re.search(r"self_attn\.([qkv])_proj\.(weight|bias)$", key)
    third = "qkv".index(fused[1]) if fused else None
    if fused:
        key = key[:fused.start()] + f"attn.in_proj_{fused[2]}"
    return TEXT_PREFIX["sd2"] + replace_all(key, TEXT_NAMES), third


KEYS = {"unet": unet_key, "vae": vae_key, "text_encoder": text_key}
