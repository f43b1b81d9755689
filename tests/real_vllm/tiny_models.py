"""Checkpoint folders small enough for every check: a config and a tokenizer, no weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MTP = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "num_nextn_predict_layers": 1,
    "q_lora_rank": None,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 32,
    "moe_intermediate_size": 64,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
}


GEMMA3 = {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "num_hidden_layers": 6,
    "sliding_window": 256,
    "layer_types": [*["sliding_attention"] * 5, "full_attention"],
    "query_pre_attn_scalar": 32,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "hidden_activation": "gelu_pytorch_tanh",
}
MISTRAL = {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "sliding_window": 256,
}


def make(folder: Path, **changes: Any) -> Path:
    """A Llama checkpoint folder with those config fields changed."""
    from tokenizers import Tokenizer, models

    folder.mkdir(parents=True)
    config = LLAMA | changes
    (folder / "config.json").write_text(json.dumps(config))
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2}
    vocabulary |= {f"w{i}": i for i in range(3, config["vocab_size"])}
    Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>")).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "unk_token": "<unk>",
                "bos_token": "<s>",
                "eos_token": "</s>",
            }
        )
    )
    return folder


def make_all(root: Path) -> dict[str, str]:
    """Folders by role: target, drafts, heads, an MLA target with an MTP layer, windows."""
    roles: dict[str, dict[str, Any]] = {
        "target": {},
        "wide": {"num_hidden_layers": 6, "num_key_value_heads": 1},
        "draft": {"num_hidden_layers": 1, "num_key_value_heads": 1, "head_dim": 64},
        "other-vocabulary": {"num_hidden_layers": 1, "vocab_size": 480},
        "eagle3": {
            "architectures": ["LlamaForCausalLMEagle3"],
            "num_hidden_layers": 1,
            "draft_vocab_size": 512,
        },
        "eagle": {"architectures": ["EagleLlamaForCausalLM"], "num_hidden_layers": 1},
        "mtp": MTP,
        "gemma3": GEMMA3,
        "mistral": MISTRAL,
    }
    return {role: str(make(root / role, **changes)) for role, changes in roles.items()}
