"""bench.py's peers: networks of other libraries around the weights of ours, with our calls."""
import copy
import dataclasses
import tempfile

import torch
from torch import nn

# ----------------------------------------------------------------------------------- diffusers

def diffusers_twin(kind, net, **more):
    """A network of diffusers' class `kind` around the weights of ours."""
    config = {k: v for k, v in dataclasses.asdict(net.config).items() if k != "lcm_grid"}
    with torch.device("meta"):
        twin = kind.from_config(config | more)
    twin.load_state_dict(net.state_dict(), assign=True)
    return twin.to(memory_format=torch.channels_last).requires_grad_(net.training)


class DiffusersUNet(nn.Module):
    """diffusers' UNet with our call. passes: into how many it divides a batch, one after the other:
    2 for a teacher as the published script calls it."""

    def __init__(self, net, grad_checkpoint=False, passes=1):
        super().__init__()
        from diffusers import UNet2DConditionModel
        self.net, self.config, self.conv_in, self.passes = (
            diffusers_twin(UNet2DConditionModel, net), net.config, net.conv_in, passes)
        if grad_checkpoint and net.training:
            self.net.train().enable_gradient_checkpointing()

    def forward(self, latents, t, context, w_embedding=None):
        dtype = self.net.conv_in.weight.dtype
        w_embedding = None if w_embedding is None else w_embedding.to(dtype)
        parts = zip(*(x.chunk(self.passes) for x in (latents.to(dtype), t, context.to(dtype))))
        return torch.cat([self.net(*part, timestep_cond=w_embedding).sample for part in parts])

    def parameters(self, recurse=True):
        return self.net.parameters(recurse)


class DiffusersVAE:
    """diffusers' VAE with our calls."""

    def __init__(self, vae, dtype):
        from diffusers import AutoencoderKL
        levels = len(vae.config.block_out_channels)
        self.net = diffusers_twin(
            AutoencoderKL, vae, down_block_types=["DownEncoderBlock2D"] * levels,
            up_block_types=["UpDecoderBlock2D"] * levels)
        self.config, self.factor, self.dtype = vae.config, vae.factor, dtype

    def posterior(self, images):
        distribution = self.net.encode(images.to(self.dtype)).latent_dist
        return distribution.mean, distribution.std

    def decode(self, latents):
        return self.net.decode((latents / self.config.scaling_factor).to(self.dtype)).sample


def transformers_text(text_encoder):
    """transformers' tokenizer, and its CLIPTextModel around the weights of ours."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
    with tempfile.TemporaryDirectory() as folder:
        text_encoder.tokenizer.save_pretrained(folder)
        tokenizer = CLIPTokenizer.from_pretrained(folder)
    model = text_encoder.model
    with torch.device("meta"):
        twin = CLIPTextModel(CLIPTextConfig(**dataclasses.asdict(model.config)))
    prefix = "text_model." if hasattr(twin, "text_model") else ""  # by its version
    state = {prefix + key: tensor for key, tensor in model.state_dict().items()}
    twin.load_state_dict(state, assign=True)
    for name, buffer in twin.named_buffers():  # the position ids, which no file holds
        owner, _, attribute = name.rpartition(".")
        positions = torch.arange(buffer.shape[-1], device=model.final_layer_norm.weight.device)
        twin.get_submodule(owner).register_buffer(attribute, positions[None], persistent=False)
    return tokenizer, twin.eval()


def diffusers_pipeline(vae, text_encoder, unet, grid):
    """diffusers' own way from prompts to pictures, [B,3,H,W]. unet: DiffusersUNet; vae:
    DiffusersVAE; text_encoder: of transformers_text. -> function of prompts and side in pixels"""
    from diffusers import LatentConsistencyModelPipeline, LCMScheduler
    from diffusers.utils import logging
    logging.set_verbosity_error()
    tokenizer, text = text_encoder
    scheduler = LCMScheduler(
        1000, 0.00085, 0.012, "scaled_linear", set_alpha_to_one=False, clip_sample=False,
        original_inference_steps=grid)
    pipe = LatentConsistencyModelPipeline(
        vae.net, text, tokenizer, unet.net, scheduler, None, None, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return lambda prompts, steps, w, side: pipe(
        prompts, num_inference_steps=steps, guidance_scale=w + 1, output_type="pt", height=side,
        width=side)


# ------------------------------------------------------------------------------------ OpenVINO

def openvino_call(network, inputs, dtype):
    """The network compiled by OpenVINO for inputs of these shapes and for latency, with as many
    threads as ours and in `dtype`. -> function of such inputs"""
    import openvino
    exact = copy.deepcopy(network).float()  # OpenVINO lowers the precision itself
    floats = [x.float() if x.is_floating_point() else x for x in inputs]
    model = openvino.convert_model(exact, example_input=tuple(floats))
    model.reshape({i: list(x.shape) for i, x in enumerate(floats)})
    compiled = openvino.Core().compile_model(model, "CPU", {
        "PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": "bf16" if dtype == torch.bfloat16 else "f32"})

    def call(*inputs):
        arrays = [x.float().numpy() if x.is_floating_point() else x.numpy() for x in inputs]
        return torch.from_numpy(compiled(arrays)[0].copy()).to(dtype)
    return call


class OpenVINOUNet:
    """OpenVINO's version of a student's UNet with our call."""

    def __init__(self, unet, inputs, dtype):
        self.call, self.config, self.conv_in = (
            openvino_call(unet, inputs, dtype), unet.config, unet.conv_in)

    def __call__(self, latents, t, context, w_embedding):
        return self.call(latents, t, context, w_embedding)

    def eval(self):
        return self


class OpenVINOVAE:
    """OpenVINO's version of a VAE's decoder with our call."""

    def __init__(self, vae, latents, dtype):
        self.call = openvino_call(Decoder(vae), (latents,), dtype)
        self.config, self.factor = vae.config, vae.factor

    def decode(self, latents):
        return self.call(latents)


class Decoder(nn.Module):
    def __init__(self, vae):
        super().__init__()
        self.vae = vae

    def forward(self, latents):
        return self.vae.decode(latents)
