"""Small models of the transformers library: of every family its default configuration, shrunk, and an input for it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..._torch import tree_leaves
from ...discovery import call

LENGTH, BATCH = 16, 2
# The number of words, and of inner channels.
VOCABULARY = 96
LARGEST = 4_000_000
# What a family is for, the first that it has: the auto classes of the library.
_TASKS = (
    "CAUSAL_LM",
    "MASKED_LM",
    "SEQ_TO_SEQ_CAUSAL_LM",
    "IMAGE_CLASSIFICATION",
    "SPEECH_SEQ_2_SEQ",
    "CTC",
    "AUDIO_CLASSIFICATION",
    "SEQUENCE_CLASSIFICATION",
)
_SIZES = {
    64: "hidden_size d_model n_embd embed_dim dim emb_dim embedding_size encoder_hidden_size hidden_dim d_embed",
    2: "num_hidden_layers num_layers n_layer n_layers encoder_layers decoder_layers num_decoder_layers depth moe_top_k "
    "num_encoder_layers num_experts_per_tok num_key_value_heads",
    4: "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads num_experts "
    "num_local_experts n_routed_experts",
    VOCABULARY: "vocab_size intermediate_size ffn_dim d_ff encoder_ffn_dim decoder_ffn_dim n_inner ffn_hidden_size "
    "d_inner dense_intermediate_size intermediate_size_mlp",
    32: "moe_intermediate_size image_size shared_expert_intermediate_size",
    16: "head_dim d_kv attention_head_size d_head",
    8: "patch_size",
    128: "max_position_embeddings n_positions max_source_positions max_target_positions",
}
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "sep_token_id", "mask_token_id")


class LeftOutError(ValueError):
    """A family of which no small model can be made, or for which no input is known."""


def families() -> Iterator[tuple[str, str]]:
    """``(family, class name)`` of everything that the library has a model class for."""
    from transformers import CONFIG_MAPPING
    from transformers.models.auto import modeling_auto

    tables = [getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES", {}) for task in _TASKS]
    tables.append(modeling_auto.MODEL_MAPPING_NAMES)
    for family in CONFIG_MAPPING:
        name = next((table[family] for table in tables if family in table), None)
        if name is not None:
            yield family, name if isinstance(name, str) else name[0]


def small_model(family: str, name: str, **options: Any) -> nn.Module:
    """A model of a family from its default configuration with small widths: 64 channels, 2 layers, 96 words.

    Raises:
        LeftOutError: if that cannot be built, or is still large.
    """
    import transformers
    from transformers import CONFIG_MAPPING

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers.logging.set_verbosity_error()
        try:
            config = CONFIG_MAPPING[family](**_shrunk(CONFIG_MAPPING[family]()), **options)
            with torch.device("meta"):
                hollow = getattr(transformers, name)(config)
        except Exception as error:
            raise LeftOutError("its default configuration does not build a model when it is shrunk") from error
        if sum(p.numel() for p in hollow.parameters()) > LARGEST:
            raise LeftOutError("its shrunk configuration still makes a large model")
        model: nn.Module = getattr(transformers, name)(config)
        return model


def _shrunk(default: Any) -> dict[str, Any]:
    """Options that make a configuration small: sizes that it has and that are larger."""
    small: dict[str, Any] = {}
    given = default.to_dict() | {name: getattr(default, name, None) for name in default.attribute_map}
    for size, names in _SIZES.items():
        for name in names.split():
            if type(given.get(name)) is int and given[name] > size:
                small[name] = size
    small |= {name: 1 for name in _TOKENS if type(given.get(name)) is int and given[name] >= VOCABULARY}
    for name in default.sub_configs:
        part: Any = getattr(default, name, None)
        if hasattr(part, "sub_configs"):
            small[name] = part.to_dict() | _shrunk(part)
    # What is dropped at random would differ from one pass to the next.
    small |= {name: 0.0 for name in ("layerdrop", "encoder_layerdrop", "decoder_layerdrop") if given.get(name)}
    small |= {"apply_spec_augment": False} if given.get("apply_spec_augment") else {}
    layers = given.get("layer_types")
    return small | ({"layer_types": layers[:2]} if isinstance(layers, list) else {})


def small_inputs(model: nn.Module) -> dict[str, Any]:
    """Keyword arguments that a small model runs on, by what it calls its main input.

    Raises:
        LeftOutError: if it runs on none that is known.
    """
    config: Any = model.config
    name = str(getattr(model, "main_input_name", ""))
    tokens = torch.randint(2, VOCABULARY, (BATCH, LENGTH))
    choices: list[Tensor] = []
    if name == "input_ids":
        choices = [tokens]
    elif name == "pixel_values":
        channels, size = getattr(config, "num_channels", 3), getattr(config, "image_size", 64)
        sides = tuple(size) if isinstance(size, (list, tuple)) else (size, size)
        choices = [torch.randn(BATCH, channels, *sides), torch.randn(BATCH, channels, 64, 64)]
    elif name == "input_values":
        choices = [torch.randn(BATCH, 4000), torch.randn(BATCH, 1, 4000)]
    elif name == "input_features":
        bins = int(getattr(config, "num_mel_bins", 0) or getattr(config, "feature_projection_input_dim", 0) or 80)
        frames = 2 * int(getattr(config, "max_source_positions", 64))
        choices = [torch.randn(BATCH, bins, frames), torch.randn(BATCH, frames, bins)]
    decoder = {"decoder_input_ids": tokens} if getattr(config, "is_encoder_decoder", False) else {}
    for choice in choices:
        for more in ({"use_cache": False}, {}) if name == "input_ids" or decoder else ({},):
            inputs = {name: choice, **decoder, **more}
            try:
                with torch.no_grad():
                    once, twice = (tree_leaves(call(model.eval(), inputs)) for _ in range(2))
            except Exception:
                continue
            if not all(torch.equal(a, b) for a, b in zip(once, twice) if isinstance(a, Tensor)):
                raise LeftOutError("its outputs are random in eval mode too")
            return inputs
    raise LeftOutError(f"it does not run on {name or 'an input'} alone")
