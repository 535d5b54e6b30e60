"""The parts of the embedded pipeline: true diffusers and transformers classes, small, with random weights.

Sizes: transformer of 3 double and 3 single blocks, 4 heads of 32 (d = 128); VAE from 64x64 pixels to 16x16x4 latents
(8x8 image tokens of 16 channels); CLIP of width 64 and T5 of width 96, two layers each, with tokenizers whose
vocabulary is the world's.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from harvest.shapes import draw

LATENT_SIDE = 16
"""Latents a side; pictures are four times that."""
_CLIP_LENGTH = 77


def words() -> list[str]:
    """Every word a caption can hold, sorted."""
    text = ["a on at in the left right top bottom centre of above below background"]
    text += [*draw.SHAPES, *draw.COLOURS, *draw.TEXTURES, *draw.SIZES, *draw.BACKGROUNDS]
    return sorted(set(" ".join(text).split()))


def new_pipeline(seed: int) -> FluxPipeline:
    """A pipeline of the embedded size with random weights drawn from `seed`, float32, on the CPU."""
    torch.manual_seed(seed)
    tokenizer, tokenizer_2 = clip_tokenizer(), t5_tokenizer()
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=2,
            projection_dim=64,
            max_position_embeddings=_CLIP_LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    text_encoder_2 = T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer_2),
            d_model=96,
            d_kv=24,
            d_ff=256,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            pad_token_id=tokenizer_2.pad_token_id,
            eos_token_id=tokenizer_2.eos_token_id,
        )
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=draw.SIDE,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=1.0,
        shift_factor=0.0,
    )
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=3,
        num_single_layers=3,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=96,
        pooled_projection_dim=64,
        guidance_embeds=False,
        axes_dims_rope=(8, 12, 12),
    )
    _initialise(transformer)
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=False),
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        text_encoder_2=text_encoder_2.eval(),
        tokenizer_2=tokenizer_2,
        transformer=transformer.eval(),
    )
    pipe.default_sample_size = LATENT_SIDE
    return pipe


def save_pipeline(pipe: FluxPipeline, folder: str | Path) -> None:
    """Writes the pipeline in diffusers' layout, weights in bfloat16 (the pipeline itself is left as it is)."""
    parts = {
        name: getattr(pipe, name)
        for name in ("transformer", "vae", "text_encoder", "text_encoder_2")
    }
    full = {
        name: {k: v.clone() for k, v in part.state_dict().items()} for name, part in parts.items()
    }
    try:
        for part in parts.values():
            part.to(torch.bfloat16)
        pipe.save_pretrained(folder, safe_serialization=True)
    finally:
        for name, part in parts.items():
            part.to(torch.float32)
            part.load_state_dict(full[name])


def clip_tokenizer() -> CLIPTokenizer:
    """CLIP's byte-pair tokenizer, its merges learned so that each word of the world is one token."""
    bpe = Tokenizer(models.BPE(unk_token="<|endoftext|>", end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()  # pyright: ignore[reportAttributeAccessIssue]
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    # All letters are named, so that other words still split into them, and the trainer, which numbers
    # the rest of its alphabet anew each time, learns the same merges each time.
    letters = "abcdefghijklmnopqrstuvwxyz,"
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        min_frequency=1,
        special_tokens=[
            *("<|startoftext|>", "<|endoftext|>"),
            *letters,
            *(letter + "</w>" for letter in letters),
        ],
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    bpe.train_from_iterator([*words(), ","] * 4, trainer)
    learned = bpe.get_vocab()
    ordered = sorted(learned, key=learned.__getitem__)
    vocab = {token: index for index, token in enumerate(ordered)}
    merges = [tuple(pair) for pair in _merges(bpe)]
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=_CLIP_LENGTH)


def t5_tokenizer() -> T5TokenizerFast:
    """T5's unigram tokenizer over the world's words, single letters as a fall-back."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0), (",", -2.0)]
    pieces += [("\u2581" + word, -3.0) for word in words()]
    pieces += [
        (letter, -12.0) for letter in "abcdefghijklmnopqrstuvwxyz" if letter not in dict(pieces)
    ]
    return T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=512)


def _merges(bpe: Tokenizer) -> list[list[str]]:
    import json

    merges = json.loads(bpe.to_str())["model"]["merges"]
    return [pair.split(" ") if isinstance(pair, str) else list(pair) for pair in merges]


def _initialise(transformer: FluxTransformer2DModel) -> None:
    """Xavier for every matrix; adaLN and the output at zero, so that each block starts as the identity."""
    for name, module in transformer.named_modules():
        if isinstance(module, torch.nn.Linear):
            if "norm" in name or name == "proj_out":
                torch.nn.init.zeros_(module.weight)
            else:
                torch.nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                torch.nn.init.zeros_(module.bias)
